"""Batches by key: from a map-style data set of (epoch, sample) to collated batches on a device.

A batch is a pure function of its keys, so any number of workers gives the same batches, and a run
can start at any step. A data set is any object with `__getitem__((epoch, sample)) -> dict`; it may
also have `__getitems__` for several keys. An item that is None is left out of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import Sampler

from ..clips.seeding import Key
from ..common.distributed import Ranks
from .loader_workers import read_in_workers

# How long a worker may take to read one video.
TIMEOUT_S = 120.0


class KeyedDataset(Protocol):
    """The data set of a loop: each example is a pure function of its key (epoch, sample)."""

    def __getitem__(self, key: Key, /) -> dict[str, Any] | None: ...


class EpochBatchSampler(Sampler[list[Key]]):
    """The keys of all batches from step `start` to the end of the last epoch.

    Since one sampler serves all epochs, workers read ahead into the next epoch.
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
    """The keys (0, 0) … (0, n - 1) in order, for evaluation; the last batch may be smaller."""

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
    timeout_s: float = TIMEOUT_S,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[dict[str, Any]]:
    """Yield the collated batches of a data set, in order; see `collate`.

    Args:
        dataset: Returns an example for each key.
        batches: The keys of each batch.
        workers: Number of loader processes, which end with the iterator; 0 reads in this process.
        device: Device that the batches are for. For CUDA their tensors are in pinned memory.
        timeout_s: How long a worker may take to read one video.
        stop: Called about once per second while waiting for a worker; true ends the batches.

    Raises:
        DistInitError: The data set raised it.
        WorkerDied: A worker died, or did not respond for `timeout_s`; its `path` is the video that
            the worker was reading.
        TrainingError: Another error in a worker, or a limit of the system was reached.
    """
    read = partial(_read_batch, dataset)
    read_ahead: Iterator[dict[str, Any]] = map(read, batches)
    if workers:
        read_ahead = read_in_workers(
            read, batches, workers=workers, device=device, timeout_s=timeout_s, stop=stop
        )
    try:
        for batch in read_ahead:
            yield _map_tensors(torch.Tensor.pin_memory, batch) if device.type == "cuda" else batch
    finally:
        if isinstance(read_ahead, Generator):
            read_ahead.close()


def _read_batch(dataset: KeyedDataset, keys: list[Key]) -> dict[str, Any]:
    get_items = getattr(dataset, "__getitems__", None)
    return collate(
        list(get_items(keys)) if get_items is not None else [dataset[key] for key in keys]
    )


def collate(items: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Collate examples to a batch, without items that are None.

    Tensors are stacked, numbers become a tensor, mappings are collated by key, and other values
    become a list.
    """
    rows = [item for item in items if item is not None]
    return {key: _collate_values([row[key] for row in rows]) for key in rows[0]} if rows else {}


def _collate_values(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(values)
    if isinstance(first, Mapping):
        return {key: _collate_values([value[key] for value in values]) for key in first}
    if isinstance(first, (bool, int, float)):
        return torch.tensor(values)
    return values


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`.

    Tensors in pinned memory are copied while the previous step still computes.
    """
    return _map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def _map_tensors(change: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map_tensors(change, value) for key, value in batch.items()}
    return batch


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """Return B of a batch: the length of its first tensor; 0 for an empty batch."""
    for value in batch.values():
        if isinstance(value, Mapping):
            return batch_size_of(value)
        return len(value)
    return 0


class SplitBatchSampler(Sampler[list[Key]]):
    """This rank's part of every batch: rank r of W takes samples r·B/W … (r + 1)·B/W - 1 of B.

        B = 8, W = 3:   0 1 | 2 3 4 | 5 6 7

    Together the ranks read each sample of every batch once.
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
    """Every W-th batch, for evaluation: each sample counts once, without padding."""

    def __init__(self, batches: Sampler[list[Key]], ranks: Ranks) -> None:
        self.batches = batches
        self.ranks = ranks

    def __len__(self) -> int:
        return len(range(self.ranks.rank, len(self.batches), self.ranks.world))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Key]]:
        for number, batch in enumerate(self.batches):
            if number % self.ranks.world == self.ranks.rank:
                yield batch
