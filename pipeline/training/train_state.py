"""The counters of a training, which a checkpoint holds next to weights and optimizer."""

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

    Args:
        step: steps done.
        loss_sum: of the current epoch, so that its mean survives a resume.
        kept_sum: clips that counted in the current epoch.
        since: sums over the steps since the last record of the log, by name.
        last_loss: of the last step.
        train_loss: mean of the last finished epoch.
        epochs: finished.
        best: the lowest loss of an epoch, held-out if there is one.
        best_epoch: its number, counted from 1.
        validation: what was measured after the last epoch.
        best_validation: what was measured after the best epoch.
        unreadable: name → reason of the videos that could not be read.
        max_unreadable: how many of them are allowed.
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
    best_validation: dict[str, float] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    max_unreadable: int = 0

    def add(self, report: StepReport) -> None:
        """Count one finished step.

        Raises:
            TrainingError: more than `max_unreadable` videos are unreadable.
        """
        self.step += 1
        self.last_loss = report.loss
        self.loss_sum += report.loss * report.kept
        self.kept_sum += report.kept
        for name, reason in report.unreadable:
            self.unreadable[name] = reason
            if len(self.unreadable) > self.max_unreadable:
                raise TrainingError(
                    f"{len(self.unreadable)} videos could not be read, loop.max_unreadable allows "
                    f"{self.max_unreadable}; the last: {name}: {reason}"
                )

    def end_epoch(self, validation: Mapping[str, float]) -> bool:
        """Finish an epoch, and return whether it is the best so far.

        Args:
            validation: what was measured; its "loss" decides where there is one, else the training
                loss.

        Raises:
            TrainingError: no clip of the epoch counted.
        """
        self.epochs += 1
        if self.kept_sum == 0:
            raise TrainingError(
                f"the filter rejected every clip of epoch {self.epochs}; raise --max-entropy"
            )
        self.train_loss = self.loss_sum / self.kept_sum
        self.loss_sum, self.kept_sum = 0.0, 0
        self.validation = dict(validation)
        value = self.validation.get("loss", self.train_loss)
        if not value < self.best:
            return False
        self.best, self.best_epoch = value, self.epochs
        self.best_validation = dict(validation)
        return True

    def epoch_record(self) -> dict[str, Any]:
        """Return the record of the log for the epoch that has just ended."""
        held_out = {f"held_out/{name}": value for name, value in self.validation.items()}
        return {"epoch": self.epochs, "loss": self.train_loss, **held_out, "best": self.best}

    def to_dict(self) -> dict[str, Any]:
        """Return all counters, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Restore counters; unknown keys, maybe of a later version, are ignored."""
        # Version 0.1 wrote `unreadable` under another name.
        values = {"unreadable": values.get("broken", {}), **values}
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
