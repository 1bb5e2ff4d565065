"""The base of all option models, and the command-line form of their fields.

Options that several commands share are defined here as well.
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
    # digests, so that those of stored runs do not change.
    ADDED: ClassVar[frozenset[str]] = frozenset()

    def identity_dump(self, exclude: Any = None) -> dict[str, Any]:
        """Return the fields of identities and digests, in JSON's types.

        Args:
            exclude: Fields to leave out, as in `model_dump`.
        """
        return _without_new_defaults(self, self.model_dump(mode="json", exclude=exclude))

    @model_validator(mode="before")
    @classmethod
    def _take_paths(cls, data: Any) -> Any:
        return {k: paths_as_text(v) for k, v in data.items()} if isinstance(data, dict) else data


def _without_new_defaults(options: Options, dumped: dict[str, Any]) -> dict[str, Any]:
    """Return a dump without the fields of `ADDED` that have their default, in nested models too."""
    result = {}
    for name, dumped_value in dumped.items():
        value, field = getattr(options, name), type(options).model_fields[name]
        default = field.get_default(call_default_factory=True)
        if name not in options.ADDED or value != default:
            nested = isinstance(value, Options)
            result[name] = _without_new_defaults(value, dumped_value) if nested else dumped_value
    return result


def paths_as_text(value: Any) -> Any:
    """Return a value with its paths as strings: Python callers may pass a path for any string."""
    if isinstance(value, list | tuple):
        return type(value)(paths_as_text(each) for each in value)
    if isinstance(value, dict):
        return {key: paths_as_text(each) for key, each in value.items()}
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def fields_of(model: type[Options]) -> dict[str, FieldInfo]:
    """Return the fields of a model in the order of help texts: its own, then inherited ones."""
    shared = {name for base in model.__bases__ for name in getattr(base, "model_fields", ())}
    return dict(sorted(model.model_fields.items(), key=lambda field: field[0] in shared))


def inner_model(annotation: Any) -> type[Options] | None:
    """Return the options model in a field's type (alone or with None), None for other types."""
    branches = get_args(annotation)
    kinds = branches if type(None) in branches else (annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Options)), None)


@dataclass(frozen=True)
class ValueType:
    """The type of a field whose value is given as text.

    Args:
        kind: bool, int, float or str; for choices the tuple of them.
        repeated: Whether the field takes several values.
        parts: Number of words in one value.
    """

    kind: Any
    repeated: bool = False
    parts: int = 1


def value_type(annotation: Any) -> ValueType:
    """Return the type of the text of a field with this annotation."""
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
    """The command-line form of a field, as metadata of `Annotated`.

    Type, default, choices and help text come from the field itself, so that they are written once.
    On a field that is a model, only `shown` counts: all options of the model show it as their
    default.

    Args:
        name: With dashes, or without them for an argument; by default the name of the field.
        group: Heading in the help text under which the option is listed.
        metavar: Placeholder for the value in the help text; by default the choices, or the type.
        shown: The default in words, for a field whose default is None.
        replaces: Fields of the same model whose values in a preset or file this option makes void.
        parse: Turns the typed text into the value; raises ValueError with the expected form. With
            `parts` it takes the texts of all of them.
        repeated: Whether it may be given more than once; by default for lists and mappings.
        bare: The value of the option if it is given without one.
        parts: Further options that set the same field: (flag, metavar, help text).
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
    """Read `NAME=VALUE`, repeated.

    Raises:
        ValueError: A text has no `=`, or two have the same name.
    """
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
MAX_HOURS_HELP = "refuse to start if the estimated time is longer"
VIDEO_ROOTS = CliOption("--videos", "Inputs", "CORPUS=DIR", parse=parse_pairs)
VIDEO_ROOTS_HELP = "where a corpus of the store is located now; repeatable"


class ClusterOptions(Options):
    """Options of parallel work in dask workers, on this machine or on a cluster."""

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
    """Limits of decoding processes, and of videos that fail."""

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


# Work of more than a day is more often a mistake than intended: it is logged as a
# warning if the user gives no limit.
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
    """Return the limit of the user, or the hours above which a warning is logged."""
    return LONG_HOURS if max_hours is None else max_hours


def check_hours(hours: float, max_hours: float | None, work: str, remedy: str) -> None:
    """Refuse work of more than `max_hours`; without a limit, warn of more than LONG_HOURS.

    Args:
        hours: The estimate.
        max_hours: The limit of the user.
        work: Name of the work, as in "this extraction".
        remedy: How to shorten it.

    Raises:
        UsageError: The estimate is more than `max_hours`.
    """
    if hours <= limit_of(max_hours):
        return
    estimate = f"{work} takes about {describe_hours(hours)}"
    if max_hours is not None:
        raise UsageError(
            f"--max-hours {max_hours:g}: {estimate}; {remedy}; a larger --max-hours allows it"
        )
    log.warning(
        f"{estimate}, more than {LONG_HOURS:g} hours; {remedy}; --max-hours H refuses longer work"
    )
