"""How a machine is shared between loader processes and torch, and the precision of the forward
pass."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..common.devices import keep_freed_memory
from ..common.processes import cores


def pick_workers(workers: int | None, device: torch.device) -> int:
    """Loader processes: as asked for, or by the machine. On a CPU the student is the slow part (a
    core decodes more clips than four train on), on a GPU decoding is."""
    if workers is not None:
        return workers
    return max(1, cores() // 4) if device.type == "cpu" else max(1, min(16, cores() - 1))


@contextmanager
def torch_threads(threads: int | None, workers: int, device: torch.device) -> Iterator[None]:
    """Torch's threads in training or a test on a CPU: cores - workers, at least 1; on a GPU
    untouched.

    Threads that share cores with busy loader processes spin, which makes them several times slower
    (docs/benchmarks.md). A user's OMP_NUM_THREADS stands unless `threads` is given. On a CPU the
    memory of freed tensors is kept, for the rest of the process.
    """
    before = torch.get_num_threads()
    if device.type == "cpu":
        keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def place(model: nn.Module, device: torch.device, *, channels_last: bool = True) -> nn.Module:
    """The model on `device`, its 3D convolutions channels-last: measured a fifth faster on a CPU in
    fp32."""
    model.to(device)
    for parameter in model.parameters() if channels_last else ():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return model


def out_of_memory_hint(clips: int) -> str:
    """Of a forward pass that a GPU has no memory for: what to set."""
    return (
        f"{clips} clips at once do not fit into the GPU's memory; set loop.micro_batch_size lower, which accumulates "
        "gradients, or loop.precision=bf16"
    )


def slow_bf16_warning(device: torch.device, precision: str) -> str | None:
    """A warning, where the precision is one that the machine only imitates: bf16 on an x86 CPU
    without bf16 instructions was measured 15 times slower than fp32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if precision != "bf16" or device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if supported is None or supported():
        return None
    return "this CPU has no bf16 instructions: precision=bf16 is many times slower here than fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """bf16 autocast on any device, or nothing for fp32. bf16 has float32's range: no loss
    scaling."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
