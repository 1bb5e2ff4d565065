"""Options of teachers. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ..common.errors import UsageError
from ..common.settings import Options
from ..store.frame_views import CENTER, OutputView, check_views
from ..store.store_options import Output

EngineName = Literal["auto", "torch", "compile", "onnx"]
"""The engine of a teacher, as a value of the option `--engine`."""

OUTPUTS: tuple[Output, ...] = get_args(Output)


class TeacherSpec(Options):
    """The options of a teacher; small and picklable, so that each worker can load it.

    These `options` are allowed for any teacher: `name` (its name in the store), `classes` (a file
    with one class name per line), `input_size` (side of the centre crop), `resize` (short side, or
    HEIGHTxWIDTH), `interpolation`, `resize_backend` (swscale, or pil: the resize of image
    libraries), `mean` and `std` (of pixels in 0–1, one number or three). All others are keyword
    arguments of the model's builder.
    """

    name: str
    weights: str | None = None
    """A checkpoint file in place of the library's weights."""
    sha256: str | None = None
    """Expected digest of the weights file, or of the loaded state if the weights have no file."""
    outputs: tuple[Output, ...] = ("logits",)
    """The outputs to store: logits, features or both."""
    views: tuple[str, ...] = (CENTER,)
    """The views of a frame to store: center, grid:G (cells of features), flip (mirrored)."""
    options: dict[str, str] = {}
    fetch: bool = Field(default=True, exclude=True)
    """Whether weights that this machine does not have may be downloaded."""

    @field_validator("outputs")
    @classmethod
    def _each_once(cls, outputs: tuple[Output, ...]) -> tuple[Output, ...]:
        if not outputs:
            raise ValueError(f"no output; allowed: {', '.join(OUTPUTS)} or both")
        return tuple(output for output in OUTPUTS if output in outputs)

    @field_validator("views")
    @classmethod
    def _in_order(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        return check_views(views)

    @model_validator(mode="after")
    def _cells_of_features(self) -> TeacherSpec:
        if "features" not in self.outputs and any(view.startswith("grid") for view in self.views):
            raise UsageError(
                f"--views {','.join(self.views)}: teacher {self.name!r}: cells require "
                f"--teacher-output features; it is {','.join(self.outputs)}"
            )
        return self

    def record(self, key: str = "logits") -> dict[str, Any]:
        """Return the record of one output in a store, from which it can be loaded again.

        It has no local folders: `weights` is the name of the file alone, and `classes` is left out,
        since the store has the class names.
        """
        options = {key: value for key, value in self.options.items() if key != "classes"}
        weights = Path(self.weights).name if self.weights is not None else None
        record: dict[str, Any] = {
            "name": self.name,
            "weights": weights,
            "sha256": self.sha256,
            "options": options,
        }
        # The record of logits is the same as in version 0.1, which has no other output.
        view = OutputView.of(key)
        if view.output != "logits":
            record["outputs"] = [view.output]
        if view.views != (CENTER,):
            record["views"] = list(view.views)
        return record


def parse_teachers(
    names: tuple[str, ...],
    options: tuple[str, ...],
    weights: tuple[str, ...],
    sha256: tuple[str, ...],
    outputs: tuple[str, ...] = (),
    views: tuple[str, ...] = (),
) -> list[dict[str, Any]] | None:
    """Return the config values of `--teacher` and its other options; None without a teacher.

    The values `NAME=logits,features`, `NAME=center,flip`, `NAME:key=value`, `NAME=FILE` and
    `NAME=DIGEST` start with the name of the teacher, which may be left out if there is only one.

    Raises:
        UsageError: A name is not that of a `--teacher` option, or is missing with several teachers;
            or an output is not allowed.
    """
    specs: dict[str, dict[str, Any]] = {name: {"name": name} for name in names}

    def spec(name: str, option: str) -> dict[str, Any]:
        if name in specs:
            return specs[name]
        if not name and len(specs) == 1:
            return next(iter(specs.values()))
        allowed = ", ".join(specs) or "none is given"
        problem = f"teacher {name!r} is not among" if name else "name the teacher, one of"
        raise UsageError(f"{option}: {problem} the --teacher options: {allowed}")

    for text in outputs:
        name, _, value = text.rpartition("=")
        teacher_outputs = value.split(",")
        if not set(teacher_outputs) <= set(OUTPUTS):
            raise UsageError(
                f"--teacher-output {text}: the output is {value!r}, allowed: logits, features, logits,features"
            )
        spec(name, f"--teacher-output {text}")["outputs"] = teacher_outputs
    for text in views:
        name, _, value = text.rpartition("=")
        spec(name, f"--views {text}")["views"] = list(check_views(value.split(",")))
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
            # A file name may contain "=", so that the text before it is the name of a teacher or
            # part of the file name.
            name, equals, value = text.partition("=")
            has_name = equals != "" and (name in specs or field == "sha256")
            spec(name if has_name else "", f"{option} {text}")[field] = value if has_name else text
    return list(specs.values()) or None
