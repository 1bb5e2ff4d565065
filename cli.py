"""The `distinit` command: options → one validated options model → one stage.

A command is an entry of `COMMANDS` in stages/__init__.py: options model, help and examples.
Its options are generated from the fields of the model (`CliOption` in pipeline/common/settings.py),
which define type, default, choices and help text. Help is quick, since the modules of the models do
not import torch, and only that of the requested command is imported.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.util
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .pipeline.common.errors import DistInitError, UsageError, explain
from .pipeline.common.streams import clean_streams, printable
from .stages import COMMANDS, STAGES, TARGETS_SHORT, Command

if TYPE_CHECKING:
    from .pipeline.common.console import Console
    from .pipeline.common.settings import CliOption, Options

FLOW = """\b
videos --> extract-targets --> targets.zarr --> train-student --> finetune --> report
  |        once, teachers      the cache        many times        many times
  +------> prepare (optional) --> copies or flow ------+--------------+
"""
RESUMES = "interrupted; the same command resumes where it stopped"
RESUMES_FROM_CHECKPOINT = (
    "interrupted; the same command with --resume continues from the last checkpoint, or from the start if "
    "there is none (SIGTERM writes one first)"
)
RESUME_HINTS = {
    **dict.fromkeys(("demo", "prepare", "extract-targets", "ablate", "evaluate"), RESUMES),
    **dict.fromkeys(("train-student", "finetune"), RESUMES_FROM_CHECKPOINT),
    "targets": "interrupted; committed data are kept, and the same command does the remaining work",
}
GROUPS = ("Inputs", "Output", "Teacher", "Sampling", "Student", "Training", "Test", "Hardware")
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
INTERRUPTED = 130
# Click 8.2 and later raise this for a group without a command; earlier versions show the help.
NO_ARGUMENTS: tuple[type[click.UsageError], ...] = tuple(
    error for error in [getattr(click.exceptions, "NoArgsIsHelpError", None)] if error is not None
)


class KeyOption(click.Option):
    """An option that fills one key of the command's options model.

    Click knows no default for it: without the option, the preset, the file or the model provides
    the value. The values of the parameters named in `cli.parts` are further arguments of
    `cli.parse`.

    Attributes:
        key: Dotted key of the options model.
        cli: Definition of the option in the model.
        replaces: Keys of a preset or file that are ignored if the option is given.
    """

    name: str

    def __init__(self, *args: Any, key: str, cli: CliOption, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key
        self.cli = cli
        prefix = key.rpartition(".")[0]
        self.replaces = tuple(f"{prefix}.{name}".lstrip(".") for name in cli.replaces)

    def config_value(self, values: Mapping[str, Any]) -> Any:
        """Return the value for the config, None if the option was not given.

        Args:
            values: Values of all parameters of the command, by name.
        """
        value = values[self.name]
        names = [flag[2:].replace("-", "_") for flag, _, _ in self.cli.parts]
        if value in (None, ()) and not any(values[name] for name in names):
            return None
        if self.cli.parse is not None:
            try:
                return self.cli.parse(value, *(values[name] for name in names))
            except UsageError:
                raise
            except ValueError as error:
                raise UsageError(f"{self.opts[0]}: {error}") from None
        return list(value) if isinstance(value, tuple) else value


class KeyArgument(click.Argument):
    """An argument that fills one key of the command's options model."""

    name: str

    def __init__(self, *args: Any, key: str, text: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key
        self.text = text

    def config_value(self, values: Mapping[str, Any]) -> Any:
        """Return the value for the config, None if the argument was not given."""
        value = values[self.name]
        return (list(value) or None) if isinstance(value, tuple) else value


class Choices(click.ParamType):
    """A type that shows the allowed values in --help.

    The options model checks the value, with the same message for the command line and a file.
    """

    def __init__(self, *values: object) -> None:
        self.name = "|".join(map(str, values))

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the values, separated by |."""
        return self.name


def model_params(
    model: type[Options], prefix: str = "", shown_default: str = ""
) -> list[click.Parameter]:
    """Generate the parameters of an options model.

    Args:
        model: The options model.
        prefix: Prefix of the dotted keys of a nested model.
        shown_default: Default that --help shows for all options, instead of those of the model.
    """
    from .pipeline.common.settings import CliOption, fields_of, inner_model, value_type

    params: list[click.Parameter] = []
    settings: dict[str, Any]
    for name, field in fields_of(model).items():
        cli = next((each for each in field.metadata if isinstance(each, CliOption)), None)
        if cli is None:
            continue
        inner = inner_model(field.annotation)
        if inner is not None:
            params += model_params(inner, f"{prefix}{name}.", cli.shown or shown_default)
            continue
        annotated = value_type(field.annotation)
        kind, repeated, nargs = annotated.kind, annotated.repeated, annotated.parts
        type_: Any = Choices(*kind) if isinstance(kind, tuple) else kind
        if cli.parse is not None:
            type_, nargs = str, 1
        text = field.description or ""
        if cli.name and not cli.name.startswith("-"):
            metavar = f"{cli.name}..." if repeated else cli.name
            settings = {"nargs": -1 if repeated else 1, "metavar": metavar, "required": False}
            params.append(KeyArgument([name], key=prefix + name, text=text, type=str, **settings))
            continue
        default = (
            cli.shown
            or shown_default
            or _default_text(field.get_default(call_default_factory=True))
        )
        default = "required" if field.is_required() else default and f"default: {default}"
        settings = {"metavar": cli.metavar or None, "type": type_, "nargs": nargs}
        settings |= {"multiple": repeated if cli.repeated is None else cli.repeated}
        if type_ is bool:
            settings = {"is_flag": True, "flag_value": True, "default": None}
        elif cli.bare is not None:
            settings |= {"is_flag": False, "flag_value": cli.bare}
        settings["help"] = f"{text}  [{default}]" if default else text
        flag = cli.name or f"--{name.replace('_', '-')}"
        params.append(KeyOption([flag], key=prefix + name, cli=cli, **settings))
        for flag, metavar, part_text in cli.parts:
            params.append(click.Option([flag], multiple=True, metavar=metavar, help=part_text))
    return params


def _default_text(default: Any) -> str:
    """Return a default as --help prints it, "" for None, False and collections."""
    is_printed = isinstance(default, str | int | float | os.PathLike) and default is not False
    return str(default) if is_printed else ""


def common_params() -> list[click.Parameter]:
    """Return the options that every command has."""
    return [
        click.Option(
            ["--preset"],
            metavar="NAME",
            help="a preset of the package: demo, small, paper; for extract-targets and train-student also "
            "paper-32, flow; for train-student and finetune also transformer; for finetune also hmdb51, "
            "ucf101, scratch",
        ),
        click.Option(
            ["--config", "file"],
            metavar="FILE",
            help="a YAML file with a section per command, like those written next to results",
        ),
        click.Option(
            ["--set", "settings"],
            multiple=True,
            metavar="KEY=VALUE",
            help="set any key of the config to a YAML value; repeatable, overrides all else",
        ),
        click.Option(
            ["--json", "as_json"],
            is_flag=True,
            help="print one JSON object on standard output; everything else goes to standard error",
        ),
        click.Option(["--quiet"], is_flag=True, help="print warnings only, no progress"),
        click.Option(["--debug"], is_flag=True, help="show the traceback of an error"),
    ]


class StageCommand(click.Command):
    """A command of `COMMANDS`; its options model is imported on first use."""

    def __init__(self, name: str, command: Command, section: str) -> None:
        examples = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in command.examples)
        super().__init__(
            name,
            context_settings=SETTINGS,
            help=command.help,
            short_help=command.short,
            epilog=examples,
        )
        self.section = section

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters of the model, those common to all commands, and --help."""
        from .pipeline.common.stage_function import load

        if not self.params:
            self.params = [*model_params(load(STAGES[self.section][0])), *common_params()]
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group."""
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        group: str = "General"
        for param in self.get_params(ctx):
            if isinstance(param, KeyArgument):
                if param.text:
                    rows["Inputs"].append((param.metavar or "", param.text))
                continue
            if isinstance(param, KeyOption):
                group = param.cli.group
            elif param.name in ("preset", "help"):
                group = "General"
            if (row := param.get_help_record(ctx)) is not None:
                rows.setdefault(group, []).append(row)
        for group, lines in rows.items():
            if lines:
                with formatter.section(group):
                    formatter.write_dl(lines)

    def invoke(self, ctx: click.Context) -> None:
        """Build the config of the command and run its stage.

        The exit code is 1 if a part of the job could not be done.
        """
        from .pipeline.common.config import load_config
        from .pipeline.common.stage_function import load

        values = ctx.params
        params = [p for p in self.get_params(ctx) if isinstance(p, KeyOption | KeyArgument)]
        options = {param.key: param.config_value(values) for param in params}
        replaced = [
            key
            for param in params
            if isinstance(param, KeyOption) and options[param.key] is not None
            for key in param.replaces
        ]
        flags = {p.key: p.opts[0] if isinstance(p, KeyOption) else p.metavar or "" for p in params}
        with _console(values) as console:
            stage = load(STAGES[self.section][1])
            config = load_config(
                load(STAGES[self.section][0]),
                self.section,
                preset=values["preset"],
                file=values["file"],
                options=options,
                settings=values["settings"],
                replaced=replaced,
                flags=flags,
            )
            result = stage(config, console)
            for command in result.get("next", ()):
                console.info(f"next: {command}")
            console.result(result)
        if result.get("ok") is False or result.get("complete") is False:
            ctx.exit(1)


class StageGroup(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of a pipeline."""
        return list(self.commands)


def _group() -> StageGroup:
    group = StageGroup(
        context_settings=SETTINGS,
        help=f"Video backbones from unlabelled video (DistInit).\n\n{FLOW}\nStart with: distinit demo",
    )
    click.version_option(__version__, "-V", "--version", message="distinit %(version)s")(group)
    targets = StageGroup(
        "targets", help="Inspect, check, merge and export target stores.", short_help=TARGETS_SHORT
    )
    for name, command in COMMANDS.items():
        short_name = name.removeprefix("targets-")
        parent = group if short_name == name else targets
        parent.add_command(StageCommand(short_name, command, name))
        if parent is targets:
            group.add_command(targets)
    return group


cli = _group()


@contextlib.contextmanager
def _console(values: Mapping[str, Any]) -> Iterator[Console]:
    """Yield the console for these values of the common options.

    With --json, libraries print to standard error; the console alone writes to standard output, one
    object at the end.
    """
    from .pipeline.common.console import Console

    require_system()
    # torchrun starts the command once per process; only one writes to the screen.
    main = os.environ.get("RANK", "0") == "0"
    console = Console(json=values["as_json"] and main, quiet=values["quiet"] or not main)
    if not sys.platform.startswith("linux"):
        console.warn(
            f"distinit is tested on Linux only; on {platform.system()} decoding processes have no memory limit"
        )
    redirected = contextlib.redirect_stdout(sys.stderr)
    with redirected if values["as_json"] else contextlib.nullcontext(), console:
        yield console


def require_system() -> None:
    """Raise DistInitError if the system lacks modules that every command requires."""
    missing = [name for name in ("fcntl", "resource") if importlib.util.find_spec(name) is None]
    if missing:
        raise DistInitError(
            f"distinit requires Linux; {platform.system()} has no {' and no '.join(missing)}, which locks of stores "
            f"and limits of decoding processes require (on Windows, use WSL)"
        )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    It exits with 0 when the job is done, 2 on wrong use, 1 on failure, 130 when interrupted. An
    error is one line on standard error; --debug shows the traceback before it.
    """
    # Waiting threads of OpenMP spin by default. On cores that also do other work (decoding, another
    # job) this slows torch down manyfold, while sleeping threads have no measurable cost. Torch
    # reads the variable when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    atexit.register(_skip_final_collection)
    argv = sys.argv[1:] if argv is None else argv
    run(cli, argv)


def run(
    group: click.Group, argv: Sequence[str], resume_hints: Mapping[str, str] = RESUME_HINTS
) -> NoReturn:
    """Run a group of commands with these arguments, as `main` does."""
    with clean_streams():
        _run(group, argv, resume_hints)


def _run(group: click.Group, argv: Sequence[str], resume_hints: Mapping[str, str]) -> NoReturn:
    debug = "--debug" in argv
    try:
        code = group.main(args=list(argv), prog_name="distinit", standalone_mode=False)
        _exit(code if isinstance(code, int) else 0)
    except NO_ARGUMENTS as error:
        click.echo(error.format_message(), err=True)
        _exit(2)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context else ""
        _fail(error.format_message() + hint, error.exit_code, debug)
    except (KeyboardInterrupt, click.exceptions.Abort):
        command = next((argument for argument in argv if argument in group.commands), "")
        _fail(resume_hints.get(command, "interrupted"), INTERRUPTED, debug, prefix="")
    except BrokenPipeError:
        # The process that reads our output has ended, as in `distinit … | head`.
        sys.stderr.close()
        _exit(1)
    except Exception as error:
        if getattr(error, "shared", False) and os.environ.get("RANK", "0") != "0":
            # All processes raise the same error, and rank 0 reports it.
            _exit(explain(error)[1])
        _fail(*explain(error), debug)


def _fail(message: str, code: int, debug: bool, prefix: str = "error: ") -> NoReturn:
    from .pipeline.common.urls import hide_secrets

    if debug:
        traceback.print_exc()
    line = printable(hide_secrets(" ".join(message.split("\n"))))
    print(f"{prefix}{line}", file=sys.stderr)
    _exit(code)


def _skip_final_collection() -> None:
    """Exempt all objects from the last garbage collection, which takes up to a second."""
    # triton reports objects that are still alive when the interpreter ends.
    if "triton" not in sys.modules:
        gc.freeze()


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    sys.exit(code)
