"""Measure a training while it runs: loss, speed, waiting, memory, filtered share, time left."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.console import clock
from .loop_options import LoopOptions
from .step import StepReport
from .train_state import TrainState


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
