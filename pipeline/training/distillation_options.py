"""What `distinit train-student` can be told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..clips.transforms import ClipView
from ..common.settings import Options
from ..common.urls import StoreAddress
from ..students.student_options import StudentOptions
from ..targets.picks import PickRule
from .checkpoint import Resume
from .loop_options import LoopOptions


class ClipOptions(ClipView):
    """The clips that the student sees: `length` consecutive frames, resized, cropped and
    mirrored."""

    length: int = Field(default=8, ge=1, description="frames of a clip, T")

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

    teachers: tuple[str, ...] | None = Field(
        default=None, description="heads; default all in the store"
    )
    loss_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="teacher: factor of its loss; default 1"
    )
    corpora: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="corpus: its share of the clips; default all videos alike"
    )
    picks: str = Field(default="random", description="center, random, random:N or uniform:N")
    loss: Literal["cross-entropy", "squared-error"] = "cross-entropy"
    mse_reduction: Literal["sum", "mean"] = Field(
        default="sum", description="squared error, over classes"
    )
    tau: float = Field(default=1.0, gt=0, description="temperature of the targets (eq. 1)")
    max_entropy: float | dict[str, float] | None = Field(
        default=None, description="nats; the filter"
    )
    max_entropy_quantile: Share | dict[str, Share] | None = Field(
        default=None, description="share of draws to keep"
    )
    quantile_draws: int = Field(
        default=100_000, ge=1, description="draws that the quantile is taken over"
    )
    filter: Literal["skip", "zero-weight"] = "skip"

    @model_validator(mode="after")
    def _check(self) -> TargetOptions:
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
    """Everything that `distinit train-student` can be told."""

    store: StoreAddress = Field(description="the target store")
    out: str = Field(description="the run folder to write")
    student: StudentOptions = StudentOptions()
    clips: ClipOptions = ClipOptions()
    targets: TargetOptions = TargetOptions()
    loop: LoopOptions = LoopOptions()
    moved: dict[str, str] = Field(
        default_factory=dict, description="corpus: folder where it lies now"
    )
    leave_out: str | None = Field(
        default=None,
        description="videos never drawn: a list, CORPUS/PATH a line, or the test side of csv:FILE, …",
    )
    leave_out_split: int | Literal["all"] | None = Field(
        default=None, description="of leave_out's labels; default 1"
    )
    held_out: float = Field(
        default=0.0, ge=0, lt=1, description="share of videos kept for the held-out loss"
    )
    held_out_clips: int = Field(
        default=1000, ge=1, description="most held-out videos used, a clip each"
    )
    export: Literal["last", "best"] = Field(
        default="last", description="checkpoint that is exported"
    )
    resume: Resume = False
    dry_run: bool = Field(
        default=False, description="show what would be trained, and its first batch; train nothing"
    )
