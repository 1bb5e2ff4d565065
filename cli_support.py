"""What all commands of cli.py share: from what was typed to a stage, and errors on one line."""

from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from .cli_options import KeyArgument, KeyOption
from .pipeline.common.errors import DistInitError, UsageError
from .pipeline.common.streams import clean_streams, printable

if TYPE_CHECKING:
    from .pipeline.common.console import Console


INTERRUPTED = 130
NO_ARGUMENTS: tuple[type[click.UsageError], ...] = tuple(
    kind for kind in [getattr(click.exceptions, "NoArgsIsHelpError", None)] if kind is not None
)
"""What click from 8.2 on raises for a group without a command; before, it shows the help by
itself."""


def run_stage(
    module: str,
    config_class: str,
    stage: str,
    given: dict[str, Any],
    extra: dict[str, Any] | None = None,
    flags: dict[str, str] | None = None,
) -> None:
    """Build the config of the current command and run its stage.

    module: below `distinit.stages`. given: what click parsed. extra: config keys that the command
    worked out of several options; flags: the option to name for such a key. Everything heavy is
    imported here, not for --help.
    """
    from .pipeline.common.config import load_config

    context = click.get_current_context()
    options = {
        param.key: param.config_value(given[param.name])
        for param in context.command.params
        if isinstance(param, KeyOption | KeyArgument)
    }
    dropped = [
        key
        for param in context.command.params
        if isinstance(param, KeyOption) and options.get(param.key) is not None
        for key in param.replaces
    ]
    with _screen(given) as console:
        home = importlib.import_module(f".stages.{module}", __package__)
        config = load_config(
            getattr(home, config_class),
            cast(str, context.info_name),
            preset=given.get("preset"),
            file=given.get("file"),
            options={**options, **(extra or {})},
            settings=given.get("settings", ()),
            dropped=dropped,
            flags=_flags(context) | (flags or {}),
        )
        result = getattr(home, stage)(config, console)
        console.result(result)
    if (
        result.get("ok") is False or result.get("complete") is False
    ):  # a part of the job could not be done
        context.exit(1)


def _flags(context: click.Context) -> dict[str, str]:
    """Config key → the option or argument that fills it, for messages."""
    return {
        param.key: param.make_metavar(context) if isinstance(param, KeyArgument) else param.opts[0]
        for param in context.command.params
        if isinstance(param, KeyOption | KeyArgument)
    }


def call_stage(module: str, stage: str, given: dict[str, Any], *args: Any, **named: Any) -> None:
    """Run a stage that takes plain arguments, then the screen, and no config."""
    with _screen(given) as console:
        home = importlib.import_module(f".stages.{module}", __package__)
        result = getattr(home, stage)(*args, console, **named)
        console.result(result)
    if result.get("ok") is False:  # a check that found something
        click.get_current_context().exit(1)


@contextlib.contextmanager
def _screen(given: dict[str, Any]) -> Iterator[Console]:
    """The screen asked for. With --json whatever prints (libraries do) goes to standard error; the
    screen keeps the real standard output for its one object."""
    from .pipeline.common.console import Console

    require_system()
    lead = (
        os.environ.get("RANK", "0") == "0"
    )  # torchrun starts the command once a process; one speaks
    console = Console(json=given["as_json"] and lead, quiet=given["quiet"] or not lead)
    if not sys.platform.startswith("linux"):
        console.warn(
            f"distinit is tested on Linux only; on {platform.system()} decoding processes have no memory limit"
        )
    with contextlib.redirect_stdout(sys.stderr) if given["as_json"] else contextlib.nullcontext():
        yield console


def require_system() -> None:
    """DistInitError where the system lacks what every command rests on."""
    missing = [name for name in ("fcntl", "resource") if importlib.util.find_spec(name) is None]
    if missing:
        raise DistInitError(
            f"distinit needs Linux; {platform.system()} has no {' and no '.join(missing)}, which locks of stores and "
            f"limits of decoding processes need (on Windows, WSL has them)"
        )


def pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    """`NAME=VALUE`, repeated, as a dict. Raises UsageError for a value without `=` or a name
    twice."""
    result: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {text}: expected NAME=VALUE")
        if name in result:
            raise UsageError(f"{option} {text}: {name!r} is given twice")
        result[name] = value
    return result


def numbers(text: str, option: str) -> list[float]:
    """`1,1.5` as [1.0, 1.5]. Raises UsageError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers, as in 1,1.5") from None


def height_and_width(text: str, option: str) -> list[int]:
    """`128x171` as [128, 171]. Raises UsageError."""
    height, times, width = text.lower().partition("x")
    if not (times and height.isdecimal() and width.isdecimal()):
        raise UsageError(f"{option} {text}: expected HEIGHTxWIDTH, as in 128x171")
    return [int(height), int(width)]


def teacher_specs(
    names: tuple[str, ...],
    options: tuple[str, ...],
    weights: tuple[str, ...],
    sha256: tuple[str, ...],
) -> list[dict[str, Any]] | None:
    """`--teacher` and what belongs to it, as config values; None when no teacher was given.

    `NAME:key=value`, `NAME=FILE` and `NAME=DIGEST` name the teacher; with one teacher NAME may be
    left out. Raises UsageError for a name that is no `--teacher`, or none where it is needed.
    """
    specs: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}

    def spec(name: str, option: str) -> dict[str, Any]:
        if name in specs:
            return specs[name]
        if not name and len(specs) == 1:
            return next(iter(specs.values()))
        given = ", ".join(specs) or "none is given"
        what = f"teacher {name!r} is not among" if name else "name the teacher, one of"
        raise UsageError(f"{option}: {what} the --teacher options: {given}")

    for text in options:
        left, equals, value = text.partition("=")
        owner, _, key = left.rpartition(":")
        if not (equals and key):
            raise UsageError(f"--teacher-option {text}: expected key=value or NAME:key=value")
        spec(owner, f"--teacher-option {text}").setdefault("options", {})[key] = value
    for option, field, texts in (
        ("--teacher-weights", "weights", weights),
        ("--teacher-sha256", "sha256", sha256),
    ):
        for text in texts:
            # A file name may hold "=": what stands before it is a teacher's name or part of the
            # file's.
            name, equals, value = text.partition("=")
            named = equals != "" and (name in specs or field == "sha256")
            spec(name if named else "", f"{option} {text}")[field] = value if named else text
    return list(specs.values()) or None


def run(
    group: click.Group, argv: list[str] | None = None, resume_hints: dict[str, str] | None = None
) -> NoReturn:
    """Run the command line: exit 0 for a job done, 2 for wrong use, 1 for a failure, 130 when
    interrupted.

    An error is one line on standard error; --debug shows the traceback before it.
    """
    # OpenMP's threads spin while they wait, which slows torch manyfold on cores that have other
    # work too (decoding, another job): sleeping ones cost nothing measurable. Read when torch is
    # loaded, later.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    with clean_streams():
        _run(group, argv, resume_hints or {}, debug)


def _run(
    group: click.Group, argv: list[str], resume_hints: dict[str, str], debug: bool
) -> NoReturn:
    try:
        code = group.main(args=argv, prog_name="distinit", standalone_mode=False)
        _leave(code if isinstance(code, int) else 0)
    except NO_ARGUMENTS as error:
        click.echo(error.format_message(), err=True)
        _leave(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context else ""
        _fail(error.format_message() + where, error.exit_code, debug)
    except (KeyboardInterrupt, click.exceptions.Abort):
        command = next((word for word in argv if word in group.commands), "")
        _fail(resume_hints.get(command, "interrupted"), INTERRUPTED, debug, prefix="")
    except BrokenPipeError:
        # The reader of our output has gone, as in `distinit … | head`.
        sys.stderr.close()
        _leave(1)
    except Exception as error:
        if getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0":
            _leave(
                explain(error)[1]
            )  # one of several processes with the same error, which rank 0 tells
        _fail(*explain(error), debug)


def explain(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for any exception."""
    chain = list(_chain(error))
    full = next(
        (e for e in chain if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)),
        None,
    )
    if full is not None:
        return (
            f"disk full while writing{_file_of(full, error)}; free some space and run it again",
            1,
        )
    if isinstance(error, DistInitError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        from .pipeline.common.limits import limit_met

        return str(limit_met(error)), 1
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


def _fail(message: str, code: int, debug: bool, prefix: str = "error: ") -> NoReturn:
    from .pipeline.common.urls import hide_secrets

    if debug:
        traceback.print_exc()
    line = printable(hide_secrets(" ".join(message.split("\n"))))
    print(f"{prefix}{line}", file=sys.stderr)
    _leave(code)


def _leave(code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(code)
