"""How a machine is shared between loader processes and torch, and the precision of the forward pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def cores() -> int:
    """Cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return max(1, len(affinity(0)) if affinity is not None else os.cpu_count() or 1)


def pick_workers(workers: int | None, device: torch.device) -> int:
    """Loader processes: as asked for, or by the machine. On a CPU the student is the slow part (a core
    decodes more clips than four train on), on a GPU decoding is."""
    if workers is not None:
        return workers
    return max(1, cores() // 4) if device.type == "cpu" else max(1, min(16, cores() - 1))


@contextmanager
def torch_threads(threads: int | None, workers: int, device: torch.device) -> Iterator[None]:
    """Torch's threads during training on a CPU: cores - workers, at least 1; on a GPU untouched.

    Threads that share cores with busy loader processes spin: up to 18 times slower (MEASURED). A user's
    OMP_NUM_THREADS stands unless `threads` is given.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bf16 autocast on any device, or nothing for fp32. bf16 has float32's range: no loss scaling."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
