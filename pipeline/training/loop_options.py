"""Options of the training loop, shared by `train-student` and `finetune`.

They set sizes, optimizer, schedule, device, logs and checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from ..common.errors import UsageError
from ..common.settings import (
    DEVICE,
    DEVICE_HELP,
    MAX_HOURS,
    MAX_HOURS_HELP,
    CliOption,
    Options,
)
from ..common.streams import counted

# Options that a resume may change. From a given step on none of them changes the training, except
# for rounding and for the clips that share batch statistics. `epochs` may make a run with the step
# schedule longer, but not one with the cosine schedule, which ends with the last epoch.
FREE_ON_RESUME = frozenset(
    {"epochs", "device", "gpus", "micro_batch_size", "compile", "channels_last", "workers"}
    | {"threads", "weights", "log_every", "checkpoint_every", "max_unreadable", "budget"}
    | {"minutes", "max_hours", "loggers"}
)

DEFAULT_BATCH_SIZE = 32

# The options that a budget or a number of minutes replaces.
SCHEDULE = ("epochs", "epoch_clips", "warmup_epochs", "step_epochs")


@dataclass(frozen=True)
class Budget:
    """The rule for the number of clips and the schedule of a training.

    Args:
        clips_per_video: How often a video is drawn in all epochs together.
        min_clips: Number of clips of the shortest training.
        max_clips: Number of clips of the longest training.
        epochs: Number of epochs.
        warmup_epochs: Number of epochs of warm-up.
        step_epochs: Number of epochs between drops of the rate.
    """

    clips_per_video: int
    min_clips: int
    max_clips: int
    epochs: int
    warmup_epochs: int
    step_epochs: int

    def clips(self, videos: int) -> int:
        """Return the number of clips of a training on so many videos."""
        return min(max(self.clips_per_video * videos, self.min_clips), self.max_clips)


# False refuses a folder that holds a run, True a folder without one. auto resumes a run, or starts
# one if there is none.
Resume = Literal["auto"] | bool
# The weights that are validated, exported and tested: as trained, or their moving average.
Weights = Literal["trained", "ema"]
# Packages that log the metrics of a run, in addition to its metrics.jsonl.
TrackerName = Literal["tensorboard", "wandb", "trackio"]
Beta = Annotated[float, Field(ge=0, lt=1)]
RESUME = CliOption(group="Output", metavar="[auto]", bare="true")
RESUME_HELP = "resume from the last checkpoint of --out; `auto` starts a new run if --out has none"


def parse_loggers(texts: tuple[str, ...]) -> list[str]:
    """Parse `tensorboard,wandb`, repeated, or `none`. Raises ValueError."""
    names = [name for text in texts for name in text.split(",")]
    if "none" in names and len(names) > 1:
        raise ValueError(f"none cannot be combined with other loggers, got {','.join(names)}")
    for name in names:
        if name != "none" and name not in get_args(TrackerName):
            raise ValueError(f"expected {', '.join(get_args(TrackerName))} or none, got {name!r}")
    return [] if names == ["none"] else list(dict.fromkeys(names))


class LoopOptions(Options):
    """Options of the training loop.

    An epoch is counted in clips, not in videos: `epoch_clips` clips, rounded up to whole batches
    (`clips_per_epoch`); None means one clip per video, which `for_videos` fills in.

    A step has `batch_size` clips on any hardware. Each process takes its share, in pieces of at
    most `micro_batch_size` clips whose gradients are accumulated. So the number of GPUs changes
    neither clips nor schedule, and a run may be resumed on a different number of GPUs.

    The learning rate follows `schedule`, with the peak `peak_lr`. A squared-error run needs a tenth
    of the rate of a cross-entropy run (section 4.2 of the paper), which a preset or the user sets.
    With AdamW the defaults of `lr` and `weight_decay` are those of `ADAMW_DEFAULTS`.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset(
        {"optimizer", "betas", "schedule", "ema", "budget", "minutes", "max_hours", "loggers"}
    )
    # The paper draws a video of Kinetics 190 times; half as many draws lose little accuracy. With
    # fewer than 24 000 clips a student from scratch has hardly begun to learn
    # (docs/train-student.md). The schedule is that of the paper's 45 epochs, divided by five.
    BUDGET: ClassVar[Budget] = Budget(100, 24_000, 45_000_000, 9, 2, 2)
    ADAMW_DEFAULTS: ClassVar[dict[str, float]] = {"lr": 0.001, "weight_decay": 0.05}

    epochs: Annotated[int, CliOption(group="Training", metavar="N")] = Field(
        default=45, ge=1, description="epochs, counted in clips"
    )
    epoch_clips: Annotated[
        int | None, CliOption(group="Training", metavar="N", shown="one per video")
    ] = Field(default=None, ge=1, description="clips per epoch")
    budget: Annotated[
        int | Literal["auto"] | None,
        CliOption(
            group="Training",
            metavar="CLIPS|auto",
            shown="auto without a schedule",
            replaces=SCHEDULE,
        ),
    ] = Field(
        default=None,
        description="total number of clips, which the schedule is fitted to; auto: from the number of videos",
    )
    minutes: Annotated[
        float | None, CliOption(group="Training", metavar="M", shown="none", replaces=SCHEDULE)
    ] = Field(
        default=None,
        gt=0,
        description="fit the schedule to M minutes, test included, by measuring a few steps",
    )
    max_hours: Annotated[float | None, MAX_HOURS] = Field(
        default=None, gt=0, description=MAX_HOURS_HELP
    )
    batch_size: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"],
        CliOption(group="Training", metavar="B|auto"),
    ] = Field(
        default=DEFAULT_BATCH_SIZE,
        description="clips per step, over all GPUs; auto: as many as fit on a GPU, 32 on a CPU",
    )
    micro_batch_size: Annotated[int | None, CliOption(group="Hardware", metavar="B")] = Field(
        default=None,
        ge=1,
        description="largest number of clips per GPU and forward pass; gradients of more are accumulated",
    )
    gpus: Annotated[int, CliOption(group="Hardware", metavar="N")] = Field(
        default=1,
        ge=1,
        description="processes on this machine, one per GPU; on several machines use torchrun",
    )
    optimizer: Annotated[Literal["sgd", "adamw"], CliOption(group="Training")] = Field(
        default="sgd",
        description="SGD with Nesterov momentum, or AdamW, which changes the defaults of --lr and "
        "--weight-decay",
    )
    lr: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=0.01, gt=0, description="learning rate after the warm-up; with adamw 0.001"
    )
    momentum: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=0.9, ge=0, lt=1, description="momentum of Nesterov's SGD"
    )
    nesterov: bool = True
    betas: Annotated[
        tuple[Beta, Beta], CliOption(group="Training", metavar="B1 B2", shown="0.9 0.999")
    ] = Field(default=(0.9, 0.999), description="decay rates of AdamW's two moments")
    weight_decay: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=1e-4,
        ge=0,
        description="weight decay; with adamw 0.05, and none on norms and biases",
    )
    ema: Annotated[float | None, CliOption(group="Training", metavar="DECAY", shown="none")] = (
        Field(
            default=None,
            gt=0,
            lt=1,
            description="keep an exponential moving average of the weights, such as 0.999",
        )
    )
    weights: Annotated[Weights, CliOption(group="Training")] = Field(
        default="trained",
        description="weights that are validated, exported and tested: as trained, or their average "
        "of --ema",
    )
    schedule: Annotated[Literal["step", "cosine"], CliOption(group="Training")] = Field(
        default="step",
        description="learning rate after the warm-up: drops by --gamma every --step-epochs, or half "
        "a cosine down to 0",
    )
    warmup_epochs: Annotated[int, CliOption(group="Training", metavar="N")] = Field(
        default=0, ge=0, description="epochs of linear warm-up"
    )
    step_epochs: Annotated[int | None, CliOption(group="Training", metavar="N")] = Field(
        default=10, ge=1, description="epochs between drops of the rate; null: no drops"
    )
    gamma: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=0.1, gt=0, le=1, description="factor of each drop"
    )
    lr_base_batch_size: Annotated[
        int | None, CliOption(group="Training", metavar="B", shown="lr is not scaled")
    ] = Field(default=None, ge=1, description="batch size that lr refers to")
    clip_norm: Annotated[float | None, CliOption(group="Training", metavar="X", shown="none")] = (
        Field(default=None, gt=0, description="largest norm of the gradient")
    )
    precision: Annotated[Literal["fp32", "bf16"], CliOption(group="Hardware")] = Field(
        default="fp32", description="floating-point format of the computation"
    )
    sync_batchnorm: bool = Field(
        default=True, description="batch statistics over all GPUs; not on a CPU"
    )
    channels_last: bool = Field(default=True, description="3D convolutions in channels-last memory")
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = Field(
        default="none", description="torch.compile and its mode"
    )
    device: Annotated[str, DEVICE] = Field(default="auto", description=DEVICE_HELP)
    workers: Annotated[
        int | None, CliOption(group="Hardware", metavar="N", shown="depending on the machine")
    ] = Field(default=None, ge=0, description="loader processes; any number gives the same clips")
    threads: int | None = Field(
        default=None, ge=1, description="torch threads on a CPU; default cores less workers"
    )
    seed: Annotated[int, CliOption(group="Training", metavar="N")] = Field(
        default=0, ge=0, description="seed of every random draw"
    )
    log_every: Annotated[int, CliOption(group="Output", metavar="N")] = Field(
        default=20, ge=1, description="steps between log lines"
    )
    loggers: Annotated[
        tuple[TrackerName, ...],
        CliOption(
            "--logger",
            "Output",
            "tensorboard|wandb|trackio|none",
            "tensorboard",
            parse=parse_loggers,
        ),
    ] = Field(
        default=("tensorboard",),
        description="where metrics are logged besides metrics.jsonl; repeatable, or separated by commas",
    )
    checkpoint_every: Annotated[int, CliOption(group="Output", metavar="N")] = Field(
        default=500,
        ge=1,
        description="steps between checkpoints; every epoch also ends with one",
    )
    max_unreadable: int = Field(
        default=100, ge=0, description="unreadable videos before the run stops"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_adamw(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("optimizer") == "adamw":
            return {**cls.ADAMW_DEFAULTS, **data}
        return data

    @model_validator(mode="after")
    def _check_combinations(self) -> LoopOptions:
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov requires momentum > 0, got momentum=0; set nesterov=false")
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(f"budget is {self.budget}, expected 1 or more clips, or auto")
        if self.budget is not None and self.minutes is not None:
            raise ValueError("give --budget (clips) or --minutes (time), not both")
        if self.weights == "ema" and self.ema is None:
            raise ValueError("weights is ema, which requires a decay: --ema 0.999")
        return self

    def for_videos(self, videos: int) -> LoopOptions:
        """Return the options with the schedule of the budget, and with `epoch_clips` filled in.

        Options that the user set stay. Without a budget, `epoch_clips` is one clip per video unless
        it is set.
        """
        planned = self._planned(videos) if self.budget is not None else self
        if planned.epoch_clips is not None:
            return planned
        return planned.model_copy(update={"epoch_clips": max(1, videos)})

    def with_derived_schedule(self) -> Self:
        """Return the options with a budget from the number of videos, unless a schedule is set.

        Options of `finetune` have a default for `epoch_clips`, the paper's number, with which a
        small data set would take days. There the budget applies unless `epoch_clips` is set.
        """
        set_options = self.model_fields_set
        has_default = type(self).model_fields["epoch_clips"].default is not None
        is_open = not set_options & set(SCHEDULE) or (
            has_default and "epoch_clips" not in set_options
        )
        if self.budget is None and self.minutes is None and is_open:
            return self.model_copy(update={"budget": "auto"})
        return self

    def _planned(self, videos: int) -> LoopOptions:
        """Return the options with the schedule of the budget, except for options that are set."""
        rule, set_options = self.BUDGET, self.model_fields_set
        clips = rule.clips(videos) if self.budget == "auto" else int(self.budget or 0)
        epochs = self.epochs if "epochs" in set_options else rule.epochs
        if self.budget == "auto":
            # More epochs make a longer training: the clips per epoch stay those of the default.
            clips = math.ceil(clips * epochs / rule.epochs)
        sets_clips = "epoch_clips" in set_options and "epochs" not in set_options
        if sets_clips and self.epoch_clips is not None:
            epochs = max(1, round(clips / self.epoch_clips))
        # Warm-up and drops take the same shares of any number of epochs.
        share = epochs / rule.epochs
        derived = {
            "epochs": epochs,
            "epoch_clips": math.ceil(clips / epochs),
            "warmup_epochs": min(round(rule.warmup_epochs * share), epochs - 1),
            "step_epochs": max(1, round(rule.step_epochs * share)),
        }
        return self.model_copy(update={k: v for k, v in derived.items() if k not in set_options})

    @property
    def step_clips(self) -> int:
        """The batch size as a number.

        Raises:
            UsageError: It is `auto`, which only a single training can measure.
        """
        if self.batch_size == "auto":
            raise UsageError(
                "--batch-size auto: only a single training measures it, expected a number here"
            )
        return self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch, enough for `epoch_clips`."""
        if self.epoch_clips is None:
            raise ValueError("epoch_clips is not set; call LoopOptions.for_videos(n) first")
        return math.ceil(self.epoch_clips / self.step_clips)

    @property
    def clips_per_epoch(self) -> int:
        """Number of clips of an epoch. All batches are complete, so it may exceed `epoch_clips`."""
        return self.steps_per_epoch * self.step_clips

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up, scaled if `lr_base_batch_size` is set."""
        return (
            self.lr
            if self.lr_base_batch_size is None
            else self.lr * self.step_clips / self.lr_base_batch_size
        )

    def describe_rate(self) -> str:
        """Format the peak learning rate and its scaling for the log."""
        scaling = (
            "not scaled by the batch size"
            if self.lr_base_batch_size is None
            else f"{self.lr:g} × {self.step_clips} / {self.lr_base_batch_size}"
        )
        rate = f"peak learning rate {self.peak_lr:g} ({scaling})"
        if self.optimizer == "adamw":
            rate = f"AdamW, {rate}, weight decay {self.weight_decay:g}"
        return rate if self.ema is None else f"{rate}; moving average of the weights {self.ema:g}"

    def describe_epochs(self) -> str:
        """Format `9 epochs of 400 clips` for the log."""
        return f"{counted(self.epochs, 'epoch')} of {counted(self.clips_per_epoch, 'clip')}"

    def describe_steps(self, world: int) -> str:
        """Format `120 steps of 64 clips: 2 processes × 2 pieces × at most 16 clips` for the log."""
        words = f"{counted(self.total_steps, 'step')} of {counted(self.step_clips, 'clip')}"
        pieces = self.accumulation_steps(world)
        if world == pieces == 1:
            return words
        piece_size = counted(self.clips_at_once(world), "clip")
        factors = (
            counted(world, "process", "es"),
            counted(pieces, "piece"),
            f"at most {piece_size}",
        )
        return f"{words}: {' × '.join(factors)}"

    def accumulation_steps(self, world: int) -> int:
        """Return the number of pieces that each of `world` processes splits its share into."""
        share = math.ceil(self.step_clips / world)
        return math.ceil(share / self.micro_batch_size) if self.micro_batch_size is not None else 1

    def clips_at_once(self, world: int) -> int:
        """Return the largest number of clips in one forward pass on each of `world` devices."""
        return math.ceil(math.ceil(self.step_clips / world) / self.accumulation_steps(world))

    @property
    def weight_copies(self) -> int:
        """Number of tensors of the size of the weights: weights, gradients, moments, average."""
        return 3 + (self.optimizer == "adamw") + (self.ema is not None)

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    def identity(self) -> dict[str, Any]:
        """Return the options that a resume must share with its checkpoint, under one key."""
        changeable = FREE_ON_RESUME - ({"epochs"} if self.schedule == "cosine" else set())
        return {"loop": self.identity_dump(exclude=set(changeable))}
