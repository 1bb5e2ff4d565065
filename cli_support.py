"""What all commands of cli.py share: options that fill config keys, running a stage, and errors on one line."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar, cast

import click

from .pipeline.errors import DistInitError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
Stage = Callable[[Any, Any], dict[str, Any]]

INTERRUPTED = 130


class KeyOption(click.Option):
    """An option that fills one key of the command's config.

    It has no default of its own: not given, the preset, the file or the model decides. `shown` is the
    model's default as --help prints it (a test holds the two together: reading the model here would
    import torch for a help text).
    """

    def __init__(self, *args: Any, key: str, shown: object = None, **kwargs: Any) -> None:
        if shown is not None:
            kwargs["help"] = f"{kwargs.get('help', '')}  [default: {shown}]"
        super().__init__(*args, **kwargs)
        self.key = key
        self.shown = shown


class KeyArgument(click.Argument):
    """An argument that fills one key of the command's config."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key


class Choices(click.ParamType):
    """Shows the usual values in --help and leaves the check to the config, whose message is the same
    wherever the value came from."""

    def __init__(self, *values: str) -> None:
        self.values = values
        self.name = "|".join(values)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name


def key_option(*names: str, key: str, shown: object = None, **kwargs: Any) -> Callable[[F], F]:
    """`click.option` for a config key."""
    return click.option(*names, cls=KeyOption, key=key, shown=shown, **kwargs)


def key_argument(name: str, *, key: str, **kwargs: Any) -> Callable[[F], F]:
    """`click.argument` for a config key."""
    return click.argument(name, cls=KeyArgument, key=key, **kwargs)


def config_options(command: F) -> F:
    """--preset, --config and --set."""
    for option in (
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
                     help="Set any key of the config; the value is YAML. Repeatable, wins over all else."),
        click.option("--config", "file", metavar="FILE",
                     help="A YAML file with a section a command, as the ones written beside results."),
        click.option("--preset", metavar="NAME", help="A preset that ships with the package: demo, paper."),
    ):
        command = option(command)
    return command


def screen_options(command: F) -> F:
    """--json, --quiet and --debug."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", is_flag=True, help="No lines and no progress, warnings only."),
        click.option("--json", "as_json", is_flag=True,
                     help="End with one JSON object on standard output; all else goes to standard error."),
    ):
        command = option(command)
    return command


def run_stage(
    module: str,
    config_class: str,
    stage: str,
    given: dict[str, Any],
    extra: dict[str, Any] | None = None,
) -> None:
    """Build the config of the current command and run its stage.

    module: below `distinit.stages`. given: what click parsed. extra: config keys that the command worked
    out of several options. Everything heavy is imported here, not for --help.
    """
    from .stages.config import load_config

    context = click.get_current_context()
    options = {
        param.key: _listed(given[cast(str, param.name)])
        for param in context.command.params
        if isinstance(param, KeyOption | KeyArgument)
    }
    with quiet_stdout(given["as_json"]) as screen_args:
        home = importlib.import_module(f".stages.{module}", __package__)
        config = load_config(
            getattr(home, config_class),
            cast(str, context.info_name),
            preset=given.get("preset"),
            file=given.get("file"),
            options={**options, **(extra or {})},
            settings=given.get("settings", ()),
        )
        show(cast(Stage, getattr(home, stage)), config, given, screen_args)


def show(stage: Stage, config: Any, given: dict[str, Any], screen_args: dict[str, Any]) -> None:
    """Run a stage with the screen asked for and print its result as JSON if asked for."""
    from .stages.screen import Screen

    screen = Screen(json=given["as_json"], quiet=given["quiet"], **screen_args)
    screen.result(stage(config, screen))


@contextlib.contextmanager
def quiet_stdout(as_json: bool) -> Iterator[dict[str, Any]]:
    """With --json whatever prints (libraries do) goes to standard error; the screen keeps the real one."""
    if not as_json:
        yield {}
        return
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield {"stdout": stdout}


def pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    """`NAME=VALUE`, repeated, as a dict. Raises UsageError for a value without `=` or a name twice."""
    result: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text}: expected NAME=VALUE")
        if name in result:
            raise UsageError(f"{option} {text}: {name!r} is given twice")
        result[name] = value
    return result


def run(group: click.Group, argv: list[str] | None = None, resume_hints: dict[str, str] | None = None) -> NoReturn:
    """Run the command line: exit 0 for a job done, 2 for wrong use, 1 for a failure, 130 when interrupted.

    An error is one line on standard error; --debug shows the traceback before it.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        code = group.main(args=argv, prog_name="distinit", standalone_mode=False)
        _leave(code if isinstance(code, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        _leave(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        _fail(error.format_message() + where, error.exit_code, debug)
    except (KeyboardInterrupt, click.exceptions.Abort):
        command = next((word for word in argv if word in group.commands), "")
        _fail((resume_hints or {}).get(command, "interrupted"), INTERRUPTED, debug, prefix="")
    except BrokenPipeError:
        # The reader of our output has gone, as in `distinit … | head`.
        sys.stderr.close()
        _leave(1)
    except Exception as error:
        _fail(*explain(error), debug)


def explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for any exception."""
    chain = list(_chain(error))
    full = next((e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    if full is not None:
        return f"disk full while writing{_file_of(full, error)}; free some space and run it again", 1
    if isinstance(error, DistInitError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, ModuleNotFoundError):
        return f"{error} (is the installation complete? pip install distinit)", 1
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]} (--debug shows where)", 1


def _file_of(full: OSError, error: BaseException) -> str:
    if full.filename:
        return f" {full.filename}"
    return f": {error}" if isinstance(error, DistInitError) else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _listed(value: Any) -> Any:
    """click gives tuples for repeatable options: empty means not given."""
    return (list(value) or None) if isinstance(value, tuple) else value


def _fail(message: str, code: int, debug: bool, prefix: str = "error: ") -> NoReturn:
    from .stages.screen import printable

    if debug:
        traceback.print_exc()
    line = printable(" ".join(message.split("\n")))
    print(f"{prefix}{line}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(code)
