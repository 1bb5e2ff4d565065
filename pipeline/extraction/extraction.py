"""Extract the targets of videos: the engine of `extract-targets`, from plan to last commit."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from ..teachers.fingerprint import Fingerprint
from ..teachers.teacher import Teacher, TeacherOutput
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
    views_of,
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
    """Extract the targets of videos and return a summary of the store.

    Args:
        config: The options of the command.
        listed: The videos of all parts; None for those that the store lists.
        pool: Decodes the videos. It has no views yet, and may have begun to probe the videos.
        console: Prints the messages and the progress.

    Raises:
        TeacherError: A teacher cannot be loaded or run.
        WeightsError: The weights of a teacher cannot be loaded.
        StoreError: The store cannot be opened or written.
        StoreMismatchError: The store holds something else.
        DeviceError: This machine has no such device.
    """
    config_file = config_next_to(config.out)
    device = resolve_device(config.device)
    command_config, config = config, with_precision(config, device)
    if config.dry_run:
        return dry_run(config, None if listed is None else _share(config, listed, console), device)
    pool.use_at_most(config.decoders or default_decoders(device))
    sampling = _sampling(config)
    loaded = load_teachers(config, device)
    _check_accepted(config, outputs_of(loaded))
    fingerprints = examine_teachers(loaded)
    pool.show([*views_of(loaded), HASH_VIEW])
    with ExitStack() as stack:
        stack.enter_context(_naming(config.out))
        writer = stack.enter_context(_open_writer(config, sampling, listed))
        client: Client | None = None
        if config.scheduler is not None:
            client = stack.enter_context(cluster(None, config.scheduler))
        run = _numerics(config, client, device)
        engines = use_engines(loaded, config.engine, writer.numerics(), run)
        teachers = _Teachers(loaded, fingerprints, run, engines)
        plan, videos = _plan_store(config, writer, listed, teachers, pool, console)
        shards = open_tasks(plan, teachers.names)
        announce(config, plan, loaded, shards, pool, device, _num_workers(config, client))
        start_s = time.monotonic()
        if config.workers is not None:
            client = stack.enter_context(cluster(config.workers, None))
        fill = (
            _cluster_fill(config, plan, teachers, client)
            if client is not None
            else stack.enter_context(_local_fill(config, plan, teachers, pool, device))
        )
        num_rows = _fill_store(config, plan, teachers, pool, fill, console)
        write_config(config_file, "extract-targets", command_config)
        seconds = time.monotonic() - start_s
        ids = None if videos is None else ids_of(plan, videos)
        result = _summary(plan, teachers.names, ids, num_rows, seconds, console)
        if shards:
            rate = num_rows / max(seconds, 1e-9)
            console.info(f"{num_rows} new rows in {seconds:.1f} s ({rate:.0f} frames/s)")
        else:
            console.info("nothing to do: every video has its targets or a reason why not")
        return result | {"next": _next_commands(plan, complete=result["complete"])}


@dataclass(frozen=True)
class _Teachers:
    """The loaded teachers of a run, with what the store records of their outputs.

    Dictionaries are keyed by the outputs' names in the store.
    """

    loaded: list[Teacher]
    fingerprints: dict[str, Fingerprint]
    run: dict[str, Any]
    """The numerics, without the engine."""
    engines: dict[str, str]

    @property
    def outputs(self) -> dict[str, TeacherOutput]:
        """All outputs."""
        return outputs_of(self.loaded)

    @property
    def names(self) -> list[str]:
        """The names of the outputs."""
        return list(self.outputs)

    def records(self, config: ExtractConfig) -> dict[str, dict[str, Any]]:
        """Return the arguments that the store's writer takes to check and to add each output."""
        return {
            name: {
                "attributes": {
                    "name": name,
                    "identity": output.identity(config.precision),
                    "provenance": {**teacher.provenance(), "spec": spec.record(output.key)},
                    **output.view_attributes(),
                    "run": with_engine(self.run, self.engines, name),
                },
                "encoding": config.encoding,
                "output": output.output,
                "width": output.width,
                "allow_different_numerics": config.allow_different_numerics,
            }
            for teacher, spec in zip(self.loaded, config.teachers, strict=True)
            for name, output in outputs_of([teacher]).items()
        }


def _open_writer(
    config: ExtractConfig, sampling: Sampling, listed: VideoList | None
) -> StoreWriter:
    return StoreWriter(
        config.out,
        sampling=sampling.model_dump(),
        shard_rows=config.shard_rows,
        origin=None if listed is None else {"part": config.part},
    )


def _numerics(config: ExtractConfig, client: Client | None, device: torch.device) -> dict[str, Any]:
    """Return the numerics of the machine that runs the teachers."""
    if client is None:
        return run_record(config.batch_size, config.precision, device)
    from .cluster import run_of_workers

    return run_of_workers(client, config)


def _plan_store(
    config: ExtractConfig,
    writer: StoreWriter,
    listed: VideoList | None,
    teachers: _Teachers,
    pool: DecodePool,
    console: Console,
) -> tuple[StorePlan, VideoList | None]:
    """Check the teachers against the store, and add teachers, videos and their segments to it.

    Returns:
        The plan, and the listed videos of this part as the store lists them.
    """
    records = teachers.records(config)
    # Teachers are checked before videos are listed, since listed videos stay in the store.
    for name, record in records.items():
        writer.check_teacher(name, **record)
    unproved = check_fingerprints(writer, teachers.fingerprints)
    plan = StorePlan(writer)
    videos = None if listed is None else _share(config, plan.locate(listed), console)
    if unproved and _grows(config, plan, videos, teachers.names):
        prove_teachers(
            plan,
            unproved,
            teachers.outputs,
            teachers.fingerprints,
            config.accept_teachers,
            pool,
            views_of(teachers.loaded),
        )
    if listed is not None and videos is not None:
        _add_videos(config, plan, videos, len(listed), pool, console)
    plan_segments(plan, pool)
    if config.retry_failed:
        plan_retries(plan, teachers.names, pool, teachers.run)
    for name, output in teachers.outputs.items():
        fingerprint = teachers.fingerprints[name].record()
        writer.add_teacher(name, output.classes, **records[name], fingerprint=fingerprint)
    copy_stored(plan, teachers.names)
    return plan, videos


def _num_workers(config: ExtractConfig, client: Client | None) -> int:
    """Return the number of workers that share the shards."""
    if client is not None:
        return max(1, len(client.scheduler_info()["workers"]))
    return config.workers or 1


def _fill_store(
    config: ExtractConfig,
    plan: StorePlan,
    teachers: _Teachers,
    pool: DecodePool,
    fill: Fill,
    console: Console,
) -> int:
    """Fill and commit the open shards until none is left; return the number of new rows."""
    writer = plan.writer
    num_rows = 0
    # With --retry-failed, videos that failed before may all fail again. Where rows are stored
    # already, the last videos of a run that was killed may all fail.
    watch = SameFailure(0 if config.retry_failed else config.max_failures)
    store_is_empty = not (writer.index.state == OK).any()
    while shards := open_tasks(plan, teachers.names):
        # The videos of these shards are decoded in any case, so that all hashes are made again.
        for shard in set(shards).intersection(hashed_in_part(plan)):
            writer.drop_hashes(shard)
        num_rows += _run_shards(plan, shards, teachers, fill, watch, store_is_empty, console)
        # Segments with more rows than planned are planned again and filled in the next pass.
        plan_overflow(plan, pool)
    return num_rows


def _next_commands(plan: StorePlan, *, complete: bool) -> list[str]:
    root = shlex.quote(str(plan.writer.root))
    commands = [f"distinit targets info {root}"]
    if complete:
        commands.append(f"distinit train-student --store {root} --out runs/student")
    return commands


NUM_EXAMPLES = 3  # videos named per reason of a failure
# The first words of reasons that version 0.1 recorded by a fault of its own: with PyAV 19 it failed
# on every video.
FAULTS_OF_0_1 = ("the decoder process ended with status", "TypeError: ")
Fill = Callable[[Iterator[ShardTask], Callable[[int], Any]], Iterator[ShardResult]]
"""Fills the shards of tasks, and calls its second argument with the number of rows done."""


@contextmanager
def _local_fill(
    config: ExtractConfig,
    plan: StorePlan,
    teachers: _Teachers,
    pool: DecodePool,
    device: torch.device,
) -> Iterator[Fill]:
    """Yield a function that fills shards in this process."""

    def fill(
        shard_tasks: Iterator[ShardTask], advance: Callable[[int], Any]
    ) -> Iterator[ShardResult]:
        return ShardFiller(
            plan.writer.root,
            runner,
            pool,
            sampling=plan.sampling,
            shard_rows=plan.writer.shard_rows,
            advance=advance,
        ).fill(shard_tasks)

    views = views_of(teachers.loaded)
    with (
        batch_threads(device, cores()) as threads,
        TeacherRunner(
            teachers.outputs, views, batch_size=config.batch_size, threads=threads
        ) as runner,
    ):
        yield fill


def _cluster_fill(
    config: ExtractConfig, plan: StorePlan, teachers: _Teachers, client: Client
) -> Fill:
    """Return a function that fills shards on the workers of a dask cluster."""
    from .cluster import WorkerSetup, run_shards

    def fill(
        shard_tasks: Iterator[ShardTask], advance: Callable[[int], Any]
    ) -> Iterator[ShardResult]:
        setup = WorkerSetup.of(
            config, plan.writer, teachers.outputs, plan.sampling, teachers.run, teachers.engines
        )
        for result in run_shards(client, setup, shard_tasks, retries=config.retries):
            advance(result.rows)
            yield result

    return fill


def _run_shards(
    plan: StorePlan,
    shards: list[int],
    teachers: _Teachers,
    fill: Fill,
    watch: SameFailure,
    store_is_empty: bool,
    console: Console,
) -> int:
    """Fill open shards in one pass; return the number of new rows.

    Each shard is committed as soon as it is complete. The first ones are held back until one video
    does not fail for the same reason as the others.

    Args:
        plan: The store and its videos.
        shards: The open shards.
        teachers: The teachers, with their numerics.
        fill: Fills the shards.
        watch: Stops the run if the first videos all fail for one reason.
        store_is_empty: Whether the watch also stops a run of fewer videos that all fail.
        console: Shows the progress.
    """
    index = plan.writer.index
    max_rows = int(index.bound[np.isin(index.shard, shards)].sum())
    num_rows = 0
    held: list[ShardResult] = []
    with console.progress("extracting", total=max_rows, unit="frames") as bar:
        for result in fill(tasks(plan, shards, teachers.names), bar.advance):
            for segment in np.flatnonzero(index.shard == result.shard).tolist():
                video = int(index.video[segment])
                watch.add(video, _reason(result, segment), plan.path(video))
            held.append(result)
            num_rows += result.rows
            if not watch.watching:
                _commit(plan, held, teachers)
        if store_is_empty:
            watch.finish()
        _commit(plan, held, teachers)
        bar.set_total(num_rows)
    return num_rows


def _commit(plan: StorePlan, held: list[ShardResult], teachers: _Teachers) -> None:
    """Commit the shards that were held back, and remove them from the list."""
    while held:
        plan.writer.commit(held.pop(0), teachers.run, teachers.engines)


def _reason(result: ShardResult, segment: int) -> str | None:
    """Return why a segment has no rows; None if a teacher has rows of it."""
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


def _check_accepted(config: ExtractConfig, outputs: dict[str, TeacherOutput]) -> None:
    """Raise UsageError for an `--accept-teacher` that is not a teacher of this command."""
    for name in config.accept_teachers:
        if name not in outputs:
            raise UsageError(
                f"--accept-teacher {name}: is none of this command's teachers: {', '.join(outputs)}"
            )


def _grows(
    config: ExtractConfig, plan: StorePlan, videos: VideoList | None, teachers: list[str]
) -> bool:
    """Return whether the store will grow: by videos, by shards, or by failed videos to retry."""
    if config.retry_failed or (videos is not None and new_videos(plan, videos)):
        return True
    index = plan.writer.index
    stored = [name for name in teachers if name in index.teachers]
    return len(np.unique(index.video)) < index.n_videos or bool(open_tasks(plan, stored))


def _add_videos(
    config: ExtractConfig,
    plan: StorePlan,
    videos: VideoList,
    num_listed: int,
    pool: DecodePool,
    console: Console,
) -> None:
    """Add the new videos to the store; `num_listed` is the number of videos of all parts."""
    check_unchanged(plan, videos)
    num_new = add_new_videos(plan, videos, pool, config.max_failures)
    num_existing = plan.writer.index.n_videos - num_new
    if num_new and num_existing:
        console.info(f"{num_new} new videos, {num_existing} are in the store already")
    if config.part is not None:
        # The size follows from the whole list, so that all parts have shards of one size and can be
        # merged.
        rows = plan.writer.set_shard_rows_for(num_listed * _rows_of_a_clip(plan.sampling))
        console.info(
            f"shards of {rows} rows; the parts of a merge need the same (--shard-rows {rows})"
        )


def _sampling(config: ExtractConfig) -> Sampling:
    """Return the sampling asked for, else that of the existing store, else every 4th frame."""
    if config.sampling is not None:
        return config.sampling
    if (config.out / "zarr.json").exists():
        return Sampling.model_validate(check_root(config.out)["sampling"])
    return Sampling()


def _rows_of_a_clip(sampling: Sampling) -> int:
    """Return the number of rows of a video of 10 s.

    The size of the shards of a part is estimated from it, since no part probes all videos.
    """
    if sampling.keyframes:
        return 10
    return round(10 * sampling.fps) if sampling.fps is not None else 300 // (sampling.every or 1)


@contextmanager
def _naming(store: Path) -> Iterator[None]:
    """Name the store in the error of a full disk that names no file, as that of write(2)."""
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
    num_rows: int,
    seconds: float,
    console: Console,
) -> dict[str, Any]:
    """Log the failed videos, and return the counts of the store.

    `complete` is False where no listed video is usable, or one failed by a fault of distinit.

    Args:
        plan: The store and its videos.
        teachers: The names of this command's teachers in the store.
        listed: The numbers of the listed videos in the store; None for all videos of the store.
        num_rows: The number of new rows.
        seconds: The duration of this run.
        console: Logs the failures.
    """
    index = plan.writer.index
    state = index.video_state()
    if (state == PENDING).any():
        raise StoreError(
            f"{plan.writer.root}: {int((state == PENDING).sum())} videos are left without a status"
        )
    reasons = index.video_reasons()
    failures = Counter(reasons.values())
    _log_failures(plan, reasons, "failed", console)
    teacher_failures: dict[str, Counter[str]] = {}
    for name in teachers:
        teacher_reasons = {
            v: text for v, text in index.video_reasons(name).items() if v not in reasons
        }
        teacher_failures[name] = Counter(teacher_reasons.values())
        _log_failures(plan, teacher_reasons, f"failed under {name} alone", console)
    num_internal = sum(
        count for reason, count in failures.items() if reason.startswith((INTERNAL, *FAULTS_OF_0_1))
    )
    if num_internal:
        console.warn(
            f"{num_internal} videos failed by an internal error: see the log; --retry-failed tries again"
        )
    listed_state = state[listed] if listed is not None else state
    is_usable = not len(listed_state) or bool((listed_state == OK).any())
    if not is_usable:
        console.warn("no video of the sources is usable")
    return {
        "store": str(plan.writer.root),
        "complete": not num_internal and is_usable,
        "videos": int(index.n_videos),
        "ok": int((state == OK).sum()),
        "failed": int((state == FAILED).sum()),
        "failures": dict(failures.most_common(100)),
        "rows": int(index.rows[(index.state == OK) & index.live].sum()),
        "new_rows": num_rows,
        "seconds": round(seconds, 2),
        "teachers": {t: int(((index.teacher_state(t)) == OK).sum()) for t in teachers},
        "teacher_failures": {
            t: dict(counts.most_common(100)) for t, counts in teacher_failures.items()
        },
    }


def _log_failures(plan: StorePlan, reasons: Mapping[int, str], how: str, console: Console) -> None:
    """Log the number of failed videos, and for each reason its count and its first videos."""
    if not reasons:
        return
    root = plan.writer.root
    console.info(
        f"{counted(len(reasons), 'video')} {how}; `distinit targets info {root} --failed` lists all:"
    )
    for reason, count in Counter(reasons.values()).most_common(10):
        examples = [v for v, text in reasons.items() if text == reason][:NUM_EXAMPLES]
        names = ", ".join(escape_path(plan.path(v)) for v in examples)
        console.info(f"  {count:6d}  {reason}: {names}{', …' if count > len(examples) else ''}")
