"""Batches by key: from a map-style data set of (epoch, sample) to collated batches on the way to a device.

The key says everything, so the same batches come from 0, 1 or 4 workers, and a run starts at any step.
A data set here is any object with `__getitem__((epoch, sample)) -> dict`; an item that is None is left out
of its batch.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DistInitError, TrainingError

Key = tuple[int, int]
"""(epoch, sample): sample counts from 0 in each epoch."""


class KeyedDataset(Protocol):
    """What the loop reads: one example for each (epoch, sample), a pure function of it."""

    def __getitem__(self, key: Key, /) -> dict[str, Any] | None: ...


class KeyedBatches(Sampler[list[Key]]):
    """The keys of all batches from step `start` to the end, over all epochs in one go.

    One sampler over all epochs, so that workers read ahead across the border of two epochs.
    """

    def __init__(self, *, batch_size: int, steps_per_epoch: int, epochs: int, start: int = 0) -> None:
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


class EachOnce(Sampler[list[Key]]):
    """The keys (0, 0) … (0, n - 1) once, in order, the last batch as short as it must be: for evaluation."""

    def __init__(self, n: int, batch_size: int) -> None:
        self.n = n
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, self.n, self.batch_size):
            yield [(0, sample) for sample in range(first, min(first + self.batch_size, self.n))]


def read_batches(
    dataset: KeyedDataset, batches: Sampler[list[Key]], *, workers: int, device: torch.device
) -> Generator[dict[str, Any]]:
    """Yields collated batches in the order of `batches`; see `collate`. Workers end with the iterator.

    Raises the data set's own DistInitError as it was raised in the worker, and TrainingError when a worker
    dies (out of memory, a decoder that crashes).
    """
    loader = DataLoader(
        _Reader(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        multiprocessing_context=_context(device) if workers else None,
        worker_init_fn=_outlive_sigterm,
        # An own generator: the loader draws a seed from it, and must not touch the global one, whose state
        # a checkpoint carries.
        generator=torch.Generator().manual_seed(0),
    )
    others = multiprocessing.active_children()
    iterator = iter(loader)
    started = [process for process in multiprocessing.active_children() if process not in others]
    try:
        with worker_errors():
            for batch in iterator:
                if isinstance(batch, DistInitError):
                    raise batch
                yield batch
    finally:
        # What the iterator does when it is collected; the traceback of an error may keep it alive. Until it
        # has let go of its workers, the end of one raises an error wherever the main process is.
        if started:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
        for process in started:
            if process.is_alive():
                process.kill()


@contextmanager
def worker_errors() -> Iterator[None]:
    """TrainingError for a loader process that died. Torch raises it from a signal handler, so it may come
    up anywhere in the main process, not only where a batch is asked for."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DistInitError) or "DataLoader worker" not in str(error):
            raise
        reason = str(error).splitlines()[0].rstrip(". ")
        raise TrainingError(f"a loader process died: {reason}; fewer workers need less memory") from error


def collate(items: Sequence[dict[str, Any] | DistInitError | None]) -> dict[str, Any] | DistInitError:
    """Tensors are stacked, numbers become tensors, mappings are collated by key, all else becomes a list."""
    for item in items:
        if isinstance(item, DistInitError):
            return item
    rows = [item for item in items if isinstance(item, Mapping)]
    return {key: _collate_values([row[key] for row in rows]) for key in rows[0]} if rows else {}


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; pinned ones are copied while the last step still computes."""
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
    """Reads a whole batch. Our errors come back as values: the loader would bury them in a traceback."""

    def __init__(self, dataset: KeyedDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        try:
            return [self.dataset[key] for key in keys]
        except DistInitError as error:
            return [error]


def _outlive_sigterm(worker: int) -> None:
    """A job's SIGTERM goes to all its processes. The main one finishes its step and writes a checkpoint; a
    worker that died meanwhile would raise in the middle of that step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collate_values(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(values)
    if isinstance(first, Mapping):
        return {key: _collate_values([value[key] for value in values]) for key in first}
    if isinstance(first, (bool, int, float)):
        return torch.tensor(values)
    return values


def _context(device: torch.device) -> Any:
    """How workers start. Fork is 25 times faster than the others (MEASURED, loader) and safe while nothing
    is open in the parent; with CUDA initialised it is not, and a fork server that has the heavy imports
    done is the next best."""
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    if device.type != "cuda" and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "av"])
    return context
