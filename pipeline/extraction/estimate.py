"""Estimate an extraction before it starts: rows, GB and hours per way of sampling."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
from .machine import default_decoders, load_teachers, outputs_of, run_record, use_engines
from .planner import StorePlan
from .teacher_runner import batch_threads

log = logging.getLogger(__name__)

# Shorter extractions are over before the measurement pays for itself.
LONG_ROWS = 20_000
SHORTER = "--every 8 keeps fewer frames, --part I/N shares the videos among N machines"
PROBED = 2000  # videos
TIMED = 8  # videos that are decoded, and batches at most, to measure a rate
TIMED_ROWS = 200  # of each of these videos, at most
TIMED_SECONDS = 2.0  # of batches; one that takes longer is timed once
ROW_BYTES = 4 + 8 + 8  # video, index, pts
ENTROPY_BYTES = 4


def dry_run(
    config: ExtractConfig, videos: VideoList | None, device: torch.device
) -> dict[str, Any]:
    """Print and return rows, GB and hours of the chosen sampling and of others; write nothing.

    Rows are upper bounds from the containers, scaled up if only a sample was probed; hours come
    from rates measured on this machine: the teachers on a few batches, the decoder on a few videos.
    On a CPU both share the cores and their hours add up; with a GPU they overlap.
    """
    if videos is None:
        raise UsageError("--dry-run needs a SOURCE")
    teachers = load_teachers(config, device)
    use_engines(
        teachers, config.engine, {}, run_record(config.batch_size, config.precision, device)
    )
    views = list(dict.fromkeys(teacher.view for teacher in teachers))
    chosen = _spread(len(videos), PROBED)
    asked = config.sampling or Sampling()
    options = [asked, *(s for s in _others() if s != asked)]
    teacher_s = sum(_seconds_per_row(t, config.batch_size) for t in teachers)
    outputs = outputs_of(teachers)
    # A forward pass gives several outputs: each one's time is that of its own passes.
    seconds_of = {
        name: _seconds_per_row(of.teacher, config.batch_size, of.key)
        if len(outputs) > 1
        else teacher_s
        for name, of in outputs.items()
    }
    bytes_of = _row_bytes(outputs, config)
    together = sum if device.type == "cpu" else max
    rows_out: list[dict[str, Any]] = []
    with DecodePool(processes=config.decoders or default_decoders(device), views=views) as pool:
        paths = [videos.absolute(i) for i in chosen]
        with progress_bar("probing", len(paths), "videos") as bar:
            probes: list[Probe] = []
            for probe in pool.probe(paths):
                probes.append(probe)
                bar.advance(1)
        good = [
            (path, probe) for path, probe in zip(paths, probes, strict=True) if probe.error is None
        ]
        scale = len(videos) / max(len(chosen), 1)
        for sampling in options:
            rows = scale * sum(sampling.rows_bound(p) for _, p in good)
            decode_s = scale * _decode_seconds(pool, sampling, good)
            rows_out.append(
                {
                    "sampling": sampling.describe(),
                    "rows": int(rows),
                    "gigabytes": rows * (sum(bytes_of.values()) + ROW_BYTES) / 1e9,
                    "gigabytes_of": {n: rows * size / 1e9 for n, size in bytes_of.items()},
                    "hours_of": {n: rows * s / 3600 for n, s in seconds_of.items()},
                    "hours": together([decode_s, rows * teacher_s]) / 3600,
                    "hours_decoding": decode_s / 3600,
                    "hours_teachers": rows * teacher_s / 3600,
                }
            )
    broken = int(scale * (len(probes) - len(good)))
    _show(rows_out, len(videos), len(chosen), broken)
    check_hours(rows_out[0]["hours"], config.max_hours, "this extraction", SHORTER)
    return {
        "dry_run": True,
        "videos": len(videos),
        "probed": len(chosen),
        "unreadable": broken,
        "costs": rows_out,
    }


def announce(
    config: ExtractConfig,
    plan: StorePlan,
    teachers: list[Teacher],
    shards: list[int],
    pool: DecodePool,
    device: torch.device,
    workers: int,
) -> None:
    """Log how long the open shards take and how large they are, and warn of many hours.

    Args:
        config: The options.
        plan: The store and its videos.
        teachers: The teachers, with their engines.
        shards: The open shards.
        pool: The decoding processes of this machine.
        device: What the teachers run on.
        workers: The number of machines or processes that share the work, each like this one.

    Raises:
        UsageError: It takes more than `max_hours`; nothing that is stored is lost.
    """
    index = plan.writer.index
    segments = np.flatnonzero(np.isin(index.shard, shards))
    rows = int(index.bound[segments].sum())
    if rows == 0 or (rows < LONG_ROWS and config.max_hours is None):
        return
    videos = np.unique(index.video[segments])
    paths = [plan.path(int(videos[i])) for i in _spread(len(videos), TIMED)]
    decode_s, decoded = _time_decoding(pool, plan.sampling, paths)
    decode_s /= max(decoded, 1)
    # A worker runs one batch at once, since workers share the cores of a machine.
    on_workers = config.workers is not None or config.scheduler is not None
    at_most = 1 if on_workers else None
    teacher_s = sum(_seconds_per_row(t, config.batch_size, at_most=at_most) for t in teachers)
    seconds = (sum if device.type == "cpu" else max)([decode_s, teacher_s]) * rows
    hours = seconds / 3600 / workers
    sizes = _row_bytes(outputs_of(teachers), config).values()
    size = _gigabytes(rows * (sum(sizes) + ROW_BYTES) / 1e9)
    log.info(f"estimated: {describe_hours(hours)} and {size} GB for at most {rows:,} frames")
    check_hours(hours, config.max_hours, "this extraction", SHORTER)


def _row_bytes(outputs: Mapping[str, TeacherOutput], config: ExtractConfig) -> dict[str, int]:
    """Return the bytes of a row of each output."""
    encoding = config.encoding or DEFAULT
    return {
        name: row_bytes(o.width, encoding) + (ENTROPY_BYTES if o.output == "logits" else 0)
        for name, o in outputs.items()
    }


def _others() -> list[Sampling]:
    return [Sampling(every=1), Sampling(every=4), Sampling(every=None, keyframes=True)]


def _seconds_per_row(
    teacher: Teacher, batch_size: int, key: str | None = None, *, at_most: int | None = None
) -> float:
    """Return the seconds of all outputs of a frame, or of one alone.

    As many batches run at once as in an extraction, or `at_most` as many; on a GPU one, whose
    settings are of the whole process.
    """
    only = None if key is None else (key,)
    log.info("measuring %s", teacher.name if key is None else f"{teacher.name}: {key}")
    h, w = teacher.view.shape(256, 256)
    images = np.random.default_rng(0).integers(0, 255, (batch_size, h, w, 3), dtype=np.uint8)

    def compute(_: int) -> None:
        teacher.compute(images, only)

    seconds: list[float] = []
    with batch_threads(teacher.device, at_most or cores()) as most:
        batches = most if teacher.device.type == "cpu" else 1
        with ThreadPoolExecutor(batches) as pool:
            list(pool.map(compute, range(batches)))  # warm-up: allocations, compiled kernels
            while not seconds or (len(seconds) < TIMED and sum(seconds) < TIMED_SECONDS):
                began = time.perf_counter()
                list(pool.map(compute, range(batches)))
                seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) / (batch_size * batches)


def _decode_seconds(pool: DecodePool, sampling: Sampling, good: list[tuple[str, Probe]]) -> float:
    """Estimate seconds for all probed videos from the time of a few and their share of frames."""
    if not good:
        return 0.0
    few = [good[i] for i in _spread(len(good), TIMED)]
    frames = sum(p.frames for _, p in few)
    seconds, _ = _time_decoding(pool, sampling, [path for path, _ in few])
    bound = sum(min(sampling.rows_bound(p), TIMED_ROWS) for _, p in few)
    share = sum(sampling.rows_bound(p) for _, p in few) / max(bound, 1)
    return seconds * share * sum(p.frames for _, p in good) / max(frames, 1)


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers from 0 to `count` - 1, evenly spread."""
    numbers: list[int] = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()
    return numbers


def _time_decoding(pool: DecodePool, sampling: Sampling, paths: list[str]) -> tuple[float, int]:
    """Decode at most TIMED_ROWS frames of each video; return the seconds and the number of rows."""
    jobs = [DecodeJob(i, path, sampling, max_rows=TIMED_ROWS) for i, path in enumerate(paths)]
    began = time.perf_counter()
    rows = sum(len(event.index) for event in pool.stream(jobs) if isinstance(event, Block))
    return time.perf_counter() - began, rows


def _gigabytes(gigabytes: float) -> str:
    return f"{gigabytes:.3g}" if gigabytes >= 0.001 else "< 0.001"


def _show(rows: list[dict[str, Any]], videos: int, probed: int, broken: int) -> None:
    title = f"{videos} videos" + (f", estimated from {probed} of them" if probed < videos else "")
    numbers = [Column(name, number=True) for name in ("rows", "GB", "time")]
    table = Table(
        title + (f"; {broken} cannot be read" if broken else ""),
        [Column("frames kept"), *numbers, Column("bound by")],
    )
    for r in rows:
        by = "decoding" if r["hours_decoding"] > r["hours_teachers"] else "the teachers"
        table.add(
            r["sampling"], f"{r['rows']:,}", _gigabytes(r["gigabytes"]), _shown(r["hours"]), by
        )
    log.info(table)
    first = rows[0]
    if len(first["gigabytes_of"]) > 1:
        each = Table(
            f"{first['sampling']}: what each teacher of the store takes",
            [Column("teacher"), *(Column(c, number=True) for c in ("rows", "GB", "time alone"))],
        )
        for name, size in first["gigabytes_of"].items():
            each.add(name, f"{first['rows']:,}", _gigabytes(size), _shown(first["hours_of"][name]))
        log.info(each)


def _shown(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
