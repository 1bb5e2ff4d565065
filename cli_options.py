"""Options of the command line that fill keys of a config, and those that all commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class KeyOption(click.Option):
    """An option that fills one key of the command's config.

    It has no default of its own: not given, the preset, the file or the model decides. `shown` is
    the model's default as --help prints it (a test holds the two together: reading the model here
    would import torch for a help text). `replaces` are keys of a preset or file that it makes void;
    `convert` makes the config's value of what was typed, given that and the option's name.
    """

    def __init__(
        self,
        *args: Any,
        key: str,
        shown: object = None,
        replaces: tuple[str, ...] = (),
        convert: Callable[[Any, str], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if shown is not None:
            kwargs["help"] = f"{kwargs.get('help', '')}  [default: {shown}]"
        super().__init__(*args, **kwargs)
        self.key = key
        self.shown = shown
        self.replaces = replaces
        self.convert = convert

    def config_value(self, typed: Any) -> Any:
        """The value for the config; None if the option was not given (click: None or an empty
        tuple)."""
        if typed is None or typed == ():
            return None
        if self.convert is not None:
            return self.convert(typed, self.opts[0])
        return list(typed) if isinstance(typed, tuple) else typed


class KeyArgument(click.Argument):
    """An argument that fills one key of the command's config."""

    def __init__(self, *args: Any, key: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.key = key

    def config_value(self, typed: Any) -> Any:
        """The value for the config; None if nothing was given."""
        return (list(typed) or None) if isinstance(typed, tuple) else typed


class Choices(click.ParamType):
    """Shows the usual values in --help and leaves the check to the config, whose message is the
    same wherever the value came from."""

    def __init__(self, *values: str) -> None:
        self.values = values
        self.name = "|".join(values)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return self.name


def key_option(*names: str, key: str, **kwargs: Any) -> Callable[[F], F]:
    """`click.option` for a config key; see KeyOption."""
    return click.option(*names, cls=KeyOption, key=key, **kwargs)


def key_flag(*names: str, key: str, **kwargs: Any) -> Callable[[F], F]:
    """A flag for a config key: given it is True, not given the config decides."""
    return click.option(
        *names, cls=KeyOption, key=key, is_flag=True, flag_value=True, default=None, **kwargs
    )


def key_argument(name: str, *, key: str, **kwargs: Any) -> Callable[[F], F]:
    """`click.argument` for a config key."""
    return click.argument(name, cls=KeyArgument, key=key, **kwargs)


def examples(*lines: str) -> str:
    """An epilog that keeps its lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def config_options(command: F) -> F:
    """--preset, --config and --set."""
    for option in (
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Set any key of the config; the value is YAML. Repeatable, wins over all else.",
        ),
        click.option(
            "--config",
            "file",
            metavar="FILE",
            help="A YAML file with a section a command, as the ones written beside results.",
        ),
        click.option(
            "--preset",
            metavar="NAME",
            help="A preset that ships: demo, small, paper; of train-student also paper-32, flow; of finetune also "
            "hmdb51, ucf101, scratch.",
        ),
    ):
        command = option(command)
    return command


def decoding_options(command: F) -> F:
    """--memory and --max-failures, of commands that decode whole corpora."""
    for option in (
        key_option(
            "--max-failures",
            key="max_failures",
            shown=100,
            type=int,
            metavar="N",
            help="Stop where the first N videos, or all of fewer, fail for one reason; 0: never.",
        ),
        key_option(
            "--memory",
            key="memory_gb",
            shown=4.0,
            type=float,
            metavar="GB",
            help="Memory for decoding, each process.",
        ),
    ):
        command = option(command)
    return command


def screen_options(command: F) -> F:
    """--json, --quiet and --debug."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", is_flag=True, help="No lines and no progress, warnings only."),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            help="End with one JSON object on standard output; all else goes to standard error.",
        ),
    ):
        command = option(command)
    return command


LOOP_OPTIONS: tuple[tuple[str, Any, str, str], ...] = (
    ("epochs", int, "N", "Epochs, counted in clips."),
    ("epoch-clips", int, "N", "Clips an epoch; by default one a video."),
    ("batch-size", int, "B", "Clips a step, over all GPUs."),
    (
        "gpu-batch-size",
        int,
        "B",
        "Most clips a GPU takes at once; of more the gradients are accumulated.",
    ),
    ("gpus", int, "N", "Processes on this machine, one a GPU; on several machines use torchrun."),
    ("lr", float, "X", "Learning rate after the warm-up."),
    (
        "lr-batch-size",
        int,
        "B",
        "Clips a step that --lr is meant for; by default it is not scaled.",
    ),
    ("momentum", float, "X", "Momentum of Nesterov's SGD."),
    ("weight-decay", float, "X", "Weight decay."),
    ("warmup-epochs", int, "N", "Epochs of linear warm-up."),
    ("step-epochs", int, "N", "Epochs between drops of the rate."),
    ("gamma", float, "X", "Factor of each drop."),
    ("clip-norm", float, "X", "Largest norm of the gradient; by default it is not clipped."),
    ("precision", Choices("fp32", "bf16"), "", "What the student computes in."),
    ("device", str, "DEVICE", "auto, cpu, cuda or cuda:N."),
    (
        "workers",
        int,
        "N",
        "Loader processes, by default by the machine; any number gives the same clips.",
    ),
    ("seed", int, "N", "Seed of every draw."),
    ("log-every", int, "N", "Steps between log lines."),
    ("checkpoint-every", int, "N", "Steps between checkpoints; the end of an epoch always is one."),
)


def student_options(**shown: object) -> Callable[[F], F]:
    """Which student; `shown` are the defaults that --help prints."""
    options = (
        key_option(
            "--student",
            key="student.architecture",
            shown=shown.get("architecture"),
            type=Choices("r2plus1d_18", "r3d_18"),
            help="The backbone; also r2plus1d_34, r3d_34, mc3_18, torchvision's s3d and others, module:factory.",
        ),
        key_option(
            "--variant",
            key="student.variant",
            shown=shown.get("variant"),
            type=Choices("torchvision", "vmz"),
            help="R(2+1)D's middle width: once a block, or once a convolution as in the paper's code.",
        ),
        key_option(
            "--width",
            key="student.width",
            shown=shown.get("width"),
            type=float,
            metavar="X",
            help="Factor on every number of channels.",
        ),
        key_option(
            "--frames",
            key="clips.length",
            shown=shown.get("length"),
            type=int,
            metavar="T",
            help="Frames of a clip.",
        ),
        key_option(
            "--size",
            key="clips.size",
            shown=shown.get("size"),
            type=int,
            metavar="PX",
            help="Side of a clip's crop.",
        ),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def loop_options(**shown: object) -> Callable[[F], F]:
    """What stages two and three are told about training; `shown` are the defaults that --help
    prints."""

    def add(command: F) -> F:
        command = key_option(
            "--resume",
            key="resume",
            is_flag=False,
            flag_value="true",
            metavar="[auto]",
            help="Go on from the last checkpoint of --out; with `auto` also where there is no run yet.",
        )(command)
        for name, kind, metavar, text in reversed(LOOP_OPTIONS):
            key = name.replace("-", "_")
            option = key_option(
                f"--{name}",
                key=f"loop.{key}",
                shown=shown.get(key),
                type=kind,
                metavar=metavar or None,
                help=text,
            )
            command = option(command)
        return command

    return add
