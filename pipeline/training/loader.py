"""Batches by key: from a map-style data set of (epoch, sample) to collated batches on the way to a
device.

The key says everything, so the same batches come from 0, 1 or 4 workers, and a run starts at any
step. A data set here is any object with `__getitem__((epoch, sample)) -> dict`, and `__getitems__`
of several keys if that is faster; an item that is None is left out of its batch.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from ..clips.seeding import Key
from ..common.distributed import Ranks
from ..common.errors import DistInitError, TrainingError, WorkerDied
from ..common.limits import limit_met
from ..common.processes import Owner
from ..common.worker_status import WorkerStatus
from ..corpus.sources import escape_path
from .loader_workers import (
    HINT,
    Ended,
    LoaderWorkers,
    Stuck,
    begin_worker,
    start_context,
    started,
    watch_deaths_here,
)

HANG_S = 120.0  # a worker that reads one video for longer hangs
PATIENCE = 10  # times HANG_S for what is no reading and may be slow: to start a worker, to draw from a remote store
LOOK_EVERY_S = 1.0  # how often a process that waits for a batch looks what its workers do
CRASHES = 2  # of workers reading one video, after which it is refused
MAX_STARTS = 20
_TO_SEND = 8  # descriptors, besides one for each tensor: a socket that listens, and two for each that connects
# What a batch from a worker ends in: of torch, and of the pipe, sockets and descriptors it comes
# through.
RECEIVING = (RuntimeError, EOFError, OSError, pickle.UnpicklingError)


class KeyedDataset(Protocol):
    """What the loop reads: one example for each (epoch, sample), a pure function of it."""

    def __getitem__(self, key: Key, /) -> dict[str, Any] | None: ...


class EpochBatchSampler(Sampler[list[Key]]):
    """The keys of all batches from step `start` to the end, over all epochs in one go.

    One sampler over all epochs, so that workers read ahead across the border of two epochs.
    """

    def __init__(
        self, *, batch_size: int, steps_per_epoch: int, epochs: int, start: int = 0
    ) -> None:
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.steps = epochs * steps_per_epoch
        self.start = start

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            first = batch * self.batch_size
            yield [(epoch, sample) for sample in range(first, first + self.batch_size)]


class SequentialBatchSampler(Sampler[list[Key]]):
    """The keys (0, 0) … (0, n - 1) once, in order, the last batch as short as it must be: for
    evaluation."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n = n
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, self.n, self.batch_size):
            yield [(0, sample) for sample in range(first, min(first + self.batch_size, self.n))]


def read_batches(
    dataset: KeyedDataset,
    batches: Sampler[list[Key]],
    *,
    workers: int,
    device: torch.device,
    hang_s: float = HANG_S,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[dict[str, Any]]:
    """Yields collated batches in the order of `batches`; see `collate`. Workers end with the
    iterator.

    A video that a decoder crashes on twice, or that takes a worker longer than `hang_s` seconds, is
    refused: the workers are started again, find it unreadable with that reason, and go on where the
    batches stopped.

    stop: asked about once a second of a wait for a batch; true ends the batches there.

    Raises the data set's own DistInitError as it was raised in the worker; WorkerDied when one dies
    that read no video, that the system killed (as it does where memory runs out), or after 20
    starts; and TrainingError for another error in a worker, when shared memory is full, and when no
    batch comes though no video is being read.
    """
    if not workers:
        yield from _one_go(dataset, batches, 0, device, {}, hang_s, stop)
        return
    refused: dict[str, str] = {}
    suspects: Counter[str] = Counter()
    done, last = 0, Ended("", "")
    for _ in range(MAX_STARTS):
        try:
            for batch in _one_go(
                dataset, _Rest(batches, done), workers, device, refused, hang_s, stop
            ):
                done += 1
                yield batch
            return
        except Ended as ended:
            last = ended
            suspects[ended.path] += 1
            if isinstance(ended, Stuck) or suspects[ended.path] >= CRASHES:
                refused[ended.path] = ended.reason
    where = escape_path(last.path)
    raise WorkerDied(
        f"loader processes ended {MAX_STARTS} times, the last reading {where}: {last.reason}"
    )


class _Rest(Sampler[list[Key]]):
    """The batches from the k-th on."""

    def __init__(self, batches: Sampler[list[Key]], k: int) -> None:
        self.batches, self.k = batches, k

    def __iter__(self) -> Iterator[list[Key]]:
        return islice(iter(self.batches), self.k, None)


def _one_go(
    dataset: KeyedDataset,
    batches: Sampler[list[Key]],
    workers: int,
    device: torch.device,
    refused: dict[str, str],
    hang_s: float,
    stop: Callable[[], bool],
) -> Generator[dict[str, Any]]:
    """Yield the batches from one set of workers; Stuck or Crashed where a video ends it."""
    look_s = min(hang_s, LOOK_EVERY_S)

    def start() -> tuple[Iterator[Any], WorkerStatus | None, Any]:
        context = start_context(device) if workers else None
        places = WorkerStatus(context, workers) if context is not None else None
        resting = context.RawArray("b", workers) if context is not None else []
        begin = partial(begin_worker, Owner.here(), places, dict(refused))
        reader = _Reader(dataset, resting)
        return (
            iter(_loader(reader, batches, workers, device, context, begin, look_s)),
            places,
            resting,
        )

    iterator, places, resting = started(start) if workers else start()
    watch_deaths_here()
    crew = LoaderWorkers(iterator, places, hang_s)
    try:
        # For how long, in this wait, no video has been read and no worker has had anything to do:
        # by the looks and not by the clock, which goes on while a job is suspended.
        quiet = lost = 0.0
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                if str(error).startswith("Caught "):  # the worker's traceback, as torch words it
                    raise TrainingError(
                        f"a loader process failed: {str(error).splitlines()[-1]}"
                    ) from error
                if (
                    not crew.processes
                    or isinstance(error, DistInitError)
                    or not isinstance(error, RECEIVING)
                ):
                    raise
                reading = crew.why(error)  # raises, or says to wait on
                if stop():
                    crew.kill()
                    return
                quiet = 0.0 if reading else quiet + look_s
                lost = lost + look_s if all(resting) else 0.0
                _look_for_loss(quiet, lost, hang_s)
                continue
            if isinstance(batch, DistInitError):
                raise batch
            yield batch
            quiet = lost = 0.0
    except (Ended, TrainingError, KeyboardInterrupt):
        crew.kill()
        raise
    finally:
        crew.end()


def _loader(
    reader: _Reader,
    batches: Sampler[list[Key]],
    workers: int,
    device: torch.device,
    context: Any,
    begin: Callable[[int], None],
    look_s: float,
) -> DataLoader[Any]:
    return DataLoader(
        reader,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        multiprocessing_context=context,
        worker_init_fn=begin,
        timeout=look_s if workers else 0,
        # An own generator: the loader draws a seed from it, and must not touch the global one,
        # whose state a checkpoint carries.
        generator=torch.Generator().manual_seed(0),
    )


def _look_for_loss(quiet: float, lost: float, hang_s: float) -> None:
    """TrainingError where no batch will come any more: one that a worker has made and cannot send,
    or this process not receive, is dropped, and the loader waits for it for ever."""
    if lost > hang_s:
        raise TrainingError(
            "a batch was lost on its way from a loader process, which may have said why above: all are done, and "
            f"none came for {hang_s:g} s; {HINT}"
        )
    if quiet > PATIENCE * hang_s:
        raise TrainingError(
            f"a loader process hangs: no batch for {PATIENCE * hang_s:g} s, and no video is being read; {HINT}"
        )


def collate(
    items: Sequence[dict[str, Any] | DistInitError | None],
) -> dict[str, Any] | DistInitError:
    """Tensors are stacked, numbers become tensors, mappings are collated by key, all else becomes a
    list."""
    for item in items:
        if isinstance(item, DistInitError):
            return item
    rows = [item for item in items if isinstance(item, Mapping)]
    return {key: _collate_values([row[key] for row in rows]) for key in rows[0]} if rows else {}


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; pinned ones are copied while the last step still
    computes."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """B of a batch: the length of its first tensor; 0 for an empty batch."""
    for value in batch.values():
        if isinstance(value, Mapping):
            return batch_size_of(value)
        return len(value)
    return 0


class _Reader(Dataset[Any]):
    """Makes a whole batch. Our errors come back as values: the loader would bury them in a
    traceback.

    resting: of each worker, 1 when it has made what was asked of it; 0 before its first batch, and
        while it makes one.
    """

    def __init__(self, dataset: KeyedDataset, resting: Any) -> None:
        self.dataset = dataset
        self.resting = resting

    def __getitems__(self, keys: list[Key]) -> dict[str, Any] | DistInitError:
        worker = get_worker_info()
        if worker is None:
            return self._read(keys)
        self.resting[worker.id] = 0
        batch = self._read(keys)
        if not isinstance(batch, DistInitError):
            batch = _shared(batch)
        self.resting[worker.id] = 1
        return batch

    def _read(self, keys: list[Key]) -> dict[str, Any] | DistInitError:
        many = getattr(self.dataset, "__getitems__", None)
        try:
            return collate(
                list(many(keys)) if many is not None else [self.dataset[key] for key in keys]
            )
        except DistInitError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    """For the loader, which has nothing left to collate; a lambda would not go to a process that is
    spawned."""
    return batch


def _shared(batch: dict[str, Any]) -> dict[str, Any] | TrainingError:
    """The batch in the memory in which it goes to the main process. Torch would move it there when
    it sends it, in a thread that drops a batch for which there is no room, and prints so."""
    tensors = list(_tensors(batch))
    try:
        for tensor in tensors:
            tensor.share_memory_()
        _check_descriptors(len(tensors) + _TO_SEND)
    except (OSError, RuntimeError) as error:
        for file in Path("/dev/shm").glob(
            f"torch_{os.getpid()}_*"
        ):  # torch forgets a file that it cannot fill
            file.unlink(missing_ok=True)
        if (limit := limit_met(error)) is not None:
            return TrainingError(f"a loader process cannot send a batch: {limit}; {HINT}")
        size = sum(tensor.nbytes for tensor in tensors)
        reason = (
            str(error).splitlines()[0].rpartition(": ")[2]
        )  # before it, a file that nobody will find
        return TrainingError(
            f"shared memory (/dev/shm) is full: no room for a batch of {size / 1e6:.1f} MB ({reason}); fewer workers "
            "(loop.workers, test.workers), a smaller batch or a larger /dev/shm (docker run --shm-size) help"
        )
    return batch


def _check_descriptors(number: int) -> None:
    """Raise OSError if so many more files cannot be opened: torch opens one per tensor, in another
    thread."""
    opened = []
    try:
        for _ in range(number):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)


def _collate_values(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(values)
    if isinstance(first, Mapping):
        return {key: _collate_values([value[key] for value in values]) for key in first}
    if isinstance(first, (bool, int, float)):
        return torch.tensor(values)
    return values


class SplitBatchSampler(Sampler[list[Key]]):
    """This rank's part of every batch: rank r of W takes samples r·B/W … (r + 1)·B/W - 1 of B.

        B = 8, W = 3:   0 1 | 2 3 4 | 5 6 7

    All ranks together go through just the samples of one process with the same batches.
    """

    def __init__(self, batches: Sampler[list[Key]], ranks: Ranks) -> None:
        self.batches = batches
        self.ranks = ranks

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Key]]:
        rank, world = self.ranks.rank, self.ranks.world
        for batch in self.batches:
            yield batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]


class DistributedBatchSampler(Sampler[list[Key]]):
    """Every W-th batch, whole: for evaluation, where each sample counts once and nothing is
    padded."""

    def __init__(self, batches: Sampler[list[Key]], ranks: Ranks) -> None:
        self.batches = batches
        self.ranks = ranks

    def __len__(self) -> int:
        return len(range(self.ranks.rank, len(self.batches), self.ranks.world))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Key]]:
        for number, batch in enumerate(self.batches):
            if number % self.ranks.world == self.ranks.rank:
                yield batch
