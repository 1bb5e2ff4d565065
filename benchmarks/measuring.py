"""Helpers of the benchmarks: contenders in turn, medians, processor time, machine, tables."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.geometry import View


def machine() -> str:
    """Describe the machine: processor, cores, memory, load of the last minute, date."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if "model name" in line
        ]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().total / 2**30
    load = os.getloadavg()[0]
    date = time.strftime("%Y-%m-%d")
    return f"{date}, {name}, {cores} cores, {memory:.0f} GB, load {load:.1f}, Python {platform.python_version()}"


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return a value per round of each contender; they take turns, so that load affects all."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            values[name].append(measure())
    return values


def medians(values: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each contender."""
    return {name: statistics.median(v) for name, v in values.items()}


def processor_seconds() -> float:
    """Return the processor time so far of this process and its running children."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def pictures(paths: Sequence[str], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield frames of `size` (height, width) from one file after the other, endlessly."""
    for path in itertools.cycle(paths):
        with contextlib.suppress(VideoError), VideoReader(path) as reader:
            renderer = reader.info.renderer()
            for _, _, frame in reader.decode_plain():
                yield renderer.render(frame, View(resize=size))


def video_columns(paths: Sequence[str], rows: int, *, seed: int) -> dict[str, Any]:
    """Return the video table of a store for synthetic videos of 10 s.

    Args:
        paths: Path of each video in its corpus.
        rows: Cached frames per video.
        seed: Seed of their digests.
    """
    videos = len(paths)
    return {
        "corpus": np.zeros(videos, np.int32),
        "path": paths,
        "size": np.full(videos, 1_000_000),
        "duration": np.full(videos, 10.0),
        "fps": np.full(videos, 30.0),
        "rows_bound": np.full(videos, rows),
        "time_base_num": np.ones(videos, np.int64),
        "time_base_den": np.full(videos, 15360),
        "width": np.full(videos, 340),
        "height": np.full(videos, 256),
        "digest": np.random.default_rng(seed).integers(0, 256, (videos, 16), np.uint8),
    }


def write_json(path: str | Path | None, device: torch.device, rows: Sequence[object]) -> None:
    """Write results with the machine, the device and the version of torch; nothing for None."""
    if path is None:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record = {"machine": machine(), "device": name, "torch": torch.__version__, "rows": rows}
    Path(path).write_text(json.dumps(record, indent=1))


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Format a Markdown table."""
    lines = [list(head), *[[str(cell) for cell in row] for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
