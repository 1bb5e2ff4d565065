"""Estimate an extraction before it starts: rows, GB and hours of each sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..common.errors import UsageError
from ..common.processes import cores
from ..common.progress_bar import progress_bar
from ..common.settings import check_hours, describe_hours
from ..common.tables import Column, Table
from ..corpus.sources import VideoList
from ..store.encoding import DEFAULT, row_bytes
from ..teachers.teacher import Teacher, TeacherOutput
from ..video.pool.decode_pool import Block, DecodeJob, DecodePool
from ..video.probe import Probe
from ..video.sampling import Sampling
from .extract_options import ExtractConfig
from .machine import default_decoders, load_teachers, outputs_of, run_record, use_engines, views_of
from .planner import StorePlan
from .teacher_runner import batch_threads

log = logging.getLogger(__name__)

# The least number of rows for which rates are measured: smaller extractions take less time than the
# measurement.
LONG_ROWS = 20_000
ADVICE = "--every 8 keeps fewer frames, --part I/N shares the videos among N machines"
MAX_PROBED = 2000
"""Number of videos that a dry run probes."""
MAX_TIMED = 8
"""Number of videos, and of repeated batches, that are timed to measure a rate."""
MAX_TIMED_ROWS = 200
"""Number of rows per timed video."""
MAX_TIMED_S = 2.0
"""Seconds of timed batches; a batch that takes longer is timed once."""
ROW_BYTES = 4 + 8 + 8
"""Bytes of a row's video, index and pts."""
ENTROPY_BYTES = 4


def dry_run(
    config: ExtractConfig, videos: VideoList | None, device: torch.device
) -> dict[str, Any]:
    """Print and return rows, GB and hours of the chosen sampling and of others; write nothing.

    Rows are upper bounds from the containers, scaled up if only a sample was probed. Hours come
    from rates measured on this machine: of the teachers on a few batches, of the decoder on a few
    videos. On a CPU both share the cores and their hours add up; with a GPU they overlap.

    Raises:
        UsageError: There are no listed videos, or the chosen sampling takes more than `max_hours`.
    """
    if videos is None:
        raise UsageError("--dry-run needs a SOURCE")
    teachers = load_teachers(config, device)
    use_engines(
        teachers, config.engine, {}, run_record(config.batch_size, config.precision, device)
    )
    chosen = config.sampling or Sampling()
    samplings = [chosen, *(sampling for sampling in _other_samplings() if sampling != chosen)]
    rates = _measure_teachers(teachers, config)
    costs: list[dict[str, Any]] = []
    num_decoders = config.decoders or default_decoders(device)
    with DecodePool(processes=num_decoders, views=views_of(teachers)) as pool:
        paths = [videos.absolute(i) for i in _spread(len(videos), MAX_PROBED)]
        probes: list[Probe] = []
        with progress_bar("probing", len(paths), "videos") as bar:
            for probe in pool.probe(paths):
                probes.append(probe)
                bar.advance(1)
        readable = [
            (path, probe) for path, probe in zip(paths, probes, strict=True) if probe.error is None
        ]
        scale = len(videos) / max(len(paths), 1)
        for sampling in samplings:
            rows = scale * sum(sampling.rows_bound(probe) for _, probe in readable)
            decode_s = scale * _decode_seconds(pool, sampling, readable)
            costs.append(rates.costs(sampling, rows, decode_s, device))
    num_unreadable = int(scale * (len(probes) - len(readable)))
    _show(costs, len(videos), len(paths), num_unreadable)
    check_hours(costs[0]["hours"], config.max_hours, "this extraction", ADVICE)
    return {
        "dry_run": True,
        "videos": len(videos),
        "probed": len(paths),
        "unreadable": num_unreadable,
        "costs": costs,
    }


@dataclass(frozen=True)
class _Rates:
    """Time and size of a row of the teachers.

    Args:
        seconds: Seconds of all outputs of a row.
        seconds_of: Output in the store → seconds of a row, if it were the only one.
        bytes_of: Output in the store → bytes of a row.
    """

    seconds: float
    seconds_of: dict[str, float]
    bytes_of: dict[str, int]

    def costs(
        self, sampling: Sampling, rows: float, decode_s: float, device: torch.device
    ) -> dict[str, Any]:
        """Return the rows, GB and hours of a sampling."""
        teacher_s = rows * self.seconds
        return {
            "sampling": sampling.describe(),
            "rows": int(rows),
            "gigabytes": rows * (sum(self.bytes_of.values()) + ROW_BYTES) / 1e9,
            "gigabytes_of": {name: rows * size / 1e9 for name, size in self.bytes_of.items()},
            "hours_of": {name: rows * s / 3600 for name, s in self.seconds_of.items()},
            "hours": _total(device, decode_s, teacher_s) / 3600,
            "hours_decoding": decode_s / 3600,
            "hours_teachers": teacher_s / 3600,
        }


def _measure_teachers(teachers: list[Teacher], config: ExtractConfig) -> _Rates:
    """Measure the teachers on a few batches."""
    seconds = sum(_seconds_per_row(teacher, config.batch_size) for teacher in teachers)
    outputs = outputs_of(teachers)
    # One forward pass gives several outputs, so that each is timed by itself.
    seconds_of = {
        name: _seconds_per_row(output.teacher, config.batch_size, output.key)
        if len(outputs) > 1
        else seconds
        for name, output in outputs.items()
    }
    return _Rates(seconds, seconds_of, _row_bytes(outputs, config))


def _total(device: torch.device, decode_s: float, teacher_s: float) -> float:
    """Return the time of decoding and teachers, which share the cores where both use the CPU."""
    return decode_s + teacher_s if device.type == "cpu" else max(decode_s, teacher_s)


def announce(
    config: ExtractConfig,
    plan: StorePlan,
    teachers: list[Teacher],
    shards: list[int],
    pool: DecodePool,
    device: torch.device,
    num_workers: int,
) -> None:
    """Log the estimated time and size of the open shards.

    Args:
        config: The options.
        plan: The store and its videos.
        teachers: The teachers, with their engines.
        shards: The open shards.
        pool: The decoding processes of this machine.
        device: The device of the teachers.
        num_workers: The number of machines or processes that share the shards, each like this one.

    Raises:
        UsageError: The estimate is above `max_hours`; stored rows are kept.
    """
    index = plan.writer.index
    segments = np.flatnonzero(np.isin(index.shard, shards))
    rows = int(index.bound[segments].sum())
    if rows == 0 or (rows < LONG_ROWS and config.max_hours is None):
        return
    videos = np.unique(index.video[segments])
    paths = [plan.path(int(videos[i])) for i in _spread(len(videos), MAX_TIMED)]
    decode_s, num_decoded = _time_decoding(pool, plan.sampling, paths)
    decode_s /= max(num_decoded, 1)
    # A worker runs one batch at a time, since workers share the cores of a machine.
    on_workers = config.workers is not None or config.scheduler is not None
    max_batches = 1 if on_workers else None
    teacher_s = sum(
        _seconds_per_row(teacher, config.batch_size, max_batches=max_batches)
        for teacher in teachers
    )
    hours = _total(device, decode_s, teacher_s) * rows / 3600 / num_workers
    sizes = _row_bytes(outputs_of(teachers), config).values()
    size = _gigabytes(rows * (sum(sizes) + ROW_BYTES) / 1e9)
    log.info(f"estimated: {describe_hours(hours)} and {size} GB for at most {rows:,} frames")
    check_hours(hours, config.max_hours, "this extraction", ADVICE)


def _row_bytes(outputs: Mapping[str, TeacherOutput], config: ExtractConfig) -> dict[str, int]:
    """Return the bytes of a row of each output."""
    encoding = config.encoding or DEFAULT
    return {
        name: row_bytes(output.width, encoding)
        + (ENTROPY_BYTES if output.output == "logits" else 0)
        for name, output in outputs.items()
    }


def _other_samplings() -> list[Sampling]:
    """Return the samplings that a dry run compares with the chosen one."""
    return [Sampling(every=1), Sampling(every=4), Sampling(every=None, keyframes=True)]


def _seconds_per_row(
    teacher: Teacher, batch_size: int, key: str | None = None, *, max_batches: int | None = None
) -> float:
    """Return the seconds of a row: of all outputs, or of the one with the key `key`.

    On a CPU as many batches run at once as in an extraction, but at most `max_batches`. On a GPU
    one batch runs at a time, since the settings of its kernels apply to the whole process.
    """
    keys = None if key is None else (key,)
    log.info("measuring %s", teacher.name if key is None else f"{teacher.name}: {key}")
    h, w = teacher.view.shape(256, 256)
    images = np.random.default_rng(0).integers(0, 255, (batch_size, h, w, 3), dtype=np.uint8)

    def compute(_: int) -> None:
        teacher.compute(images, keys)

    seconds: list[float] = []
    with batch_threads(teacher.device, max_batches or cores()) as num_threads:
        num_batches = num_threads if teacher.device.type == "cpu" else 1
        with ThreadPoolExecutor(num_batches) as executor:
            # The first batches are not timed: they allocate memory and compile kernels.
            list(executor.map(compute, range(num_batches)))
            while not seconds or (len(seconds) < MAX_TIMED and sum(seconds) < MAX_TIMED_S):
                start_s = time.perf_counter()
                list(executor.map(compute, range(num_batches)))
                seconds.append(time.perf_counter() - start_s)
    return float(np.median(seconds)) / (batch_size * num_batches)


def _decode_seconds(pool: DecodePool, sampling: Sampling, videos: list[tuple[str, Probe]]) -> float:
    """Estimate the seconds of decoding all videos, given as (path, probe).

    A few of them are timed, and their time is scaled by the number of frames.
    """
    if not videos:
        return 0.0
    timed = [videos[i] for i in _spread(len(videos), MAX_TIMED)]
    num_frames = sum(probe.frames for _, probe in timed)
    seconds, _ = _time_decoding(pool, sampling, [path for path, _ in timed])
    timed_rows = sum(min(sampling.rows_bound(probe), MAX_TIMED_ROWS) for _, probe in timed)
    factor = sum(sampling.rows_bound(probe) for _, probe in timed) / max(timed_rows, 1)
    return seconds * factor * sum(probe.frames for _, probe in videos) / max(num_frames, 1)


def _spread(count: int, max_count: int) -> list[int]:
    """Return at most `max_count` of the numbers from 0 to `count` - 1, evenly spread."""
    spread = np.linspace(0, count - 1, min(max_count, count))
    numbers: list[int] = np.unique(spread.astype(int)).tolist()
    return numbers


def _time_decoding(pool: DecodePool, sampling: Sampling, paths: list[str]) -> tuple[float, int]:
    """Decode at most MAX_TIMED_ROWS frames per video; return the seconds and the number of rows."""
    jobs = [DecodeJob(i, path, sampling, max_rows=MAX_TIMED_ROWS) for i, path in enumerate(paths)]
    start_s = time.perf_counter()
    rows = sum(len(event.index) for event in pool.stream(jobs) if isinstance(event, Block))
    return time.perf_counter() - start_s, rows


def _gigabytes(gigabytes: float) -> str:
    return f"{gigabytes:.3g}" if gigabytes >= 0.001 else "< 0.001"


def _show(
    costs: list[dict[str, Any]], num_videos: int, num_probed: int, num_unreadable: int
) -> None:
    """Log a table of the samplings, and one of the outputs if there are several."""
    title = f"{num_videos} videos"
    if num_probed < num_videos:
        title += f", estimated from {num_probed} of them"
    if num_unreadable:
        title += f"; {num_unreadable} cannot be read"
    numbers = [Column(name, number=True) for name in ("rows", "GB", "time")]
    table = Table(title, [Column("frames kept"), *numbers, Column("bound by")])
    for cost in costs:
        bottleneck = (
            "decoding" if cost["hours_decoding"] > cost["hours_teachers"] else "the teachers"
        )
        table.add(
            cost["sampling"],
            f"{cost['rows']:,}",
            _gigabytes(cost["gigabytes"]),
            _duration(cost["hours"]),
            bottleneck,
        )
    log.info(table)
    chosen = costs[0]
    if len(chosen["gigabytes_of"]) > 1:
        output_table = Table(
            f"{chosen['sampling']}: each teacher of the store",
            [Column("teacher"), *(Column(c, number=True) for c in ("rows", "GB", "time alone"))],
        )
        for name, size in chosen["gigabytes_of"].items():
            output_table.add(
                name,
                f"{chosen['rows']:,}",
                _gigabytes(size),
                _duration(chosen["hours_of"][name]),
            )
        log.info(output_table)


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
