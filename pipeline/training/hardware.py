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
    """Return `workers`, or a number of loader processes that suits the machine."""
    # On a CPU the student is slower than decoding: one core decodes more clips than four cores
    # train on. On a GPU decoding is slower.
    if workers is not None:
        return workers
    return max(1, cores() // 4) if device.type == "cpu" else max(1, min(16, cores() - 1))


@contextmanager
def torch_threads(threads: int | None, workers: int, device: torch.device) -> Iterator[None]:
    """Set the number of torch's threads inside the context.

    On a CPU the process also keeps the memory of freed tensors, until it ends.

    Args:
        threads: Number of threads. None means cores - workers (at least 1) on a CPU, unless
            OMP_NUM_THREADS is set, and torch's default on a GPU.
        workers: Number of loader processes.
        device: Device of the model.
    """
    # Threads that share cores with busy loader processes busy-wait, which makes them several times
    # slower (docs/benchmarks.md).
    previous = torch.get_num_threads()
    if device.type == "cpu":
        keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    elif device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() - workers))
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def out_of_memory_hint(clips: int) -> str:
    """Return an error message with remedies if `clips` clips do not fit into a GPU's memory."""
    return (
        f"{clips} clips at once do not fit into the GPU's memory; set loop.micro_batch_size lower, which accumulates "
        "gradients, or loop.precision=bf16"
    )


def slow_bf16_warning(device: torch.device, precision: str) -> str | None:
    """Return a warning if the machine only emulates the precision.

    On an x86 CPU without bf16 instructions bf16 was measured 15 times slower than fp32.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if precision != "bf16" or device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if supported is None or supported():
        return None
    return "this CPU has no bf16 instructions: precision=bf16 is many times slower here than fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return a context with bf16 autocast on any device; for fp32 it does nothing."""
    # bf16 has the range of float32, so that losses need no scaling.
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def wrap(model: nn.Module, options: LoopOptions, device: torch.device, ranks: Ranks) -> nn.Module:
    """Prepare `model` in place and return it, or with several ranks its DistributedDataParallel.

    The model keeps its parameter names, so that checkpoints and exports do not depend on the number
    of processes. All ranks get the weights of rank 0.
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
    """Move `model` to its device, in the memory format of the training."""
    model.to(device)
    if options.channels_last:
        _to_channels_last(model)
        if device.type == "cpu" and options.compile == "none":
            use_folded_backward(model)


def _to_channels_last(model: nn.Module) -> None:
    """Store the weights of 3D convolutions channels-last."""
    # On a CPU in fp32 this was measured a fifth faster.
    for parameter in model.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Copy the buffers of rank 0, which writes the checkpoints, to every rank."""
    # DistributedDataParallel copies buffers before a step, not after it. So without synchronised
    # BatchNorm each rank has running statistics of its own share of the last batch.
    if ranks.world == 1:
        return
    main_buffers = ranks.on_main(lambda: [buffer.cpu() for buffer in model.buffers()])
    for buffer, value in zip(model.buffers(), main_buffers, strict=True):
        buffer.copy_(value)
