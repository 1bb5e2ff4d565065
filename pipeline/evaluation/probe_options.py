"""Options of `distinit targets probe`. Imports neither torch nor scikit-learn."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..common.settings import VIDEO_ROOTS, VIDEO_ROOTS_HELP, CliOption, Options
from ..common.urls import StoreAddress

ALL_FRAMES = "all"


class ProbeConfig(Options):
    """Options of `distinit targets probe`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    dataset: Annotated[str, CliOption(metavar="NAME")] = Field(
        description="csv:FILE with columns path, label and perhaps source and splitN; folder:DIR "
        "with train/CLASS and test/CLASS; kinetics:FILE; hmdb51; ucf101"
    )
    root: Annotated[str | None, CliOption(metavar="DIR")] = Field(
        default=None, description="folder of the videos of hmdb51, ucf101, kinetics: or csv:"
    )
    split: Annotated[int | None, CliOption(metavar="N", shown="folds of all labelled videos")] = (
        Field(default=None, ge=1, description="train and test on the sides of this split")
    )
    teachers: Annotated[
        tuple[str, ...] | None, CliOption("--teacher", "Teacher", "NAME", shown="all")
    ] = Field(default=None, description="probe this teacher of the store; repeatable")
    frames: Annotated[str, CliOption("--frames", "Sampling", "N,N,all")] = Field(
        default="1,2,6,all",
        description="numbers of cached frames per video, evenly spread, whose outputs are averaged",
    )
    sample: Annotated[int, CliOption(group="Sampling", metavar="N")] = Field(
        default=5000, ge=2, description="most videos used, drawn at random by --seed"
    )
    folds: Annotated[int, CliOption(group="Test", metavar="N")] = Field(
        default=5, ge=2, description="folds, none of which shares a source with another"
    )
    seed: Annotated[int, CliOption(group="Test", metavar="S")] = Field(
        default=0, ge=0, description="seed of the folds and the sample"
    )
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )

    @model_validator(mode="after")
    def _check(self) -> ProbeConfig:
        self.frame_counts()
        return self

    def frame_counts(self) -> tuple[int | None, ...]:
        """Return the numbers of frames per video, None for all."""
        parts = [part.strip() for part in self.frames.split(",")]
        for part in parts:
            if part != ALL_FRAMES and not (part.isascii() and part.isdigit() and int(part) > 0):
                raise ValueError(
                    f"frames: expected numbers ≥ 1 or {ALL_FRAMES}, as in 1,6,all, got {part!r}"
                )
        counts = (None if part == ALL_FRAMES else int(part) for part in parts)
        return tuple(dict.fromkeys(counts))
