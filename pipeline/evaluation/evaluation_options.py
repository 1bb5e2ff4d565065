"""Options of `evaluate`, `predict`, `embed`, `targets probe` and `targets compare`. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..common.errors import UsageError
from ..common.settings import (
    DEVICE,
    DEVICE_HELP,
    VIDEO_ROOTS,
    VIDEO_ROOTS_HELP,
    CliOption,
    Options,
    parse_numbers,
)
from ..common.urls import StoreAddress

# Text of an option for all cached frames of a video.
ALL_FRAMES = "all"
FrameOrder = Literal["ordered", "shuffled", "frozen"]
PARTIAL_HELP = (
    "accept videos without a label, and labels without a video, which count as wrong in the test"
)
COPIES_HELP = "folder of `distinit prepare`: clips are read from its copies of the videos"


class EvaluationOptions(Options):
    """How videos are tested.

    `clips`, `crops`, `scores` and `frames` are the protocol; the other options change scores by
    rounding at most. `frames` tests the use of motion: `shuffled` puts the frames of each clip into
    a random order, `frozen` repeats its middle frame. A model that uses no motion has the same
    accuracy with both as with `ordered`.
    """

    clips: Annotated[int, CliOption("--test-clips", "Test", "N")] = Field(
        default=10, ge=1, description="clips per video, evenly spread"
    )
    crops: Annotated[Literal[1, 3], CliOption("--test-crops", "Test")] = Field(
        default=1, description="crops per clip: the middle, or three along the longer side"
    )
    scores: Annotated[Literal["softmax", "logits"], CliOption("--test-scores", "Test")] = Field(
        default="softmax", description="scores that are averaged over a video's clips"
    )
    frames: Annotated[FrameOrder, CliOption("--test-frames", "Test")] = Field(
        default="ordered",
        description="order of a clip's frames: as they are, shuffled, or its middle frame repeated",
    )
    batch_size: int = Field(default=32, ge=1, description="clips per forward pass")
    workers: int | None = Field(
        default=None, ge=0, description="loader processes; default depending on the machine"
    )

    def protocol(self) -> dict[str, Any]:
        """Return the options that change scores."""
        return self.model_dump(include={"clips", "crops", "scores", "frames"})


class EvaluateConfig(Options):
    """All options of `distinit evaluate`; missing ones are taken from the tested run."""

    runs: Annotated[list[str], CliOption("RUN")] = Field(
        min_length=1,
        description="a folder or model.safetensors of distinit finetune; several to fuse or compare",
    )
    fuse: Annotated[bool, CliOption()] = Field(
        default=False, description="late fusion of the runs' saved predictions, into --out"
    )
    weights: Annotated[
        list[float] | None,
        CliOption(metavar="W,W", parse=parse_numbers, repeated=False, shown="equal"),
    ] = Field(default=None, description="weight of each fused run")
    compare: Annotated[bool, CliOption()] = Field(
        default=False,
        description="gain of the first run over the second, per class, with p-values",
    )
    dataset: Annotated[str | None, CliOption(metavar="NAME", shown="the run's")] = Field(
        default=None, description="as for finetune"
    )
    root: Annotated[str | None, CliOption(metavar="DIR", shown="the run's")] = Field(
        default=None, description="folder of the videos"
    )
    split: Annotated[int | Literal["all"] | None, CliOption(metavar="N|all", shown="the run's")] = (
        Field(default=None, description="which split")
    )
    partial: Annotated[bool | None, CliOption(shown="the run's")] = Field(
        default=None, description=PARTIAL_HELP
    )
    copies: Annotated[str | None, CliOption(metavar="DIR", shown="the run's")] = Field(
        default=None, description=COPIES_HELP
    )
    out: Annotated[str | None, CliOption(group="Output", metavar="DIR", shown="the run's")] = Field(
        default=None, description="the folder to write"
    )
    factory: str | None = Field(
        default=None, description="package.module:factory that the model's file may run"
    )
    device: Annotated[str, DEVICE] = Field(default="auto", description=DEVICE_HELP)
    gpus: Annotated[int, CliOption(group="Hardware", metavar="N")] = Field(
        default=1,
        ge=1,
        description="processes on this machine, one per GPU; on several machines use torchrun",
    )
    test: Annotated[EvaluationOptions | None, CliOption(shown="the run's")] = None

    @model_validator(mode="after")
    def _check_runs(self) -> EvaluateConfig:
        if self.fuse and self.compare:
            raise UsageError(
                "--fuse and --compare exclude each other; --compare accepts the folder of --fuse --out"
            )
        if self.compare and len(self.runs) != 2:
            raise UsageError(f"--compare: expected two runs, got {len(self.runs)}")
        if self.fuse and len(self.runs) < 2:
            raise UsageError("--fuse: expected two or more runs, got 1")
        if len(self.runs) > 1 and not (self.fuse or self.compare):
            raise UsageError(f"{len(self.runs)} runs require --fuse or --compare")
        if self.weights is not None and not self.fuse:
            raise UsageError("--weights requires --fuse")
        return self


class PredictConfig(Options):
    """All options of `distinit predict`."""

    model: Annotated[str, CliOption("MODEL")] = Field(
        description="a run folder or model.safetensors of distinit finetune"
    )
    sources: Annotated[list[str], CliOption("VIDEO")] = Field(
        min_length=1, description="videos, folders, globs, lists"
    )
    out: Annotated[str | None, CliOption(group="Output", metavar="FILE", shown="none")] = Field(
        default=None, description="also write the predictions: .csv, .json or .parquet"
    )
    top: Annotated[int, CliOption(group="Output", metavar="N")] = Field(
        default=5, ge=1, description="classes shown per video, the best first"
    )
    factory: str | None = Field(
        default=None, description="package.module:factory that the model's file may run"
    )
    device: Annotated[str, DEVICE] = Field(default="auto", description=DEVICE_HELP)
    test: Annotated[EvaluationOptions, CliOption()] = Field(default_factory=EvaluationOptions)


class EmbedConfig(Options):
    """All options of `distinit embed`."""

    model: Annotated[str, CliOption("MODEL")] = Field(
        description="a run folder or a safetensors file of train-student or finetune"
    )
    sources: Annotated[list[str], CliOption("VIDEO")] = Field(
        min_length=1, description="videos, folders, globs, lists"
    )
    out: Annotated[str, CliOption(group="Output", metavar="FILE")] = Field(
        description="the file of features to write: .h5, .hdf5 or .npz"
    )
    clips: Annotated[int, CliOption(group="Sampling", metavar="N")] = Field(
        default=10, ge=1, description="clips per video, evenly spread"
    )
    crops: Annotated[Literal[1, 3], CliOption(group="Sampling")] = Field(
        default=1, description="crops per clip: the middle, or three along the longer side"
    )
    per_clip: Annotated[bool, CliOption(group="Output")] = Field(
        default=False, description="keep a feature per clip and crop instead of their mean"
    )
    batch_size: int = Field(default=32, ge=1, description="clips per forward pass")
    workers: int | None = Field(
        default=None, ge=0, description="loader processes; default depending on the machine"
    )
    factory: str | None = Field(
        default=None, description="package.module:factory that the model's file may run"
    )
    device: Annotated[str, DEVICE] = Field(default="auto", description=DEVICE_HELP)


class ProbeConfig(Options):
    """Options of `distinit targets probe`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    dataset: Annotated[str, CliOption(metavar="NAME")] = Field(
        description="csv:FILE with columns path, label and optionally source and splitN; folder:DIR "
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
        description="numbers of evenly spread cached frames per video to average outputs over",
    )
    sample: Annotated[int, CliOption(group="Sampling", metavar="N")] = Field(
        default=5000, ge=2, description="maximum number of videos, drawn at random with --seed"
    )
    folds: Annotated[int, CliOption(group="Test", metavar="N")] = Field(
        default=5, ge=2, description="number of folds; no two share a source"
    )
    seed: Annotated[int, CliOption(group="Test", metavar="S")] = Field(
        default=0, ge=0, description="seed of the folds and the sample"
    )
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )

    @model_validator(mode="after")
    def _check_frames(self) -> ProbeConfig:
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


class CompareConfig(Options):
    """Options of `distinit targets compare`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    out: Annotated[str | None, CliOption(group="Output", metavar="DIR")] = Field(
        default=None, description="the folder for compare.html, a page with pictures"
    )
    teachers: Annotated[
        tuple[str, ...] | None, CliOption("--teacher", "Teacher", "NAME", shown="all")
    ] = Field(default=None, description="compare this teacher of the store; repeatable")
    videos: Annotated[int, CliOption("--disputed", "Output", "N")] = Field(
        default=10,
        ge=0,
        description="number of videos to list, those on which the teachers disagree most",
    )
    sample: Annotated[int, CliOption(group="Sampling", metavar="N")] = Field(
        default=5000, ge=3, description="maximum number of cached frames"
    )
    seed: Annotated[int, CliOption(group="Sampling", metavar="S")] = Field(
        default=0, ge=0, description="seed of the sample"
    )
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )
