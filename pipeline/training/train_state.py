"""The counters of a training, which a checkpoint holds, and what is measured while it runs.

Measured are loss, speed, waiting, memory, the filtered share and the time left.
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


class Meter:
    """Sum over the steps since the last record.

    The sums that a resume continues with are kept in the state.
    """

    def __init__(self, options: LoopOptions, state: TrainState, device: torch.device) -> None:
        self._options = options
        self._state = state
        self._device = device
        self.first_step = state.step
        self._began = time.monotonic()
        self._clips_seen = 0
        self._reset()

    def _reset(self) -> None:
        self._since = time.monotonic()
        self._waited = 0.0
        self._clips = 0

    def timed(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the batches and measure the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - before
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
        since = self._state.since
        for name, value in {**counts, "loss": report.loss, **report.parts}.items():
            since[name] = since.get(name, 0.0) + value

    def record(self, rate: float) -> dict[str, Any]:
        """Return the means since the last record, and start the next one.

        "filtered" is the share of all draws that the filter rejected, whether drawn again or
        weighted zero; "data_share" is the share of the wall time spent waiting for clips.
        """
        elapsed = max(time.monotonic() - self._since, 1e-9)
        since = self._state.since
        steps = max(since.pop("steps", 0), 1)
        clips, kept, rejected = (since.pop(name, 0) for name in ("clips", "kept", "rejected"))
        draws = clips + rejected
        done = max(self._state.step - self.first_step, 1)
        left = self._options.total_steps - self._state.step
        record = {
            "epoch": (self._state.step - 1) // self._options.steps_per_epoch + 1,
            **{name: value / steps for name, value in since.items()},
            "lr": rate,
            "clips_per_s": self._clips / elapsed,
            "data_share": min(1.0, self._waited / elapsed),
            "memory_gb": memory_gb(self._device),
            "filtered": (draws - kept) / draws if draws else 0.0,
            "unreadable": len(self._state.unreadable),
            "eta_s": left * self.seconds / done,
        }
        since.clear()
        self._reset()
        return record

    def lines(self, record: Mapping[str, Any]) -> list[str]:
        """Return the record as a line of the log, and the losses of several heads as a second one.

        What is zero and what does not change is left to metrics.jsonl, so that it fits 80 columns.
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
        return time.monotonic() - self._began

    @property
    def clips_per_second(self) -> float:
        """Clips trained on per second of that time."""
        return self._clips_seen / max(self.seconds, 1e-9)


def memory_gb(device: torch.device) -> float:
    """Return the peak memory of tensors on a GPU, or the memory of this process, in gigabytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
