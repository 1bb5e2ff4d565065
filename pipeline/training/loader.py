"""Batches by key: from a map-style data set of (epoch, sample) to collated batches on a device.

A batch is a pure function of its keys, so 0, 1 or 4 workers give the same batches, and a run can
start at any step. A data set is any object with `__getitem__((epoch, sample)) -> dict`, and
`__getitems__` of several keys if that is faster; an item that is None is left out of its batch.
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

TIMEOUT_S = 120.0  # for a worker to read one video


class KeyedDataset(Protocol):
    """What the loop reads: one example for each (epoch, sample), a pure function of it."""

    def __getitem__(self, key: Key, /) -> dict[str, Any] | None: ...


class EpochBatchSampler(Sampler[list[Key]]):
    """The keys of all batches from step `start` to the end, over all epochs.

    One sampler for all epochs lets workers read ahead across the border of two epochs.
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
    """The keys (0, 0) … (0, n - 1) once, in order, for evaluation; the last batch may be short."""

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
        dataset: Gives an example for each key.
        batches: The keys of each batch.
        workers: Number of loader processes, which end with the iterator; 0 reads in this process.
        device: Where the batches will be used: for CUDA, tensors are in pinned memory.
        timeout_s: For how long a worker may read one video.
        stop: Asked about once per second of a wait for a worker; true ends the batches.

    Raises:
        DistInitError: As the data set raised it.
        WorkerDied: A worker died, or gave no answer for `timeout_s`; its `path` is the video that
            the worker was reading.
        TrainingError: Another error in a worker, or a limit of the system is met.
    """
    read = partial(_read_batch, dataset)
    made: Iterator[dict[str, Any]] = map(read, batches)
    if workers:
        made = read_in_workers(
            read, batches, workers=workers, device=device, timeout_s=timeout_s, stop=stop
        )
    try:
        for batch in made:
            yield _map_tensors(torch.Tensor.pin_memory, batch) if device.type == "cuda" else batch
    finally:
        if isinstance(made, Generator):
            made.close()


def _read_batch(dataset: KeyedDataset, keys: list[Key]) -> dict[str, Any]:
    many = getattr(dataset, "__getitems__", None)
    return collate(list(many(keys)) if many is not None else [dataset[key] for key in keys])


def collate(items: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Collate examples to a batch; None is left out.

    Tensors are stacked, numbers become tensors, mappings are collated by key, all else becomes a
    list.
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

    Pinned ones are copied while the last step still computes.
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

    The ranks go through the samples of one process with the same batches, each once.
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
    """Every W-th batch, whole: for evaluation, where each sample counts once, without padding."""

    def __init__(self, batches: Sampler[list[Key]], ranks: Ranks) -> None:
        self.batches = batches
        self.ranks = ranks

    def __len__(self) -> int:
        return len(range(self.ranks.rank, len(self.batches), self.ranks.world))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Key]]:
        for number, batch in enumerate(self.batches):
            if number % self.ranks.world == self.ranks.rank:
                yield batch
