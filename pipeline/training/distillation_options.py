"""Options of `distinit train-student`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ..clips.clip_options import ClipView
from ..common.errors import UsageError
from ..common.settings import VIDEO_ROOTS, VIDEO_ROOTS_HELP, CliOption, Options, parse_pairs
from ..common.urls import StoreAddress
from ..students.student_options import HeadKind, StudentOptions
from .loop_options import RESUME, RESUME_HELP, LoopOptions, Resume


class ClipOptions(ClipView):
    """The clips that the student sees: consecutive frames, resized, cropped and mirrored."""

    clip_frames: Annotated[int, CliOption("--frames", "Sampling", "T")] = Field(
        default=8, ge=1, description="frames per clip"
    )

    @model_validator(mode="after")
    def _check(self) -> ClipOptions:
        # Raises ValueError if the crop does not fit into the resized frame.
        self.frame_view()
        return self


Reduction = Literal["sum", "mean"]
Loss = Literal["cross-entropy", "squared-error", "cosine", "smooth-l1", "mse"]
LOSSES: dict[str, tuple[Loss, ...]] = {
    "logits": ("cross-entropy", "squared-error", "cosine"),
    "features": ("cosine", "smooth-l1", "mse"),
}
"""The losses of each kind of output, the default first."""


def resolve_losses(
    option: Loss | Mapping[str, Loss], outputs: Mapping[str, str]
) -> dict[str, Loss]:
    """Return the loss of each teacher.

    Args:
        option: Losses by teacher, or one loss. That one applies to all teachers with an output that
            has it; other teachers take the default of their output.
        outputs: Teacher → "logits" or "features".

    Raises:
        UsageError: A loss does not exist for the output of its teacher, or of any teacher.
    """
    named = option if isinstance(option, Mapping) else {}
    for name, loss in named.items():
        if name in outputs and loss not in LOSSES[outputs[name]]:
            raise UsageError(
                f"--loss {name}={loss}: teacher {name!r} gives {outputs[name]}, whose losses are "
                f"{', '.join(LOSSES[outputs[name]])}"
            )
    default = {output: losses[0] for output, losses in LOSSES.items()}
    if not isinstance(option, Mapping):
        fitting = {output for output in set(outputs.values()) if option in LOSSES[output]}
        if not fitting and option != TargetOptions.model_fields["loss"].default:
            kinds = " and ".join(sorted(set(outputs.values())))
            allowed = ", ".join(loss for output in set(outputs.values()) for loss in LOSSES[output])
            raise UsageError(
                f"--loss {option}: the teachers give {kinds}, whose losses are {allowed}"
            )
        default |= dict.fromkeys(fitting, option)
    return {name: named.get(name, default[output]) for name, output in outputs.items()}


def parse_losses(texts: tuple[str, ...]) -> str | dict[str, str]:
    """Parse one `LOSS`, or `NAME=LOSS`, repeated. Raises ValueError for any other combination."""
    unnamed = [text for text in texts if "=" not in text]
    if len(unnamed) == 1 and len(texts) == 1:
        return unnamed[0]
    if unnamed:
        raise ValueError(
            f"expected one LOSS for all teachers or NAME=LOSS for each, got {' and '.join(texts)}"
        )
    return dict(parse_pairs(texts))


def parse_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """Parse `NAME=X`, repeated. Raises ValueError."""
    weights = {}
    for name, text in parse_pairs(texts).items():
        try:
            weights[name] = float(text)
        except ValueError:
            raise ValueError(f"expected NAME=NUMBER, got {name}={text!r}") from None
    return weights


Share = Annotated[float, Field(gt=0, le=1)]


class TargetOptions(Options):
    """How targets are computed from a store, which stays unchanged, and how a student learns them.

    `max_entropy`: Threshold in nats, one for all teachers or one by name. `max_entropy_quantile` is
    an alternative: the share of draws that a head keeps, likewise; its threshold is measured on
    draws of the sampler, and saved in nats.
    `corpora`: Corpora to draw from, each with its share of the clips in any unit. By default all
    videos are drawn equally often.
    `heads`: Classifier files that compute logits from features when clips are drawn, see
    `ClassHead.read`.
    `loss`: Losses by teacher, or one loss for all teachers with an output that has it (`LOSSES`);
    other teachers take the first loss of their output.
    `loss_weights`: Factors of the teachers' losses, 1 for teachers that are not named.
    `balance_losses`: Each loss is divided by that of the best constant predictor, so that no
    teacher dominates by the scale of its loss.
    `teacher_dropping`: The teacher with the highest weighted loss of a clip always counts; each
    other teacher is left out with this probability.

    With `loss=squared-error` use a tenth of the learning rate (section 4.2 of the paper).
    """

    teachers: Annotated[
        tuple[str, ...] | None, CliOption("--teacher", "Teacher", "NAME", shown="all")
    ] = Field(default=None, description="learn from this teacher of the store; repeatable")
    loss_weights: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        CliOption("--loss-weight", "Training", "NAME=X", parse=parse_weights),
    ] = Field(default={}, description="factor of a teacher's loss, default 1; repeatable")
    heads: Annotated[
        dict[str, str], CliOption("--head", "Teacher", "NAME=FILE", parse=parse_pairs)
    ] = Field(
        default={},
        description="safetensors file of a classifier that computes logits from a teacher's features; "
        "repeatable",
    )
    balance_losses: Annotated[bool, CliOption(group="Training")] = Field(
        default=False,
        description="divide each teacher's loss by that of the best constant predictor, so that no "
        "teacher dominates by its scale",
    )
    teacher_dropping: Annotated[float, CliOption(group="Training", metavar="P")] = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability of leaving out a teacher for a clip; the teacher with the highest "
        "loss always counts",
    )
    corpora: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="share of the clips by corpus; default: all videos equally often"
    )
    picks: Annotated[
        str, CliOption(group="Sampling", metavar="center|random|random:N|uniform:N")
    ] = Field(
        default="random",
        description="cached frames of a clip that make its target; logits of several are averaged",
    )
    tau: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=1.0, gt=0, description="temperature of the targets (eq. 1)"
    )
    loss: Annotated[
        Loss | dict[str, Loss],
        CliOption(
            "--loss",
            "Training",
            "[NAME=]LOSS",
            "cross-entropy for logits, cosine for features",
            parse=parse_losses,
            repeated=True,
        ),
    ] = Field(
        default="cross-entropy",
        description="for logits: cross-entropy, squared-error (use a tenth of the learning rate) or "
        "cosine; for features: cosine, smooth-l1 or mse; repeatable with the name of a teacher",
    )
    mse_reduction: Annotated[Literal["sum", "mean"], CliOption(group="Training")] = Field(
        default="sum", description="how the squared error is reduced over classes"
    )
    max_entropy: Annotated[
        float | dict[str, float] | None,
        CliOption("--max-entropy", "Sampling", "X", replaces=("max_entropy_quantile",)),
    ] = Field(
        default=None,
        description="reject clips whose target has a higher entropy, in nats; the paper uses 2.7",
    )
    max_entropy_quantile: Annotated[
        Share | dict[str, Share] | None,
        CliOption("--max-entropy-quantile", "Sampling", "Q", replaces=("max_entropy",)),
    ] = Field(
        default=None,
        description="the same filter as a share of clips to keep: 0.5 keeps the most confident half",
    )
    quantile_draws: int = Field(
        default=100_000, ge=1, description="number of draws that the quantile is measured on"
    )
    filter_mode: Annotated[Literal["skip", "zero-weight"], CliOption(group="Sampling")] = Field(
        default="skip",
        description="replace a rejected clip before it is decoded, or keep it with weight zero",
    )

    ADDED: ClassVar[frozenset[str]] = frozenset({"heads", "balance_losses", "teacher_dropping"})

    @field_validator("loss", mode="before")
    @classmethod
    def _check_loss(cls, value: Any) -> Any:
        for loss in value.values() if isinstance(value, dict) else (value,):
            if loss not in get_args(Loss):
                raise ValueError(f"expected {', '.join(get_args(Loss))}, got {loss!r}")
        return value

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
    ] = Field(default=None, description="the split whose test videos --exclude names")
    held_out: Annotated[float | None, CliOption(metavar="Q", shown="from the number of videos")] = (
        Field(default=None, ge=0, lt=1, description="share of videos kept for the held-out loss")
    )
    held_out_clips: int = Field(
        default=1000, ge=1, description="largest number of held-out videos, one clip per video"
    )
    export: Literal["last", "best"] = Field(
        default="last", description="checkpoint that is exported"
    )
    resume: Annotated[Resume, RESUME] = Field(default=False, description=RESUME_HELP)
    dry_run: Annotated[bool, CliOption(group="Output")] = Field(
        default=False,
        description="show config, sizes and the first batch as a picture; train nothing",
    )
