"""Extraction on dask.distributed: a task is a shard, workers stage files, the client alone commits.

Teachers and decode processes are set up once a worker and stay. What a worker returns is small: names and
digests of the files it staged inside the store, which therefore must lie on a file system that all see.
"""

from __future__ import annotations

import atexit
import errno
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from ..pipeline.errors import DistInitError, StoreMismatchError
from ..pipeline.targets.shard import ShardResult
from ..pipeline.teachers.teacher import TeacherSpec
from ..pipeline.video.sampling import Sampling
from .extract_batches import TeacherRunner
from .extract_config import ExtractConfig
from .extract_work import ShardFiller, ShardTask

if TYPE_CHECKING:
    from distributed import Client, Future

    from ..pipeline.targets.writer import StoreWriter
    from ..pipeline.teachers.teacher import Teacher

IN_FLIGHT = 2  # tasks a worker holds: one at work, one waiting


@dataclass(frozen=True)
class WorkerSetup:
    """All that a worker needs to know beside its task; equal setups share teachers and decoders."""

    root: str
    specs: tuple[str, ...]  # TeacherSpec as JSON
    identities: tuple[tuple[str, str], ...]  # name → identity as JSON: a worker's own must be equal
    sampling: str
    shard_rows: int
    batch_size: int
    device: str
    precision: str
    decoders: int
    timeout_s: float
    memory_gb: float

    @classmethod
    def of(
        cls, config: ExtractConfig, writer: StoreWriter, teachers: Mapping[str, Teacher], sampling: Sampling
    ) -> WorkerSetup:
        """The setup that does on a worker what the client would do by itself."""
        return cls(
            root=str(writer.root),
            specs=tuple(spec.model_dump_json() for spec in config.teachers),
            identities=tuple((n, _identity(t, config.precision)) for n, t in teachers.items()),
            sampling=sampling.model_dump_json(),
            shard_rows=writer.shard_rows,
            batch_size=config.batch_size,
            device=config.device,
            precision=config.precision,
            decoders=config.decoders or 1,
            timeout_s=config.timeout_s,
            memory_gb=config.memory_gb,
        )


_FILLERS: dict[WorkerSetup, ShardFiller] = {}


def fill_shard(setup: WorkerSetup, task: ShardTask) -> ShardResult:
    """Run in a worker: one shard, staged. Raises what the shard's work raises; dask tries it again."""
    if setup not in _FILLERS:
        _FILLERS[setup] = _make_filler(setup)
    try:
        (result,) = _FILLERS[setup].fill([task])
    except BaseException as error:
        clear_frames(error.__traceback__)  # dask keeps the error: its frames would hold memory that the next try needs
        raise
    return result


def _make_filler(setup: WorkerSetup) -> ShardFiller:
    import torch

    from ..pipeline.devices import keep_freed_memory, resolve_device
    from ..pipeline.teachers.teacher import load_teacher
    from ..pipeline.video.pool import DecodePool

    device = _worker_device(resolve_device(setup.device))
    if device.type == "cpu":
        torch.set_num_threads(1)  # workers share the machine's cores; more threads spin
        keep_freed_memory()
    teachers = {}
    expected = dict(setup.identities)
    for text in setup.specs:
        teacher = load_teacher(TeacherSpec.model_validate_json(text)).to(device, setup.precision)
        here = _identity(teacher, setup.precision)
        if here != expected[teacher.name]:
            raise StoreMismatchError(
                f"teacher {teacher.name!r} differs on this worker: {here}, the client's is {expected[teacher.name]}"
            )
        teachers[teacher.name] = teacher
    views = list(dict.fromkeys(t.view for t in teachers.values()))
    pool = DecodePool(
        processes=setup.decoders, views=views, memory_gb=setup.memory_gb, timeout_s=setup.timeout_s
    )
    runner = TeacherRunner(teachers, views, batch_size=setup.batch_size, threads=1)
    for each in (pool, runner):
        each.__enter__()
        atexit.register(each.__exit__, None, None, None)
    sampling = Sampling.model_validate_json(setup.sampling)
    return ShardFiller(Path(setup.root), runner, pool, sampling=sampling, shard_rows=setup.shard_rows)


def _identity(teacher: Teacher, precision: str) -> str:
    return json.dumps(teacher.identity(precision), sort_keys=True)


def _worker_device(device: Any) -> Any:
    """Each worker of this machine its own GPU, by the number in its name."""
    import torch
    from distributed import get_worker

    if device.type != "cuda" or device.index is not None or torch.cuda.device_count() < 2:
        return device
    name = str(get_worker().name)
    digits = "".join(c for c in name if c.isdigit())
    return torch.device("cuda", int(digits or 0) % torch.cuda.device_count())


def run_shards(
    client: Client, setup: WorkerSetup, tasks: Iterator[ShardTask], *, retries: int
) -> Iterator[ShardResult]:
    """Shards as workers finish them, in any order. A shard that fails for good does not stop the others.

    Raises DistInitError at the end if any shard failed on every try; what was yielded stands.
    """
    from distributed import as_completed

    failed: list[str] = []
    shard_of: dict[Any, int] = {}

    def submit() -> Any:
        task = next(tasks, None)
        if task is None:
            return None
        future = client.submit(fill_shard, setup, task, retries=retries, pure=False)
        shard_of[future.key] = task.shard
        return future

    width = IN_FLIGHT * max(1, len(client.scheduler_info()["workers"]))
    waiting = as_completed([f for f in (submit() for _ in range(width)) if f is not None])
    for future in waiting:
        shard = shard_of.pop(future.key)
        if future.status == "finished":
            yield future.result()
        else:
            error = _why(future)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise error  # no other worker can write there either
            failed.append(f"shard {shard:06d}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        future.release()
        if (more := submit()) is not None:
            waiting.add(more)
    if failed:
        raise DistInitError(
            f"{len(failed)} shards failed {retries + 1} times each, all others are committed; "
            f"the same command tries them again; the first: {failed[0]}"
        )


def _why(future: Future) -> BaseException:
    try:
        error: BaseException = future.exception()
    except CancelledError as lost:  # the scheduler itself went away
        return lost
    return error
