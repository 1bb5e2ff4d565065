"""The base of all option models, and how a field of one becomes an option of the command line.

Here are also the options that several commands have.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

from .errors import UsageError

log = logging.getLogger(__name__)

Group = Literal[
    "Inputs", "Output", "Teacher", "Sampling", "Student", "Training", "Test", "Hardware"
]


class Options(BaseModel):
    """A group of options, defined next to the part that reads them. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)

    # Fields that version 0.1 did not have. At their defaults they are left out of identities and
    # digests, so that those of stored runs stay what they are.
    ADDED: ClassVar[frozenset[str]] = frozenset()

    def identity_dump(self, exclude: Any = None) -> dict[str, Any]:
        """Return the JSON-able fields that identities and digests are made of.

        Args:
            exclude: as of `model_dump`.
        """
        return _without_new_defaults(self, self.model_dump(mode="json", exclude=exclude))

    @model_validator(mode="before")
    @classmethod
    def _take_paths(cls, data: Any) -> Any:
        return {k: paths_as_text(v) for k, v in data.items()} if isinstance(data, dict) else data


def _without_new_defaults(options: Options, dumped: dict[str, Any]) -> dict[str, Any]:
    """Return a dump without the fields of `ADDED` that have their default, in nested models too."""
    kept = {}
    for name, value in dumped.items():
        own, field = getattr(options, name), type(options).model_fields[name]
        default = field.get_default(call_default_factory=True)
        if name not in options.ADDED or own != default:
            kept[name] = _without_new_defaults(own, value) if isinstance(own, Options) else value
    return kept


def paths_as_text(value: Any) -> Any:
    """Return a value with its paths as texts: from Python a path may be given for any text."""
    if isinstance(value, list | tuple):
        return type(value)(paths_as_text(each) for each in value)
    if isinstance(value, dict):
        return {key: paths_as_text(each) for key, each in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def fields_of(model: type[Options]) -> dict[str, FieldInfo]:
    """Return the fields of a model in the order of a help text: its own, then shared ones."""
    shared = {name for base in model.__bases__ for name in getattr(base, "model_fields", ())}
    return dict(sorted(model.model_fields.items(), key=lambda field: field[0] in shared))


def inner_model(annotation: Any) -> type[Options] | None:
    """Return the model that a field is, or may be; None for a field of another type."""
    branches = get_args(annotation)
    kinds = branches if type(None) in branches else (annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Options)), None)


@dataclass(frozen=True)
class ValueType:
    """What a field takes when it is given as text.

    Args:
        kind: bool, int, float or str; for choices the tuple of them.
        repeated: Whether it takes several values.
        parts: Number of words that one value has.
    """

    kind: Any
    repeated: bool = False
    parts: int = 1


def value_type(annotation: Any) -> ValueType:
    """Return what a field of this type takes on the command line and from Python."""
    values, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return value_type(values[0])
    if origin in (Union, UnionType):
        kinds = [kind for kind in values if kind is not type(None)]
        kinds = [kind for kind in kinds if len(kinds) == 1 or get_origin(kind) is not dict]
        return value_type(kinds[0]) if len(kinds) == 1 else ValueType(str)
    if origin is Literal:
        return ValueType(values)
    if origin is tuple and values[-1] is not ...:
        return ValueType(value_type(values[0]).kind, parts=len(values))
    if origin in (list, tuple):
        return ValueType(value_type(values[0]).kind, repeated=True)
    if origin is dict:
        return ValueType(str, repeated=True)
    return ValueType(annotation if annotation in (bool, int, float) else str)


@dataclass(frozen=True)
class CliOption:
    """How a field is given on the command line, as metadata of `Annotated`.

    Type, default, choices and help text come from the field itself, so that they are written once.
    On a field that is a model, only `shown` counts: it is what all options of the model show as
    their default.

    Args:
        name: with dashes, or without them for an argument; by default the name of the field.
        group: heading of the help text that the option is listed under.
        metavar: what stands for the value in the help text; by default the choices, or the type.
        shown: the default in words, where the field's own is None.
        replaces: fields of the same model whose values in a preset or file this option makes void.
        parse: makes the value of what was typed; raises ValueError with what was expected. With
            `parts` it takes the values of all of them.
        repeated: whether it may be given more than once; by default for lists and mappings.
        bare: the value of the option given without one.
        parts: further options that fill the same field, each with its own help text.
    """

    name: str = ""
    group: Group = "Inputs"
    metavar: str = ""
    shown: str = ""
    replaces: tuple[str, ...] = ()
    parse: Callable[..., Any] | None = None
    repeated: bool | None = None
    bare: str | None = None
    parts: tuple[tuple[str, str, str], ...] = ()


def parse_pairs(values: tuple[str, ...]) -> dict[str, str]:
    """Read `NAME=VALUE`, repeated. ValueError without `=`, or for a name that is given twice."""
    result: dict[str, str] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"expected NAME=VALUE, got {text!r}")
        if name in result:
            raise ValueError(f"{name!r} is given twice")
        result[name] = value
    return result


def parse_numbers(text: str) -> list[float]:
    """Read `1,1.5` as [1.0, 1.5]. Raises ValueError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"expected numbers, as in 1,1.5, got {text!r}") from None


def parse_size(text: str) -> list[int]:
    """Read `128x171` as [128, 171]. Raises ValueError."""
    height, times, width = text.lower().partition("x")
    if not (times and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"expected HEIGHTxWIDTH, as in 128x171, got {text!r}")
    return [int(height), int(width)]


# Fields that several commands have, so that they look alike in each.
DEVICE = CliOption(group="Hardware", metavar="DEVICE")
DEVICE_HELP = "auto, cpu, cuda or cuda:N"
MAX_HOURS = CliOption(group="Output", metavar="H", shown="warn of more than 24 hours")
MAX_HOURS_HELP = "refuse what is estimated to take longer, before it starts"
VIDEO_ROOTS = CliOption("--videos", "Inputs", "CORPUS=DIR", parse=parse_pairs)
VIDEO_ROOTS_HELP = "where a corpus of the store is located now; repeatable"


class ClusterOptions(Options):
    """Where work is done side by side: in dask workers of this machine, or of a cluster."""

    workers: Annotated[int | None, CliOption(group="Hardware", metavar="N")] = Field(
        None,
        ge=1,
        description="use N dask worker processes, one per GPU on a machine with several",
    )
    scheduler: Annotated[str | None, CliOption(group="Hardware", metavar="ADDRESS")] = Field(
        None, description="work on an existing dask.distributed cluster"
    )

    @model_validator(mode="after")
    def _one_cluster(self) -> Self:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError(
                "give --workers (a local cluster) or --scheduler (an existing one), not both"
            )
        return self


class DecodingOptions(Options):
    """Limits of decoding processes, and when a run of failing videos ends."""

    timeout_s: Annotated[float, CliOption("--timeout", "Hardware", "S")] = Field(
        120, gt=0, description="seconds without progress after which a video fails"
    )
    memory_gb: Annotated[float, CliOption("--memory", "Hardware", "GB")] = Field(
        4.0, ge=0.1, description="memory for decoding, per process"
    )
    max_failures: Annotated[int, CliOption(metavar="N")] = Field(
        100,
        ge=0,
        le=10_000,
        description="stop when the first N videos (or all, if fewer) fail for one reason; 0: never",
    )
    retry_failed: Annotated[bool, CliOption()] = Field(
        False, description="retry the videos that failed before"
    )


# What takes longer than a day is more often a mistake than meant: without a limit it is warned of.
LONG_HOURS = 24.0


def describe_hours(hours: float) -> str:
    """Return a duration in the unit that reads best.

    Example:
        >>> describe_hours(0.5), describe_hours(30), describe_hours(72)
        ('30.0 min', '30.0 hours', '3.0 days')
    """
    if hours >= 2 * 365 * 24:
        return f"{hours / 24 / 365:,.0f} years"
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} min"


def limit_of(max_hours: float | None) -> float:
    """Return the hours that something may take: the limit given, or those that are no surprise."""
    return LONG_HOURS if max_hours is None else max_hours


def check_hours(hours: float, max_hours: float | None, what: str, remedy: str) -> None:
    """Refuse what is estimated to take more than `max_hours`; without a limit warn of LONG_HOURS.

    Args:
        hours: The estimate.
        max_hours: The limit of the user.
        what: The subject of the message.
        remedy: What to type for less.

    Raises:
        UsageError: It takes more than `max_hours`.
    """
    if hours <= limit_of(max_hours):
        return
    takes = f"{what} takes about {describe_hours(hours)}"
    if max_hours is not None:
        raise UsageError(
            f"--max-hours {max_hours:g}: {takes}; {remedy}; a larger --max-hours allows it"
        )
    log.warning(
        f"{takes}, more than {LONG_HOURS:g} hours; {remedy}; --max-hours H refuses what takes longer"
    )
