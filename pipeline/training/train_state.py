"""Where a training stands: what a checkpoint carries beside weights and optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..common.errors import TrainingError
from .step import StepReport


@dataclass
class TrainState:
    """Counters of a training. `step` steps are done; the next batch is that of step `step`.

    loss_sum, kept_sum: of the epoch under way, so that its mean survives a resume.
    since: sums over the steps since the last record of the log, by name, for the same reason.
    broken: name → reason of the videos that could not be read.
    """

    step: int = 0
    loss_sum: float = 0.0
    kept_sum: int = 0
    since: dict[str, float] = field(default_factory=dict)
    last_loss: float = math.nan
    train_loss: float = math.nan
    epochs: int = 0
    best: float = math.inf
    best_epoch: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    max_broken: int = 0

    def add(self, report: StepReport) -> None:
        """Counts one finished step. TrainingError once more than `max_broken` videos are
        unreadable."""
        self.step += 1
        self.last_loss = report.loss
        self.loss_sum += report.loss * report.kept
        self.kept_sum += report.kept
        for name, reason in report.broken:
            self.broken[name] = reason
            if len(self.broken) > self.max_broken:
                raise TrainingError(
                    f"{len(self.broken)} videos could not be read, loop.max_broken allows "
                    f"{self.max_broken}; the last: {name}: {reason}"
                )

    def end_epoch(self, validation: Mapping[str, float]) -> bool:
        """Closes an epoch; True if it is the best so far, by held-out loss if there is one."""
        self.epochs += 1
        if self.kept_sum == 0:
            raise TrainingError(
                f"no clip of epoch {self.epochs} counted, the filter turned all down; raise its threshold"
            )
        self.train_loss = self.loss_sum / self.kept_sum
        self.loss_sum, self.kept_sum = 0.0, 0
        self.validation = dict(validation)
        value = self.validation.get("loss", self.train_loss)
        if not value < self.best:
            return False
        self.best, self.best_epoch = value, self.epochs
        return True

    def epoch_record(self) -> dict[str, Any]:
        """What the log says of the epoch that has just ended."""
        held_out = {f"held_out/{name}": value for name, value in self.validation.items()}
        return {"epoch": self.epochs, "loss": self.train_loss, **held_out, "best": self.best}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Unknown keys are left out: a checkpoint may come from a later version."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
