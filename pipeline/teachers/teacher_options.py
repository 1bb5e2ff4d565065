"""Which teacher, as the user asks for it. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ..common.errors import UsageError
from ..common.settings import Options
from ..store.frame_views import CENTER, OutputView, check_views
from ..store.store_options import Output

EngineName = Literal["auto", "torch", "compile", "onnx"]
"""What runs a teacher, as the user asks for it."""

OUTPUTS: tuple[Output, ...] = get_args(Output)


class TeacherSpec(Options):
    """A teacher as the user asked for it; small and picklable, so that each worker loads its own.

    `options` are distinit's own, which any teacher takes: `name` (its name in the store), `classes`
    (a file with one class name per line), `input_size` (side of the centre crop), `resize` (short
    side, or HEIGHTxWIDTH), `interpolation`, `resize_backend` (swscale, or pil: the resize of image
    libraries), `mean` and `std` (of pixels in 0–1, one number or three). All others are keyword
    arguments of the model's builder.
    """

    name: str
    weights: str | None = None
    """A checkpoint file in place of the library's weights."""
    sha256: str | None = None
    """Expected digest of the weights file, or of the loaded state if the weights have no file."""
    outputs: tuple[Output, ...] = ("logits",)
    """What is taken of a forward pass: logits, features or both."""
    views: tuple[str, ...] = (CENTER,)
    """Views of a frame that are stored: center, grid:G (cells of features), flip (mirrored)."""
    options: dict[str, str] = {}
    fetch: bool = Field(default=True, exclude=True)
    """Whether weights that this machine lacks may be downloaded."""

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
                f"--views {','.join(self.views)}: teacher {self.name!r}: cells are of features, "
                f"which --teacher-output features asks for; it is {','.join(self.outputs)}"
            )
        return self

    def record(self, key: str = "logits") -> dict[str, Any]:
        """Return what a store records: enough to load one output again, without local folders.

        `weights` loses its folder and `classes` is left out: the store has the names.
        """
        options = {key: value for key, value in self.options.items() if key != "classes"}
        weights = Path(self.weights).name if self.weights is not None else None
        record: dict[str, Any] = {
            "name": self.name,
            "weights": weights,
            "sha256": self.sha256,
            "options": options,
        }
        # The record of logits is that of version 0.1, which has no other output.
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
    """Make config values of `--teacher` and what belongs to it; None when no teacher was given.

    `NAME=logits,features`, `NAME=center,flip`, `NAME:key=value`, `NAME=FILE` and `NAME=DIGEST` name
    the teacher; with one teacher NAME may be left out.

    Raises:
        UsageError: A name is no `--teacher`, or is missing where it is needed; another output.
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

    for text in outputs:
        name, _, value = text.rpartition("=")
        asked = value.split(",")
        if not set(asked) <= set(OUTPUTS):
            raise UsageError(
                f"--teacher-output {text}: the output is {value!r}, allowed: logits, features, logits,features"
            )
        spec(name, f"--teacher-output {text}")["outputs"] = asked
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
            # A file name may hold "=": what stands before it is a teacher's name or part of the
            # file's.
            name, equals, value = text.partition("=")
            named = equals != "" and (name in specs or field == "sha256")
            spec(name if named else "", f"{option} {text}")[field] = value if named else text
    return list(specs.values()) or None
