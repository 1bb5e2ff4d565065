"""Extraction on dask.distributed: a task is a shard, workers stage files, the client alone commits.

Teachers and decode processes are set up once per worker and stay. What a worker returns is small:
names and digests of the files it staged inside the store, which therefore must be on a file system
that all of them see.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from ..common.dask_workers import gpu_of_worker
from ..common.errors import DecoderError, DistInitError, StoreMismatchError
from ..store.staging import ShardResult
from ..teachers.teacher_options import TeacherSpec
from ..video.perceptual_hash import HASH_VIEW
from ..video.sampling import Sampling
from .extract_options import ExtractConfig
from .machine import outputs_of, run_record, use_engines
from .shard_filler import ShardFiller, ShardTask
from .teacher_runner import GPU_THREADS, TeacherRunner

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from distributed import Client, Future

    from ..store.writer import StoreWriter
    from ..teachers.teacher import TeacherOutput

IN_FLIGHT = 2  # tasks a worker holds: one at work, one waiting
QUEUED = 32  # tasks at least, whatever the workers: a cluster that adapts grows by what waits


@dataclass(frozen=True)
class WorkerSetup:
    """All that a worker needs to know in addition to its task.

    Equal setups share teachers and decoders.
    """

    root: str
    specs: tuple[str, ...]  # TeacherSpec as JSON
    identities: tuple[tuple[str, str], ...]  # name → identity as JSON: a worker's own must be equal
    run: str  # the run record as JSON: likewise
    engines: tuple[tuple[str, str], ...]  # name → engine: likewise
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
        cls,
        config: ExtractConfig,
        writer: StoreWriter,
        teachers: Mapping[str, TeacherOutput],
        sampling: Sampling,
        run: Mapping[str, Any],
        engines: Mapping[str, str],
    ) -> WorkerSetup:
        """Return the setup that makes a worker do what the client would do by itself.

        It holds wherever the worker was started.
        """
        return cls(
            root=str(writer.root),
            specs=tuple(_anywhere(spec).model_dump_json() for spec in config.teachers),
            identities=tuple((n, _json(t.identity(config.precision))) for n, t in teachers.items()),
            run=_json(run),
            engines=tuple(engines.items()),
            sampling=sampling.model_dump_json(),
            shard_rows=writer.shard_rows,
            batch_size=config.batch_size,
            device=config.device,
            precision=config.precision,
            decoders=config.decoders or 1,
            timeout_s=config.timeout_s,
            memory_gb=config.memory_gb,
        )


class _Worker:
    """What a worker process keeps between shards: teachers and decoders of its latest setup."""

    def __init__(self) -> None:
        # A worker of several threads fills one shard at a time all the same.
        self.busy = threading.Lock()
        self.setup: WorkerSetup | None = None
        self.filler: ShardFiller | None = None
        self.open = ExitStack()
        atexit.register(self.open.close)

    def filler_of(self, setup: WorkerSetup) -> ShardFiller:
        if self.filler is None or self.setup != setup:
            self.setup = self.filler = None
            self.open.close()
            self.filler = _make_filler(setup, self.open)
            self.setup = setup
        return self.filler


_WORKER = _Worker()


def fill_shard(setup: WorkerSetup, task: ShardTask) -> ShardResult:
    """Fill and stage one shard in a worker; what it raises makes dask try again."""
    with _WORKER.busy:
        try:
            (result,) = _WORKER.filler_of(setup).fill([task])
        except BaseException as error:
            # Dask keeps the error: its frames would hold what the next try needs.
            clear_frames(error.__traceback__)
            raise
    return result


def run_of_workers(client: Client, config: ExtractConfig) -> dict[str, Any]:
    """Return the numerics of a worker of the cluster.

    It may have a GPU where the client has none.
    """
    if not client.nthreads():
        log.info("no worker has joined yet: waiting for the first")
    record: dict[str, Any] = client.submit(
        _run_here, config.batch_size, config.precision, config.device
    ).result()
    return record


def _run_here(batch_size: int, precision: str, device: str) -> dict[str, Any]:
    from ..common.devices import resolve_device

    return run_record(batch_size, precision, resolve_device(device))


def _anywhere(spec: TeacherSpec) -> TeacherSpec:
    """Return the spec with absolute paths, which hold in any working folder."""
    options = dict(spec.options)
    if "classes" in options:
        options["classes"] = os.path.abspath(options["classes"])
    weights = None if spec.weights is None else os.path.abspath(spec.weights)
    return spec.model_copy(update={"options": options, "weights": weights})


def _make_filler(setup: WorkerSetup, open_: ExitStack) -> ShardFiller:
    import torch

    from ..common.devices import keep_freed_memory, resolve_device
    from ..store.layout import read_fingerprint
    from ..store.storage import LocalFiles
    from ..teachers.fingerprint import Fingerprint
    from ..teachers.probes import fingerprints
    from ..teachers.teacher import load_teacher
    from ..video.pool.decode_pool import DecodePool

    device = _worker_device(resolve_device(setup.device))
    run = _json(run_record(setup.batch_size, setup.precision, device))
    if run != setup.run:
        raise StoreMismatchError(
            f"this worker would compute with {run}, the others do with {setup.run}"
        )
    if device.type == "cpu":
        torch.set_num_threads(1)  # workers share the machine's cores; more threads spin
        keep_freed_memory()
    specs = [TeacherSpec.model_validate_json(text) for text in setup.specs]
    teachers = [load_teacher(spec).to(device, setup.precision) for spec in specs]
    engines = {name: {"engine": engine} for name, engine in setup.engines}
    used = use_engines(teachers, "auto", engines, json.loads(run))
    if used != dict(setup.engines):
        raise StoreMismatchError(
            f"this worker would compute with {_json(used)}, the others do with {_json(dict(setup.engines))}"
        )
    outputs, expected = outputs_of(teachers), dict(setup.identities)
    found = {t.store_names[o]: f for t in teachers for o, f in fingerprints(t).items()}
    for name, output in outputs.items():
        here = _json(output.identity(setup.precision))
        if here != expected[name]:
            raise StoreMismatchError(
                f"teacher {name!r} differs on this worker: {here}, the client's is {expected[name]}"
            )
        node = read_fingerprint(LocalFiles(Path(setup.root)), name)
        if node is not None:
            stored = Fingerprint.parse(node, f"{setup.root}/teachers/{name}")
            stored.check(found[name], name, f"{setup.root}, on this worker")
    views = list(dict.fromkeys(teacher.view for teacher in teachers))
    pool = DecodePool(
        processes=setup.decoders,
        views=[*views, HASH_VIEW],
        memory_gb=setup.memory_gb,
        timeout_s=setup.timeout_s,
    )
    threads = GPU_THREADS if device.type == "cuda" else 1
    runner = TeacherRunner(outputs, views, batch_size=setup.batch_size, threads=threads)
    open_.enter_context(pool)
    open_.enter_context(runner)
    sampling = Sampling.model_validate_json(setup.sampling)
    return ShardFiller(
        Path(setup.root), runner, pool, sampling=sampling, shard_rows=setup.shard_rows
    )


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _worker_device(device: Any) -> Any:
    """Return the device of a worker; each worker of this machine gets its own GPU.

    The number in the worker's name is that of the GPU.
    """
    import torch

    if device.type != "cuda" or device.index is not None or (gpu := gpu_of_worker()) is None:
        return device
    return torch.device("cuda", gpu)


def run_shards(
    client: Client, setup: WorkerSetup, tasks: Iterator[ShardTask], *, retries: int
) -> Iterator[ShardResult]:
    """Yield shards as workers finish them, in any order.

    A shard that fails for good does not stop the others; workers that join get their share.

    Raises:
        DistInitError: At the end, if any shard failed on every try; what was yielded stands.
    """
    from distributed import as_completed

    failed: list[str] = []
    shard_of: dict[Any, int] = {}

    def submit() -> None:
        in_flight = max(QUEUED, IN_FLIGHT * len(client.nthreads()))
        for task in islice(tasks, max(0, in_flight - len(shard_of))):
            future = client.submit(fill_shard, setup, task, retries=retries, pure=False)
            shard_of[future.key] = task.shard
            waiting.add(future)

    waiting = as_completed()
    submit()
    for future in waiting:
        shard = shard_of.pop(future.key)
        if future.status == "finished":
            yield future.result()
        else:
            error = _why(future)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise error  # no other worker can write to it either
            if isinstance(error, DecoderError):
                raise DecoderError(f"on a worker: {error}") from error
            failed.append(
                f"shard {shard:06d}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
        future.release()
        submit()
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
