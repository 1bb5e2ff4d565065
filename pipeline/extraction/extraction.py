"""An extraction from the listed videos to the last commit: what `extract-targets` does."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..common.config import write_config
from ..common.console import Console
from ..common.dask_workers import cluster
from ..common.devices import resolve_device
from ..common.errors import SameFailure, StoreError, UsageError, full_disk
from ..common.processes import cores
from ..common.run_dir import config_next_to
from ..common.streams import counted
from ..corpus.sources import Part, VideoList, escape_path
from ..store.index import FAILED, OK, PENDING
from ..store.layout import check_root
from ..store.staging import ShardResult
from ..store.writer import StoreWriter, with_engine
from ..teachers.teacher import Teacher, TeacherOutput
from ..video.geometry import View
from ..video.perceptual_hash import HASH_VIEW
from ..video.pool.decode_pool import DecodePool
from ..video.pool.messages import INTERNAL
from ..video.sampling import Sampling
from .estimate import announce, dry_run
from .extract_options import ExtractConfig
from .machine import (
    default_decoders,
    load_teachers,
    outputs_of,
    run_record,
    use_engines,
    with_precision,
)
from .planner import (
    StorePlan,
    add_new_videos,
    check_unchanged,
    hashed_in_part,
    ids_of,
    new_videos,
    open_tasks,
    plan_overflow,
    plan_segments,
    tasks,
)
from .retry import copy_stored, plan_retries
from .shard_filler import ShardFiller, ShardTask
from .teacher_check import check_fingerprints, examine_teachers, prove_teachers
from .teacher_runner import TeacherRunner, batch_threads

if TYPE_CHECKING:
    from distributed import Client


def extract(
    config: ExtractConfig, listed: VideoList | None, pool: DecodePool, console: Console
) -> dict[str, Any]:
    """Extract targets of the listed videos (None: of those of the store), and count what was done.

    Args:
        config: Of the command.
        listed: The videos of all parts.
        pool: Without views so far; it may have begun to probe the videos.
        console: Prints the messages and the progress.

    Raises:
        TeacherError: A teacher cannot be loaded or run; WeightsError for its weights.
        StoreError: The store cannot be opened or written; StoreMismatchError if it holds something
            else.
        DeviceError: This machine has no such device.
    """
    config_file = config_next_to(config.out)
    device = resolve_device(config.device)
    asked_config, config = config, with_precision(config, device)
    if config.dry_run:
        return dry_run(config, None if listed is None else _share(config, listed, console), device)
    pool.use_at_most(config.decoders or default_decoders(device))
    sampling = _sampling(config)
    loaded = load_teachers(config, device)
    teachers = outputs_of(loaded)
    names = list(teachers)
    _check_accepted(config, teachers)
    fingerprints = examine_teachers(loaded)
    views = list(dict.fromkeys(teacher.view for teacher in loaded))
    pool.show([*views, HASH_VIEW])
    with ExitStack() as stack:
        stack.enter_context(_naming(config.out))
        writer = stack.enter_context(
            StoreWriter(
                config.out,
                sampling=sampling.model_dump(),
                shard_rows=config.shard_rows,
                origin=None if listed is None else {"part": config.part},
            )
        )
        client = None
        if config.scheduler is not None:
            from .cluster import run_of_workers

            client = stack.enter_context(cluster(None, config.scheduler))
            run = run_of_workers(client, config)
        else:
            run = run_record(config.batch_size, config.precision, device)
        engines = use_engines(loaded, config.engine, writer.numerics(), run)
        asked: dict[str, dict[str, Any]] = {
            name: {
                "attributes": {**attributes, "run": with_engine(run, engines, name)},
                "encoding": config.encoding,
                "output": teachers[name].output,
                "width": teachers[name].width,
                "allow_different_numerics": config.allow_different_numerics,
            }
            for name, attributes in _records(config, loaded).items()
        }
        for name in names:  # before videos are listed, since those stay
            writer.check_teacher(name, **asked[name])
        without = check_fingerprints(writer, fingerprints)
        plan = StorePlan(writer)
        videos = None if listed is None else _share(config, plan.locate(listed), console)
        if without and _grows(config, plan, videos, names):
            prove_teachers(
                plan, without, teachers, fingerprints, config.accept_teachers, pool, views
            )
        if listed is not None and videos is not None:
            _add_videos(config, plan, videos, len(listed), pool, console)
        plan_segments(plan, pool)
        if config.retry_failed:
            plan_retries(plan, names, pool, run)
        for name, teacher in teachers.items():
            record = fingerprints[name].record()
            writer.add_teacher(name, teacher.classes, **asked[name], fingerprint=record)
        copy_stored(plan, names)
        shards = open_tasks(plan, names)
        announce(config, plan, loaded, shards, pool, device, _workers(config, client))
        began = time.monotonic()
        if config.workers is not None:
            client = stack.enter_context(cluster(config.workers, None))
        fill = (
            _cluster_fill(config, plan, teachers, run, engines, client)
            if client is not None
            else stack.enter_context(_local_fill(config, plan, teachers, pool, views, device))
        )
        done, idle = 0, True
        # With --retry-failed, videos that failed before may all fail again. Where rows are stored
        # already, the last videos of a run that was killed may all fail.
        watch = SameFailure(0 if config.retry_failed else config.max_failures)
        all_of_fewer = not (writer.index.state == OK).any()
        while shards := open_tasks(plan, names):
            idle = False
            for shard in set(shards).intersection(hashed_in_part(plan)):
                writer.drop_hashes(shard)  # their videos are decoded anyway
            done += _run_shards(
                plan, shards, names, fill, run, engines, watch, all_of_fewer, console
            )
            plan_overflow(plan, pool)
        write_config(config_file, "extract-targets", asked_config)
        seconds = time.monotonic() - began
        ids = None if videos is None else ids_of(plan, videos)
        result = _summary(plan, names, ids, done, seconds, console)
        if idle:
            console.info("nothing to do: every video has its targets or a reason why not")
        else:
            console.info(
                f"{done} new rows in {seconds:.1f} s ({done / max(seconds, 1e-9):.0f} frames/s)"
            )
        root = shlex.quote(str(plan.writer.root))
        commands = [f"distinit targets info {root}"]
        if result["complete"]:
            commands.append(f"distinit train-student --store {root} --out runs/student")
        return result | {"next": commands}


def _workers(config: ExtractConfig, client: Client | None) -> int:
    """Return how many workers share the shards."""
    if client is not None:
        return max(1, len(client.scheduler_info()["workers"]))
    return config.workers or 1


NAMED = 3  # videos named per reason of a failure
# How reasons of version 0.1 begin that were a fault of its own: with PyAV 19 it failed on every
# video.
OF_0_1 = ("the decoder process ended with status", "TypeError: ")
Fill = Callable[[Iterator[ShardTask], Callable[[int], Any]], Iterator[ShardResult]]


@contextmanager
def _local_fill(
    config: ExtractConfig,
    plan: StorePlan,
    teachers: dict[str, TeacherOutput],
    pool: DecodePool,
    views: list[View],
    device: torch.device,
) -> Iterator[Fill]:
    """Yield a function that fills shards in this process."""

    def fill(work: Iterator[ShardTask], advance: Callable[[int], Any]) -> Iterator[ShardResult]:
        return ShardFiller(
            plan.writer.root,
            runner,
            pool,
            sampling=plan.sampling,
            shard_rows=plan.writer.shard_rows,
            advance=advance,
        ).fill(work)

    with (
        batch_threads(device, cores()) as threads,
        TeacherRunner(teachers, views, batch_size=config.batch_size, threads=threads) as runner,
    ):
        yield fill


def _cluster_fill(
    config: ExtractConfig,
    plan: StorePlan,
    teachers: dict[str, TeacherOutput],
    run: dict[str, Any],
    engines: dict[str, str],
    client: Client,
) -> Fill:
    """Return a function that fills shards on the workers of a dask cluster."""
    from .cluster import WorkerSetup, run_shards

    def fill(work: Iterator[ShardTask], advance: Callable[[int], Any]) -> Iterator[ShardResult]:
        setup = WorkerSetup.of(config, plan.writer, teachers, plan.sampling, run, engines)
        for result in run_shards(client, setup, work, retries=config.retries):
            advance(result.rows)
            yield result

    return fill


def _run_shards(
    plan: StorePlan,
    shards: list[int],
    teachers: list[str],
    fill: Fill,
    run: dict[str, Any],
    engines: dict[str, str],
    watch: SameFailure,
    all_of_fewer: bool,
    console: Console,
) -> int:
    """Do one pass over open shards; return the rows done.

    Each is committed as soon as it is complete; the first ones are held back until one video does
    not fail for the same reason as the others.
    """
    index = plan.writer.index
    bound = int(index.bound[np.isin(index.shard, shards)].sum())
    done = 0
    held: list[ShardResult] = []
    with console.progress("extracting", total=bound, unit="frames") as bar:
        for result in fill(tasks(plan, shards, teachers), bar.advance):
            for segment in np.flatnonzero(index.shard == result.shard).tolist():
                video = int(index.video[segment])
                watch.add(video, _reason(result, segment), plan.path(video))
            held.append(result)
            done += result.rows
            if not watch.watching:
                _commit(plan, held, run, engines)
        if all_of_fewer:
            watch.finish()
        _commit(plan, held, run, engines)
        bar.set_total(done)
    return done


def _commit(
    plan: StorePlan, held: list[ShardResult], run: dict[str, Any], engines: dict[str, str]
) -> None:
    while held:
        plan.writer.commit(held.pop(0), run, engines)


def _reason(result: ShardResult, segment: int) -> str | None:
    """Why a segment has no rows, None where a teacher has some."""
    if result.frames is not None and segment in result.frames.failed:
        return result.frames.failed[segment]
    reasons = [part.failed.get(segment) for part in result.teachers.values()]
    return None if not reasons or None in reasons else reasons[0]


def _share(config: ExtractConfig, listed: VideoList, console: Console) -> VideoList:
    """Return the listed videos that belong to this run's part."""
    if config.part is None:
        return listed
    videos = Part.parse(config.part).share(listed)
    console.info(f"part {config.part}: {len(videos)} of {len(listed)} videos")
    return videos


def _check_accepted(config: ExtractConfig, teachers: dict[str, TeacherOutput]) -> None:
    for name in config.accept_teachers:
        if name not in teachers:
            raise UsageError(
                f"--accept-teacher {name}: is none of this command's teachers: {', '.join(teachers)}"
            )


def _grows(
    config: ExtractConfig, plan: StorePlan, videos: VideoList | None, teachers: list[str]
) -> bool:
    """Check whether there is anything to add: videos, shards, or failed videos to retry."""
    if config.retry_failed or (videos is not None and new_videos(plan, videos)):
        return True
    index = plan.writer.index
    known = [name for name in teachers if name in index.teachers]
    return len(np.unique(index.video)) < index.n_videos or bool(open_tasks(plan, known))


def _add_videos(
    config: ExtractConfig,
    plan: StorePlan,
    videos: VideoList,
    listed: int,
    pool: DecodePool,
    console: Console,
) -> None:
    """Add the new videos to the store; `listed` is the number of videos of all parts."""
    check_unchanged(plan, videos)
    added = add_new_videos(plan, videos, pool, config.max_failures)
    num_existing = plan.writer.index.n_videos - added
    if added and num_existing:
        console.info(f"{added} new videos, {num_existing} are in the store already")
    if config.part is not None:
        # From the whole list, so that all parts have shards of one size and can be merged.
        rows = plan.writer.set_shard_rows_for(listed * _rows_of_a_clip(plan.sampling))
        console.info(
            f"shards of {rows} rows; the parts of a merge need the same (--shard-rows {rows})"
        )


def _records(config: ExtractConfig, loaded: list[Teacher]) -> dict[str, dict[str, Any]]:
    """Return what the store records of each output of a teacher, its numerics aside."""
    return {
        name: {
            "name": name,
            "identity": teacher.identity(config.precision, key),
            "provenance": {**teacher.provenance(), "spec": spec.record(key)},
            **TeacherOutput(teacher, key).view_attributes(),
        }
        for teacher, spec in zip(loaded, config.teachers, strict=True)
        for key, name in teacher.store_names.items()
    }


def _sampling(config: ExtractConfig) -> Sampling:
    """Return the sampling asked for, else that of the existing store, else every 4th frame."""
    if config.sampling is not None:
        return config.sampling
    if (config.out / "zarr.json").exists():
        return Sampling.model_validate(check_root(config.out)["sampling"])
    return Sampling()


def _rows_of_a_clip(sampling: Sampling) -> int:
    """Return the rows of a video of 10 s.

    The size of the shards of parts follows from it, since no part has seen all videos.
    """
    if sampling.keyframes:
        return 10
    return round(10 * sampling.fps) if sampling.fps is not None else 300 // (sampling.every or 1)


@contextmanager
def _naming(store: Path) -> Iterator[None]:
    """Name the store in the error of a full disk that names no file: write(2) does not know it."""
    try:
        yield
    except Exception as error:
        full = full_disk(error)
        if full is not None and not full.filename:
            full.filename = str(store)
        raise


def _summary(
    plan: StorePlan,
    teachers: list[str],
    listed: list[int] | None,
    done: int,
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    """Return what the store holds.

    `complete` is False where no listed video is usable, or one failed by a fault of distinit.
    """
    index = plan.writer.index
    state = index.video_state()
    if (state == PENDING).any():
        raise StoreError(
            f"{plan.writer.root}: {int((state == PENDING).sum())} videos are left without a status"
        )
    reasons = index.video_reasons()
    failures = Counter(reasons.values())
    _say_failures(plan, reasons, "failed", console)
    under: dict[str, Counter[str]] = {}
    for name in teachers:
        alone = {v: text for v, text in index.video_reasons(name).items() if v not in reasons}
        under[name] = Counter(alone.values())
        _say_failures(plan, alone, f"failed under {name} alone", console)
    internal = sum(
        count for reason, count in failures.items() if reason.startswith((INTERNAL, *OF_0_1))
    )
    if internal:
        console.warn(
            f"{internal} videos failed by an internal error: see the log; --retry-failed tries again"
        )
    usable = state[listed] if listed is not None else state
    if len(usable) and not (usable == OK).any():
        console.warn("no video of the sources is usable")
    return {
        "store": str(plan.writer.root),
        "complete": not internal and (not len(usable) or bool((usable == OK).any())),
        "videos": int(index.n_videos),
        "ok": int((state == OK).sum()),
        "failed": int((state == FAILED).sum()),
        "failures": dict(failures.most_common(100)),
        "rows": int(index.rows[(index.state == OK) & index.live].sum()),
        "new_rows": done,
        "seconds": round(seconds, 2),
        "teachers": {t: int(((index.teacher_state(t)) == OK).sum()) for t in teachers},
        "teacher_failures": {t: dict(failed.most_common(100)) for t, failed in under.items()},
    }


def _say_failures(plan: StorePlan, reasons: Mapping[int, str], how: str, console: Console) -> None:
    """Log how many videos failed, why, and the names of the first ones of each reason."""
    if not reasons:
        return
    root = plan.writer.root
    console.info(
        f"{counted(len(reasons), 'video')} {how}; `distinit targets info {root} --failed` lists all:"
    )
    for reason, count in Counter(reasons.values()).most_common(10):
        some = [v for v, text in reasons.items() if text == reason][:NAMED]
        names = ", ".join(escape_path(plan.path(v)) for v in some)
        console.info(f"  {count:6d}  {reason}: {names}{', …' if count > len(some) else ''}")
