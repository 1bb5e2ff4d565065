"""What `distinit train-student` can be told. Free of torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from ..clips.clip_options import ClipView
from ..common.settings import VIDEO_ROOTS, VIDEO_ROOTS_HELP, CliOption, Options
from ..common.urls import StoreAddress
from ..students.student_options import HeadKind, StudentOptions
from .loop_options import RESUME, RESUME_HELP, LoopOptions, Resume


class ClipOptions(ClipView):
    """The clips that the student sees: `length` consecutive frames, resized, cropped and
    mirrored."""

    clip_frames: Annotated[int, CliOption("--frames", "Sampling", "T")] = Field(
        default=8, ge=1, description="frames per clip"
    )

    @model_validator(mode="after")
    def _check(self) -> ClipOptions:
        self.frame_view()  # ValueError where the crop does not fit into the resize
        return self


Share = Annotated[float, Field(gt=0, le=1)]


class TargetOptions(Options):
    """How targets are made of what the store holds; none of it touches the store.

    `max_entropy`: nats, one number for all teachers or one by name; or `max_entropy_quantile`: the
    share of draws that a head keeps, likewise, measured on the sampler itself and saved in nats. At
    most one of the two.
    `corpora`: those to draw from, each with its share of the clips, in any unit; all videos alike
        if not given.
    `loss_weights`: factors of the teachers' losses, 1 for those not named.
    With `loss=squared-error` use a tenth of the learning rate (the paper, section 4.2).
    """

    teachers: Annotated[
        tuple[str, ...] | None, CliOption("--teacher", "Teacher", "NAME", shown="all")
    ] = Field(default=None, description="learn from this teacher of the store; repeatable")
    loss_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="teacher: factor of its loss; default 1"
    )
    corpora: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="corpus: its share of the clips; default all videos alike"
    )
    picks: Annotated[
        str, CliOption(group="Sampling", metavar="center|random|random:N|uniform:N")
    ] = Field(
        default="random",
        description="which cached frames of a clip make its target; logits of several are averaged",
    )
    tau: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=1.0, gt=0, description="temperature of the targets (eq. 1)"
    )
    loss: Annotated[Literal["cross-entropy", "squared-error"], CliOption(group="Training")] = Field(
        default="cross-entropy",
        description="soft-target cross-entropy, or squared error on logits (use a tenth of the "
        "learning rate)",
    )
    mse_reduction: Annotated[Literal["sum", "mean"], CliOption(group="Training")] = Field(
        default="sum", description="of the squared error, over classes"
    )
    max_entropy: Annotated[
        float | dict[str, float] | None,
        CliOption("--max-entropy", "Sampling", "X", replaces=("max_entropy_quantile",)),
    ] = Field(
        default=None,
        description="filter clips whose target has a higher entropy, in nats; the paper's is 2.7",
    )
    max_entropy_quantile: Annotated[
        Share | dict[str, Share] | None,
        CliOption("--max-entropy-quantile", "Sampling", "Q", replaces=("max_entropy",)),
    ] = Field(
        default=None,
        description="the same as a share of clips to keep: 0.5 keeps the most confident half",
    )
    quantile_draws: int = Field(
        default=100_000, ge=1, description="draws that the quantile is taken over"
    )
    filter_mode: Annotated[Literal["skip", "zero-weight"], CliOption(group="Sampling")] = Field(
        default="skip",
        description="draw another clip before anything is decoded, or keep it with weight zero",
    )

    @model_validator(mode="after")
    def _check(self) -> TargetOptions:
        from ..targets.picks import PickRule

        PickRule.parse(self.picks)
        if self.max_entropy is not None and self.max_entropy_quantile is not None:
            raise ValueError(
                "give max_entropy (nats) or max_entropy_quantile (share of draws), not both"
            )
        nats = (
            self.max_entropy.values() if isinstance(self.max_entropy, dict) else (self.max_entropy,)
        )
        if any(value is not None and not value > 0 for value in nats):
            raise ValueError(f"max_entropy must be above 0 nats, got {self.max_entropy}")
        return self


class TrainConfig(Options):
    """Options of `distinit train-student`."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"student_head"})

    store: Annotated[StoreAddress, CliOption("--store", metavar="STORE")] = Field(
        description="the target store of extract-targets: a folder or a URL"
    )
    out: Annotated[str, CliOption(group="Output", metavar="RUN")] = Field(
        description="the run folder to write"
    )
    student: Annotated[StudentOptions, CliOption()] = Field(default_factory=StudentOptions)
    student_head: Annotated[HeadKind | dict[str, HeadKind], CliOption(group="Student")] = Field(
        default="linear",
        description="head of each teacher: linear, or an MLP with one hidden layer as wide as the "
        "features; as a mapping, by teacher",
    )
    clips: Annotated[ClipOptions, CliOption()] = Field(default_factory=ClipOptions)
    targets: Annotated[TargetOptions, CliOption()] = Field(default_factory=TargetOptions)
    loop: Annotated[LoopOptions, CliOption()] = Field(default_factory=LoopOptions)
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default_factory=dict, description=VIDEO_ROOTS_HELP
    )
    exclude: Annotated[str | None, CliOption(metavar="LIST")] = Field(
        default=None,
        description="never draw these videos: a list, CORPUS/PATH per line, or the test videos of "
        "csv:FILE, folder:DIR, kinetics:FILE, hmdb51:DIR or ucf101:DIR",
    )
    exclude_split: Annotated[
        int | Literal["all"] | None, CliOption("--split", metavar="N|all", shown="1")
    ] = Field(default=None, description="whose test videos --exclude is")
    held_out: Annotated[float, CliOption(metavar="Q")] = Field(
        default=0.0, ge=0, lt=1, description="share of videos kept for the held-out loss"
    )
    held_out_clips: int = Field(
        default=1000, ge=1, description="most held-out videos used, a clip each"
    )
    export: Literal["last", "best"] = Field(
        default="last", description="checkpoint that is exported"
    )
    resume: Annotated[Resume, RESUME] = Field(default=False, description=RESUME_HELP)
    dry_run: Annotated[bool, CliOption(group="Output")] = Field(
        default=False,
        description="show config, sizes and the first batch as a picture; train nothing",
    )
