"""Counters of a training, which checkpoints store, and the meter that fills its log.

The meter measures loss, speed, waiting time, memory, the filtered share and the remaining time.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..common.console import clock
from ..common.errors import TrainingError
from .loop_options import LoopOptions
from .step import StepReport


@dataclass
class TrainState:
    """Counters of a training, under the names that checkpoints have.

    Args:
        step: Number of finished steps, and so the index of the next batch.
        loss_sum: Sum of the losses in the current epoch, so that its mean survives a resume.
        kept_sum: Number of clips that counted in the current epoch.
        since: Sums over the steps since the last log record, by name.
        last_loss: Loss of the last step.
        train_loss: Mean loss of the last finished epoch.
        epochs: Number of finished epochs.
        best: Lowest loss of an epoch: the held-out loss, or the training loss without one.
        best_epoch: Number of that epoch, counted from 1.
        validation: Measures after the last epoch, by name.
        best_validation: Measures after the best epoch, by name.
        unreadable: Name → reason of each unreadable video.
        max_unreadable: Number of unreadable videos that are allowed.
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
            TrainingError: More than `max_unreadable` videos are unreadable.
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
            validation: Measures by name. Its "loss" decides, or the training loss if it has none.

        Raises:
            TrainingError: No clip of the epoch counted.
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
        """Return the log record of the epoch that has just ended."""
        held_out = {f"held_out/{name}": value for name, value in self.validation.items()}
        return {"epoch": self.epochs, "loss": self.train_loss, **held_out, "best": self.best}

    def to_dict(self) -> dict[str, Any]:
        """Return all counters for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Restore counters; unknown keys, perhaps of a later version, are ignored."""
        # Version 0.1 wrote `unreadable` under another name.
        values = {"unreadable": values.get("broken", {}), **values}
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})


class Meter:
    """Measure speed, waiting time and mean losses between log records.

    Sums that a resume has to continue are stored in the state.
    """

    def __init__(self, options: LoopOptions, state: TrainState, device: torch.device) -> None:
        self._options = options
        self._state = state
        self._device = device
        self.first_step = state.step
        self._started = time.monotonic()
        self._clips_seen = 0
        self._reset()

    def _reset(self) -> None:
        self._record_started = time.monotonic()
        self._waiting_s = 0.0
        self._clips = 0

    def timed(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches, and measure the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            wait_started = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waiting_s += time.monotonic() - wait_started
            yield batch

    def add(self, report: StepReport) -> None:
        """Count one step."""
        self._clips += report.clips
        self._clips_seen += report.clips
        counts = {
            "steps": 1,
            "clips": report.clips,
            "kept": report.kept,
            "rejected": report.rejected,
        }
        sums = self._state.since
        for name, value in {**counts, "loss": report.loss, **report.parts}.items():
            sums[name] = sums.get(name, 0.0) + value

    def record(self, rate: float) -> dict[str, Any]:
        """Return the means since the last record, and start the next one.

        "filtered" is the share of all draws that the filter rejected, whether they were replaced or
        weighted zero. "data_share" is the share of the wall time spent waiting for clips.
        """
        elapsed_s = max(time.monotonic() - self._record_started, 1e-9)
        sums = self._state.since
        steps = max(sums.pop("steps", 0), 1)
        clips, kept, rejected = (sums.pop(name, 0) for name in ("clips", "kept", "rejected"))
        draws = clips + rejected
        finished_steps = max(self._state.step - self.first_step, 1)
        remaining_steps = self._options.total_steps - self._state.step
        record = {
            "epoch": (self._state.step - 1) // self._options.steps_per_epoch + 1,
            **{name: value / steps for name, value in sums.items()},
            "lr": rate,
            "clips_per_s": self._clips / elapsed_s,
            "data_share": min(1.0, self._waiting_s / elapsed_s),
            "memory_gb": memory_gb(self._device),
            "filtered": (draws - kept) / draws if draws else 0.0,
            "unreadable": len(self._state.unreadable),
            "eta_s": remaining_steps * self.seconds / finished_steps,
        }
        sums.clear()
        self._reset()
        return record

    def lines(self, record: Mapping[str, Any]) -> list[str]:
        """Return the record as a log line, and the losses of several heads as a second line.

        Values that are zero or constant are only in metrics.jsonl, so that the line fits 80
        columns.
        """
        words = [
            f"epoch {record['epoch']}/{self._options.epochs}",
            f"step {self._state.step}/{self._options.total_steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.3g}",
            f"{record['clips_per_s']:.1f} clips/s",
            f"data {record['data_share']:.0%}",
        ]
        if self._device.type == "cuda":
            words.append(f"{record['memory_gb']:.1f} GB")
        if record["filtered"]:
            words.append(f"filtered {record['filtered']:.0%}")
        if record["unreadable"]:
            words.append(f"unreadable videos {record['unreadable']}")
        line = "  ".join([*words, f"ETA {clock(record['eta_s'])}"])
        parts = [
            f"{name.removeprefix('loss/')} {value:.4f}"
            for name, value in record.items()
            if "/" in name
        ]
        return [line, f"    {', '.join(parts)}"] if parts else [line]

    @property
    def seconds(self) -> float:
        """Wall time since the start or resume, in seconds."""
        return time.monotonic() - self._started

    @property
    def clips_per_second(self) -> float:
        """Number of clips trained on per second of `seconds`."""
        return self._clips_seen / max(self.seconds, 1e-9)


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of tensors on a GPU, or else the memory of this process, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
