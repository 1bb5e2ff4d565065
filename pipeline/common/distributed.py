"""The processes that train one model together: their ranks, and the values that they exchange.

The values are exchanged by gloo between CPUs, also if gradients are exchanged by NCCL, since gloo
reports the end of a process at once. All methods except `same_error` and the properties are
collectives: all ranks call them in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DeviceError, DistInitError, RankLostError, in_one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One of the processes of a run; by default the only one.

    Args:
        rank: Number of the process.
        world: Number of processes.
        local_rank: Number of the process on its machine, and of its GPU.
        group: The gloo group, None for a single process.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes files and shows text."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor on the CPU over the ranks, in place."""
        if self.world > 1:
            with self._name_lost_rank():
                dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the value of each rank, in order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self._name_lost_rank():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone, and return its result on all ranks.

        An error of `work` is raised on all ranks.
        """
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except DistInitError as error:
                outcome[1] = error
        with self._name_lost_rank():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            outcome[1].shared = True
            raise outcome[1]
        result: T = outcome[0]
        return result

    @contextmanager
    def holding(self, lock: AbstractContextManager[None]) -> Iterator[None]:
        """Hold a lock on rank 0 alone during the block.

        An error of taking the lock is raised on all ranks.
        """
        with ExitStack() as stack:
            self.on_main(lambda: stack.enter_context(lock))
            yield

    def on_all_ranks(self, work: Callable[[], T]) -> T:
        """Run `work` on each rank and return its result.

        If it fails on any rank, the error of the first such rank is raised on all.
        """
        if self.world == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except DistInitError as error:
            failure = error
        if int(self.sum(torch.tensor([failure is not None], dtype=torch.int64))):
            raise self._first_error(failure)
        return result  # type: ignore[return-value]

    def synchronized(self, batches: Iterable[T], stop: Callable[[], bool]) -> Iterator[T]:
        """Yield batches while every rank has one and none has to stop.

        An error of the iterator is raised on all ranks.
        """
        iterator = iter(batches)
        if self.world == 1:
            while not stop() and (batch := next(iterator, None)) is not None:
                yield batch
            return
        while True:
            batch, failure = None, None
            try:
                batch = next(iterator, None)
            except DistInitError as error:
                failure = error
            flags = torch.tensor([failure is not None, batch is None or stop()], dtype=torch.int64)
            failed, ended = self.sum(flags).tolist()
            if failed:
                raise self._first_error(failure)
            if ended or batch is None:
                return
            yield batch

    @contextmanager
    def same_error(self) -> Iterator[None]:
        """Mark errors of distinit in the block as shared by all ranks.

        All ranks raise them with the same message, so that one reports it.
        """
        try:
            yield
        except DistInitError as error:
            error.shared = error.shared or self.world > 1
            raise

    def _first_error(self, failure: DistInitError | None) -> DistInitError:
        errors = self.gather(failure)
        rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        same = all(error is not None and str(error) == str(first) for error in errors)
        error = first
        if not same and not isinstance(first, RankLostError):
            error = type(first)(f"rank {rank}: {first}")
            error.__dict__.update(first.__dict__)
        error.shared = True
        return error

    @contextmanager
    def _name_lost_rank(self) -> Iterator[None]:
        """Turn a failed exchange in the block into an error that gives the reason.

        Raises:
            RankLostError: Another process has ended.
        """
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
    """Return whether torchrun (or `--gpus`) has started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def join_ranks(device: str, init_method: str = "env://") -> Iterator[Ranks]:
    """Connect the ranks that a launcher started; each uses the GPU with its local number.

    Args:
        device: As in `loop.device`.
        init_method: Where the processes meet, as torch takes it.

    Raises:
        DeviceError: The machine has fewer GPUs than processes, or the device is `cuda:N`, which
            would put all of them on one.
        RankLostError: Another process has ended before all were connected.
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
                f"process {local} of this machine has no GPU: the machine has {count}"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=world,
            device_id=torch.device("cuda", local) if gpu else None,
        )
    except RuntimeError as error:
        raise RankLostError(
            f"rank {rank}: cannot connect to the other processes: {in_one_line(error)}"
        ) from error
    try:
        ranks = Ranks(
            rank, world, local, dist.new_group(backend="gloo") if gpu else dist.group.WORLD
        )
        # Wait for all ranks: one that fails earlier would end the others with an error of gloo.
        ranks.sum(torch.zeros(1))
        yield ranks
    finally:
        dist.destroy_process_group()
