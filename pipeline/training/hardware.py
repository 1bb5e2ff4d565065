"""Fit a training to a machine: loader processes and threads, precision, memory layout, ranks."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..common.devices import keep_freed_memory
from ..common.distributed import Ranks
from ..common.processes import cores
from .batch_norm import use_folded_backward
from .loop_options import LoopOptions


def pick_workers(workers: int | None, device: torch.device) -> int:
    """Return the number of loader processes: `workers`, or depending on the machine."""
    # On a CPU the student is the slow part (a core decodes more clips than four train on), on a GPU
    # decoding is.
    if workers is not None:
        return workers
    return max(1, cores() // 4) if device.type == "cpu" else max(1, min(16, cores() - 1))


@contextmanager
def torch_threads(threads: int | None, workers: int, device: torch.device) -> Iterator[None]:
    """Set the number of torch's threads inside the context.

    On a CPU the memory of freed tensors is kept, for the rest of the process.

    Args:
        threads: The number; None for cores - workers (at least 1) on a CPU, unless OMP_NUM_THREADS
            is set, and torch's default on a GPU.
        workers: Number of loader processes.
        device: Where the model computes.
    """
    # Threads that share cores with busy loader processes spin, which makes them several times
    # slower (docs/benchmarks.md).
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


def out_of_memory_hint(clips: int) -> str:
    """Return what to set when a GPU has no memory for a forward pass of `clips` clips."""
    return (
        f"{clips} clips at once do not fit into the GPU's memory; set loop.micro_batch_size lower, which accumulates "
        "gradients, or loop.precision=bf16"
    )


def slow_bf16_warning(device: torch.device, precision: str) -> str | None:
    """Return a warning where the machine only emulates the precision.

    bf16 on an x86 CPU without bf16 instructions was measured 15 times slower than fp32.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if precision != "bf16" or device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if supported is None or supported():
        return None
    return "this CPU has no bf16 instructions: precision=bf16 is many times slower here than fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return bf16 autocast on any device, or nothing for fp32."""
    # bf16 has the range of float32: no loss scaling.
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def wrap(model: nn.Module, options: LoopOptions, device: torch.device, ranks: Ranks) -> nn.Module:
    """Return `model`, changed in place; with several ranks the DistributedDataParallel around it.

    The model keeps its parameters' names, so checkpoints and exports are those of one process. All
    ranks have the weights of rank 0 from here on.
    """
    lay_out(model, options, device)
    if ranks.world > 1 and options.sync_batchnorm and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if options.compile != "none":
        model.compile(mode=options.compile)
    if ranks.world == 1:
        return model
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def lay_out(model: nn.Module, options: LoopOptions, device: torch.device) -> None:
    """Move `model` to its device, in the memory format in which it is trained."""
    model.to(device)
    if options.channels_last:
        _to_channels_last(model)
        if device.type == "cpu" and options.compile == "none":
            use_folded_backward(model)


def _to_channels_last(model: nn.Module) -> None:
    """Store the weights of 3D convolutions channels-last."""
    # Measured a fifth faster on a CPU in fp32.
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Copy the buffers of rank 0, which writes the checkpoints, to every rank."""
    # DistributedDataParallel copies them before a step, not after: without synchronised BatchNorm
    # each rank has the running statistics of its share of the last batch.
    if ranks.world == 1:
        return
    of_main = ranks.on_main(lambda: [buffer.cpu() for buffer in model.buffers()])
    for buffer, value in zip(model.buffers(), of_main, strict=True):
        buffer.copy_(value)
