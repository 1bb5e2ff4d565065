"""Extract on dask.distributed: one task per shard, staged by a worker and committed by the client.

Teachers and decoding processes are set up once per worker and reused. A worker stages files inside
the store and returns only their names and digests, so that the store must be on a file system that
the client and all workers share.
"""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
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
from .machine import outputs_of, run_record, use_engines, views_of
from .shard_filler import ShardFiller, ShardTask
from .teacher_runner import GPU_THREADS, TeacherRunner

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from distributed import Client, Future

    from ..store.writer import StoreWriter
    from ..teachers.teacher import Teacher, TeacherOutput

# Tasks per worker: one that it fills, and one that waits.
IN_FLIGHT = 2
# The least number of tasks, for any number of workers: an adaptive cluster grows if tasks wait.
QUEUED = 32


@dataclass(frozen=True)
class WorkerSetup:
    """The settings that a worker needs in addition to its task.

    Teachers and decoders are reused for equal setups.
    """

    root: str
    specs: tuple[str, ...]
    """Each `TeacherSpec` as JSON."""
    identities: tuple[tuple[str, str], ...]
    """Name → identity as JSON; those of the worker must be equal."""
    run: str
    """The numerics as JSON; those of the worker must be equal."""
    engines: tuple[tuple[str, str], ...]
    """Name → engine; those of the worker must be equal."""
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
        """Return the setup with which a worker computes the same as the client.

        It is valid in any working folder.
        """
        return cls(
            root=str(writer.root),
            specs=tuple(_with_absolute_paths(spec).model_dump_json() for spec in config.teachers),
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
    """State of a worker process between shards: teachers and decoders of its latest setup."""

    def __init__(self) -> None:
        # A worker with several threads fills one shard at a time too.
        self.lock = threading.Lock()
        self.setup: WorkerSetup | None = None
        self.filler: ShardFiller | None = None
        self.resources = ExitStack()
        atexit.register(self.resources.close)

    def filler_of(self, setup: WorkerSetup) -> ShardFiller:
        """Return the filler for a setup; make it if the latest setup was different."""
        if self.filler is None or self.setup != setup:
            self.setup = self.filler = None
            self.resources.close()
            self.filler = _make_filler(setup, self.resources)
            self.setup = setup
        return self.filler


_WORKER = _Worker()


def fill_shard(setup: WorkerSetup, task: ShardTask) -> ShardResult:
    """Fill and stage one shard in a worker; dask tries again after any exception."""
    with _WORKER.lock:
        try:
            (result,) = _WORKER.filler_of(setup).fill([task])
        except BaseException as error:
            # Dask keeps the error, whose frames would keep batches and decoders in use.
            clear_frames(error.__traceback__)
            raise
    return result


def run_of_workers(client: Client, config: ExtractConfig) -> dict[str, Any]:
    """Return the numerics of a worker of the cluster, whose device may differ from the client's."""
    if not client.nthreads():
        log.info("no worker has joined yet; waiting for the first")
    record: dict[str, Any] = client.submit(
        _worker_run, config.batch_size, config.precision, config.device
    ).result()
    return record


def _worker_run(batch_size: int, precision: str, device: str) -> dict[str, Any]:
    from ..common.devices import resolve_device

    return run_record(batch_size, precision, resolve_device(device))


def _with_absolute_paths(spec: TeacherSpec) -> TeacherSpec:
    """Return the spec with absolute paths, which are valid in any working folder."""
    options = dict(spec.options)
    if "classes" in options:
        options["classes"] = os.path.abspath(options["classes"])
    weights = None if spec.weights is None else os.path.abspath(spec.weights)
    return spec.model_copy(update={"options": options, "weights": weights})


def _make_filler(setup: WorkerSetup, resources: ExitStack) -> ShardFiller:
    """Load the teachers and start the decoders of a setup; `resources` closes them.

    Raises:
        StoreMismatchError: This worker computes with other numerics or other teachers.
    """
    import torch

    from ..common.devices import keep_freed_memory, resolve_device
    from ..teachers.teacher import load_teacher
    from ..video.pool.decode_pool import DecodePool

    device = _worker_device(resolve_device(setup.device))
    run = _json(run_record(setup.batch_size, setup.precision, device))
    if run != setup.run:
        raise StoreMismatchError(
            f"this worker would compute with {run}, the others do with {setup.run}"
        )
    if device.type == "cpu":
        # Workers share the machine's cores, on which more threads would spin.
        torch.set_num_threads(1)
        keep_freed_memory()
    specs = [TeacherSpec.model_validate_json(text) for text in setup.specs]
    teachers = [load_teacher(spec).to(device, setup.precision) for spec in specs]
    engines = {name: {"engine": engine} for name, engine in setup.engines}
    worker_engines = use_engines(teachers, "auto", engines, json.loads(run))
    if worker_engines != dict(setup.engines):
        raise StoreMismatchError(
            f"this worker would compute with {_json(worker_engines)}, the others do with {_json(dict(setup.engines))}"
        )
    outputs, views = outputs_of(teachers), views_of(teachers)
    _check_outputs(setup, teachers, outputs)
    pool = DecodePool(
        processes=setup.decoders,
        views=[*views, HASH_VIEW],
        memory_gb=setup.memory_gb,
        timeout_s=setup.timeout_s,
    )
    threads = GPU_THREADS if device.type == "cuda" else 1
    runner = TeacherRunner(outputs, views, batch_size=setup.batch_size, threads=threads)
    resources.enter_context(pool)
    resources.enter_context(runner)
    sampling = Sampling.model_validate_json(setup.sampling)
    return ShardFiller(
        Path(setup.root), runner, pool, sampling=sampling, shard_rows=setup.shard_rows
    )


def _check_outputs(
    setup: WorkerSetup, teachers: Sequence[Teacher], outputs: Mapping[str, TeacherOutput]
) -> None:
    """Raise StoreMismatchError for an output that differs from the client's or the store's."""
    from ..store.layout import read_fingerprint
    from ..store.storage import LocalFiles
    from ..teachers.fingerprint import Fingerprint
    from ..teachers.probes import fingerprints

    client_identities = dict(setup.identities)
    worker_fingerprints = {
        teacher.store_names[key]: fingerprint
        for teacher in teachers
        for key, fingerprint in fingerprints(teacher).items()
    }
    for name, output in outputs.items():
        identity = _json(output.identity(setup.precision))
        if identity != client_identities[name]:
            raise StoreMismatchError(
                f"teacher {name!r} differs on this worker: {identity}, the client's is {client_identities[name]}"
            )
        node = read_fingerprint(LocalFiles(Path(setup.root)), name)
        if node is not None:
            stored = Fingerprint.parse(node, f"{setup.root}/teachers/{name}")
            stored.check(worker_fingerprints[name], name, f"{setup.root}, on this worker")


def _json(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _worker_device(device: Any) -> Any:
    """Return the device of a worker.

    Each worker of this machine computes on another GPU, whose number is in the worker's name.
    """
    import torch

    if device.type != "cuda" or device.index is not None or (gpu := gpu_of_worker()) is None:
        return device
    return torch.device("cuda", gpu)


def run_shards(
    client: Client, setup: WorkerSetup, tasks: Iterator[ShardTask], *, retries: int
) -> Iterator[ShardResult]:
    """Yield shards as workers finish them, in any order.

    A shard that failed on every try does not stop the others. Workers may join at any time.

    Raises:
        DistInitError: At the end, if a shard failed on every try. Shards that were yielded are
            valid.
        OSError: The disk of the store is full.
        DecoderError: The decoder of a worker does not work.
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
            error = _error_of(future)
            # No other worker can write to a full disk either.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise error
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


def _error_of(future: Future) -> BaseException:
    """Return the exception of a failed task; CancelledError if the scheduler has ended."""
    try:
        error: BaseException = future.exception()
    except CancelledError as cancelled:
        return cancelled
    return error
