"""What a training run can be told: sizes, schedule, device, bookkeeping. Shared by stages two and three."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config import Options

# Options that may differ between the start of a run and its resume: none of them changes what is learned
# from a given step on. (`epochs` may: the schedule does not depend on it, so a run can be made longer.)
FREE_ON_RESUME = frozenset({"epochs", "device", "workers", "threads", "log_every", "checkpoint_every", "max_broken"})


class LoopOptions(Options):
    """Options of the training loop.

    An epoch is counted in clips, not in videos: `epoch_clips` clips, rounded up to whole batches
    (`clips_per_epoch`); None means one clip a video, which `for_videos` fills in.

    Learning rate (FACTS, section 1): linear warm-up per iteration over `warmup_epochs`, then
    lr * gamma ** ((epoch - warmup_epochs) // step_epochs). It is not scaled by the batch size; a
    squared-error run wants a tenth of the rate of a cross-entropy run (the paper's section 4.2), which a
    preset or the user sets.
    """

    batch_size: int = Field(default=32, ge=1, description="clips a step")
    epochs: int = Field(default=45, ge=1)
    epoch_clips: int | None = Field(default=None, ge=1, description="clips an epoch; default one a video")
    lr: float = Field(default=0.01, gt=0, description="learning rate after the warm-up")
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_epochs: int = Field(default=0, ge=0)
    step_epochs: int | None = Field(default=10, ge=1, description="epochs between drops; None: no drops")
    gamma: float = Field(default=0.1, gt=0, le=1, description="factor of each drop")
    clip_norm: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    workers: int | None = Field(default=None, ge=0, description="loader processes; default by the machine")
    threads: int | None = Field(default=None, ge=1, description="torch threads on a CPU; default cores less workers")
    seed: int = Field(default=0, ge=0)
    log_every: int = Field(default=20, ge=1, description="steps")
    checkpoint_every: int = Field(default=500, ge=1, description="steps; the end of an epoch always is one")
    max_broken: int = Field(default=100, ge=0, description="unreadable videos before the run stops")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> LoopOptions:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0, found momentum = 0; set nesterov=false")
        return self

    def for_videos(self, videos: int) -> LoopOptions:
        """The same options with `epoch_clips` filled in: one clip for each of `videos` videos."""
        return self if self.epoch_clips is not None else self.model_copy(update={"epoch_clips": max(1, videos)})

    @property
    def steps_per_epoch(self) -> int:
        if self.epoch_clips is None:
            raise ValueError("epoch_clips is not set; call LoopOptions.for_videos(n) first")
        return math.ceil(self.epoch_clips / self.batch_size)

    @property
    def clips_per_epoch(self) -> int:
        """Clips an epoch really has: whole batches only, so that no step sees a short batch."""
        return self.steps_per_epoch * self.batch_size

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with its checkpoint, under one top-level key."""
        return {"loop": self.model_dump(mode="json", exclude=set(FREE_ON_RESUME))}
