"""The processes that train one model together: who is who, and the few things they tell each other.

What is said here goes over gloo between CPUs, also where gradients go over NCCL: a process that has
gone is noticed at once. Every method but the properties is a collective: all ranks call it, in the
same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DeviceError, DistInitError, RankLostError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes, number `rank`; alone where nothing else is said.

    local_rank: its number on its machine, which is that of its GPU. group: the gloo group, None
        alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes and talks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """A tensor on the CPU, summed over the ranks in place."""
        if self.world > 1:
            with self._others():
                dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """The value of each rank, in order, on every rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with self._others():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, for all; what it raises there, on all. Others do not run
        it."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except DistInitError as error:
                outcome[1] = error
        with self._others():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            outcome[1].shared = True
            raise outcome[1]
        result: T = outcome[0]
        return result

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """What `work` returns here; if it fails on any rank, the error of the first such rank on
        all."""
        if self.world == 1:
            return work()
        result, own = None, None
        try:
            result = work()
        except DistInitError as error:
            own = error
        if int(self.sum(torch.tensor([own is not None], dtype=torch.int64))):
            raise self._first(own)
        return result  # type: ignore[return-value]

    def synchronized(self, batches: Iterable[T], stop: Callable[[], bool]) -> Iterator[T]:
        """The batches, as long as every rank has one and none was asked to stop.

        An error on the way to a batch is raised on every rank.
        """
        iterator = iter(batches)
        while self.world > 1 or not stop():
            batch, own = None, None
            try:
                batch = next(iterator, None)
            except DistInitError as error:
                if self.world == 1:
                    raise
                own = error
            if self.world > 1:
                over = batch is None or stop()
                failed, ended = self.sum(
                    torch.tensor([own is not None, over], dtype=torch.int64)
                ).tolist()
                if failed:
                    raise self._first(own)
                if ended:
                    return
            if batch is None:
                return
            yield batch

    @contextmanager
    def same_error(self) -> Iterator[None]:
        """Errors of ours in here come up on every rank with the same words, so one of them is to
        tell."""
        try:
            yield
        except DistInitError as error:
            error.shared = error.shared or self.world > 1
            raise

    def _first(self, own: DistInitError | None) -> DistInitError:
        errors = self.gather(own)
        rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        alike = all(error is not None and str(error) == str(first) for error in errors)
        error = first
        if not alike and not isinstance(first, RankLostError):
            error = type(first)(f"rank {rank}: {first}")
            error.__dict__.update(first.__dict__)
        error.shared = True
        return error

    @contextmanager
    def _others(self) -> Iterator[None]:
        """RankLostError where another process is not there any more."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, DistInitError):
                raise
            raise RankLostError(
                f"rank {self.rank}: another process of this run has ended"
            ) from error


SINGLE_PROCESS = Ranks()


def launched() -> bool:
    """Whether torchrun (or `--gpus`) has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def join_ranks(device: str, init_method: str = "env://") -> Iterator[Ranks]:
    """The ranks of the launcher's environment, connected; each takes the GPU of its local number.

    device: as in `loop.device`. Raises DeviceError for a machine with fewer GPUs than processes,
    and for `cuda:N`, which would put all of them on one.
    """
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        if ":" in device:
            raise DeviceError(
                f"loop.device={device} is one GPU for {world} processes; use cuda or auto"
            )
        count = torch.cuda.device_count()
        if local >= count:
            raise DeviceError(
                f"process {local} of this machine has no GPU of its own: it has {count}"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world,
        device_id=torch.device("cuda", local) if gpu else None,
    )
    try:
        yield Ranks(rank, world, local, dist.new_group(backend="gloo") if gpu else dist.group.WORLD)
    finally:
        dist.destroy_process_group()
