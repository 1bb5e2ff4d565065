"""Stage one: frozen image teachers look at the sampled frames of every video, once."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from ..pipeline.config import Options
from ..pipeline.corpus.parts import Part
from ..pipeline.corpus.sources import VideoList, list_videos
from ..pipeline.devices import resolve_device
from ..pipeline.errors import StoreError, UsageError
from ..pipeline.targets.encoding import Encoding
from ..pipeline.targets.index import FAILED, OK, PENDING
from ..pipeline.targets.shard import ShardResult
from ..pipeline.targets.writer import StoreWriter
from ..pipeline.teachers.teacher import Teacher, TeacherSpec, load_teacher
from ..pipeline.video.geometry import View
from ..pipeline.video.pool import DecodePool
from ..pipeline.video.sampling import Sampling
from .config import write_config
from .extract_plan import (
    StorePlan,
    add_new_videos,
    check_unchanged,
    open_tasks,
    plan_overflow,
    plan_retries,
    plan_segments,
    tasks,
)
from .extract_work import ShardFiller, ShardTask
from .screen import Screen


class ExtractConfig(Options):
    """Everything `distinit extract-targets` can be told."""

    sources: list[str] = []
    part: str | None = None
    out: Path
    teachers: list[TeacherSpec] = Field(min_length=1)
    sampling: Sampling | None = None
    batch_size: int = Field(32, ge=1)
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    decoders: int | None = Field(None, ge=1)
    timeout_s: float = Field(120, gt=0)
    memory_gb: float = Field(4, gt=0)
    shard_rows: int | None = None
    encoding: Encoding | None = None
    retry_failed: bool = False
    accept_run: bool = False
    workers: int | None = Field(None, ge=1)
    scheduler: str | None = None
    retries: int = Field(2, ge=0)
    dry_run: bool = False

    @field_validator("part")
    @classmethod
    def _a_part(cls, part: str | None) -> str | None:
        return None if part is None else str(Part.parse(part))

    @model_validator(mode="after")
    def _one_cluster(self) -> ExtractConfig:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("give --workers (a local cluster) or --scheduler (an existing one), not both")
        return self


def extract_targets(config: ExtractConfig, screen: Screen) -> dict[str, Any]:
    """List, probe, plan, decode, infer, commit; returns what the store holds afterwards.

    Running it again on the same sources continues where it was stopped, and does nothing when all is done.
    Raises SourceError, TeacherError, WeightsError, StoreError, StoreMismatchError, DeviceError.
    """
    device = resolve_device(config.device)
    videos = listed = _list(config, screen)
    if listed is not None and config.part is not None:
        videos = Part.parse(config.part).share(listed)
        screen.say(f"part {config.part}: {len(videos)} of {len(listed)} videos")
    if config.dry_run:
        from .extract_dry_run import dry_run

        return dry_run(config, videos, device, screen)
    sampling = _sampling(config)
    teachers = load_teachers(config, device, screen)
    views = list(dict.fromkeys(t.view for t in teachers.values()))
    decoders = config.decoders or default_decoders(device)
    with ExitStack() as stack:
        stack.enter_context(_naming(config.out))
        writer = stack.enter_context(
            StoreWriter(
                config.out,
                sampling=sampling.model_dump(),
                shard_rows=config.shard_rows,
                origin=None if videos is None else {"part": config.part},
            )
        )
        pool = stack.enter_context(
            DecodePool(
                processes=decoders, views=views, memory_gb=config.memory_gb, timeout_s=config.timeout_s
            )
        )
        plan = StorePlan(writer, videos)
        if videos is not None:
            check_unchanged(plan, videos)
            added = add_new_videos(plan, videos, pool, screen)
            if added and writer.index.n_videos > added:
                screen.say(f"{added} new videos, {writer.index.n_videos - added} are in the store already")
        if config.part is not None and listed is not None:
            # From the whole list, so that all parts have shards of one size and can be merged.
            rows = writer.set_shard_rows_for(len(listed) * _rows_of_a_clip(sampling))
            screen.say(f"shards of {rows} rows; the parts of a merge need the same (--shard-rows {rows})")
        plan_segments(plan, pool, screen)
        if config.retry_failed:
            screen.say(f"{plan_retries(plan, list(teachers), pool, screen)} failed stretches are tried again")
        run = run_record(config, device)
        specs = dict(zip(teachers, config.teachers, strict=True))
        for name, teacher in teachers.items():
            attributes = {
                "name": name,
                "identity": teacher.identity(config.precision),
                "provenance": {**teacher.provenance(), "spec": specs[name].record()},
                "run": run,
            }
            writer.add_teacher(
                name, teacher.classes, attributes, encoding=config.encoding, accept_run=config.accept_run
            )
        began = time.monotonic()
        fill = stack.enter_context(_filling(config, writer, teachers, pool, views, device, decoders, screen))
        done = 0
        while shards := open_tasks(plan, list(teachers)):
            done += _run_shards(plan, shards, list(teachers), fill, run, screen)
            plan_overflow(plan, pool)
        write_config(_beside(config.out), "extract-targets", config)
        return _summary(plan, list(teachers), done, time.monotonic() - began, screen)


Fill = Callable[[Iterator[ShardTask], Callable[[int], Any]], Iterator[ShardResult]]


@contextmanager
def _filling(
    config: ExtractConfig,
    writer: StoreWriter,
    teachers: dict[str, Teacher],
    pool: DecodePool,
    views: list[View],
    device: torch.device,
    decoders: int,
    screen: Screen,
) -> Iterator[Fill]:
    """How shards are filled: in this process, or by the workers of a dask cluster."""
    sampling = Sampling.model_validate(writer.attributes["sampling"])
    if config.workers is None and config.scheduler is None:

        def here(work: Iterator[ShardTask], advance: Callable[[int], Any]) -> Iterator[ShardResult]:
            filler = ShardFiller(writer.root, teachers, pool, views, sampling=sampling,
                                 shard_rows=writer.shard_rows, batch_size=config.batch_size,
                                 advance=advance)  # fmt: skip
            return filler.fill(work)

        with _threads(device, decoders):
            yield here
        return
    from .extract_cluster import WorkerSetup, cluster, run_shards

    with cluster(config.workers, config.scheduler, screen) as client:

        def there(work: Iterator[ShardTask], advance: Callable[[int], Any]) -> Iterator[ShardResult]:
            setup = WorkerSetup.of(config, writer, teachers, sampling)
            for result in run_shards(client, setup, work, retries=config.retries):
                advance(result.rows)
                yield result

        yield there


def _run_shards(
    plan: StorePlan, shards: list[int], teachers: list[str], fill: Fill, run: dict[str, Any], screen: Screen
) -> int:
    """One pass over open shards; each is committed as soon as it is whole. Returns the rows done."""
    index = plan.writer.index
    bound = int(index.bound[np.isin(index.shard, shards)].sum())
    done = 0
    with screen.progress("extracting", total=bound, unit="frames") as bar:
        for result in fill(tasks(plan, shards, teachers), bar.advance):
            plan.writer.commit(result, run)
            done += result.rows
        bar.set_total(done)
    return done


def _list(config: ExtractConfig, screen: Screen) -> VideoList | None:
    """The listed sources; None (all that the store lists) without sources on an existing store."""
    if not config.sources:
        if not config.out.exists():
            raise UsageError(f"no SOURCE given, and {config.out} does not exist yet")
        return None
    videos = list_videos(config.sources)
    ignored = ", ".join(f"{n} {ext or 'without extension'}" for ext, n in sorted(videos.ignored.items()))
    names = ", ".join(c.name for c in videos.corpora)
    screen.say(f"{len(videos)} videos in {names}" + (f" (not videos: {ignored})" if ignored else ""))
    return videos


def _sampling(config: ExtractConfig) -> Sampling:
    """The sampling asked for; where none was, that of the existing store, else every 4th frame."""
    if config.sampling is not None:
        return config.sampling
    if (config.out / "zarr.json").exists():
        from ..pipeline.targets.format import check_root

        return Sampling.model_validate(check_root(config.out)["sampling"])
    return Sampling()


def _rows_of_a_clip(sampling: Sampling) -> int:
    """Rows of a video of 10 s: what the shards of parts go by, of which none has seen all videos."""
    if sampling.keyframes:
        return 10
    return round(10 * sampling.fps) if sampling.fps is not None else 300 // (sampling.every or 1)


def load_teachers(config: ExtractConfig, device: torch.device, screen: Screen) -> dict[str, Teacher]:
    """The teachers by their name in the store, on the device; UsageError for the same name twice."""
    teachers: dict[str, Teacher] = {}
    for spec in config.teachers:
        teacher = load_teacher(spec)
        if teacher.name in teachers:
            raise UsageError(f"--teacher: {teacher.name} is named twice")
        teachers[teacher.name] = teacher.to(device, config.precision)
    return teachers


def default_decoders(device: torch.device) -> int:
    """Decode processes: half of the cores beside a teacher on the CPU, all but one beside a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 2 if device.type == "cpu" else cores - 1)


def run_record(config: ExtractConfig, device: torch.device) -> dict[str, Any]:
    """What makes equal inputs give equal bits; recorded with the teacher and in every commit."""
    return {
        "batch_size": config.batch_size,
        "precision": config.precision,
        "torch": torch.__version__.split("+")[0],
        "device": device.type,
    }


class _threads:
    """Torch threads = cores − decoders while a teacher runs on the CPU: more of them spin (MEASURED)."""

    def __init__(self, device: torch.device, decoders: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.wanted = max(1, cores - decoders) if device.type == "cpu" else torch.get_num_threads()

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.wanted)

    def __exit__(self, *exc: object) -> None:
        torch.set_num_threads(self.before)


@contextmanager
def _naming(store: Path) -> Iterator[None]:
    """Let a full disk say which: what writes below does not know."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and not error.filename:
            error.filename = str(store)
        raise


def _beside(store: Path) -> Path:
    return store.with_name(store.name + ".config.yaml")


def _summary(
    plan: StorePlan, teachers: list[str], done: int, seconds: float, screen: Screen
) -> dict[str, Any]:
    index = plan.writer.index
    state = index.video_state()
    reasons = index.video_reasons()
    failures = Counter(reasons.values())
    if failures:
        screen.say(f"{len(reasons)} videos failed; `distinit targets info {plan.writer.root} --failed` lists them:")
        for reason, count in failures.most_common(10):
            screen.say(f"  {count:6d}  {reason}")
    rows = int(index.rows[(index.state == OK) & index.live].sum())
    if done:
        screen.say(f"{done} new rows in {seconds:.1f} s ({done / max(seconds, 1e-9):.0f} frames/s)")
    else:
        screen.say("nothing to do: every video has its targets or a reason why not")
    if (state == PENDING).any():
        raise StoreError(f"{plan.writer.root}: {int((state == PENDING).sum())} videos are left without a status")
    return {
        "store": str(plan.writer.root),
        "videos": int(index.n_videos),
        "ok": int((state == OK).sum()),
        "failed": int((state == FAILED).sum()),
        "failures": dict(failures.most_common(100)),
        "rows": rows,
        "new_rows": done,
        "seconds": round(seconds, 2),
        "teachers": {t: int(((index.teacher_state(t)) == OK).sum()) for t in teachers},
    }
