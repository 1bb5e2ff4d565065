"""`--batch-size auto`: find how many clips fit on a device, by steps of the training itself."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from ..common.devices import resolve_device
from ..common.distributed import SINGLE_PROCESS
from ..common.errors import TrainingError
from .hardware import pick_workers, wrap
from .loader import EpochBatchSampler, KeyedDataset, batch_size_of, read_batches
from .loop_options import DEFAULT_BATCH_SIZE, LoopOptions
from .optimizer import WeightAverage, make_optimizer
from .step import Objective, take_step

log = logging.getLogger(__name__)

L = TypeVar("L", bound=LoopOptions)

FIRST, MOST = 8, 1024  # clips per device that are tried first, and at most
# Kept free for what the tried steps do not have: fragments, validation, buffers of several GPUs.
MARGIN = 0.1
# A training of fewer steps learns less from the same clips, however fast it is.
LEAST_STEPS = 500
EXAMPLES = 4  # real clips, repeated to the size that is tried


def with_batch_size(
    options: L,
    world: int,
    total_clips: int,
    parts: Callable[[], tuple[nn.Module, KeyedDataset, Objective]],
) -> L:
    """Return the options with a number in place of `batch_size: auto`.

    Without a CUDA device it is the default: on a CPU more clips at once are no faster.

    Args:
        options: Of the loop.
        world: The number of processes that share a batch.
        total_clips: Clips of the whole training.
        parts: Makes the student, its clips and its objective, for a GPU.

    Raises:
        TrainingError: Not even one clip fits.
    """
    if options.batch_size != "auto":
        return options
    device = resolve_device(options.device)
    if device.type != "cuda":
        size, why = DEFAULT_BATCH_SIZE, "the default without a CUDA device"
    else:
        most = min(MOST, max(1, total_clips // LEAST_STEPS // world))
        size = world * largest_that_fits(*parts(), options, device, most)
        why = f"what fits, at most {MOST} per GPU and as many as leave {LEAST_STEPS} steps"
    log.info(f"batch size {size}: {why}")
    return options.model_copy(update={"batch_size": size})


def largest_that_fits(
    model: nn.Module,
    dataset: KeyedDataset,
    objective: Objective,
    options: LoopOptions,
    device: torch.device,
    most: int = MOST,
) -> int:
    """Return the largest batch, up to `most` clips, of which a step has memory, less a margin.

    Each size is tried by a whole step on a copy of the model, with its optimizer: neither weights
    nor random states change. The size is doubled until a step runs out of memory, and then refined.

    Raises:
        TrainingError: Not even one clip fits, or the clips cannot be read.
    """
    keys = EpochBatchSampler(batch_size=EXAMPLES, steps_per_epoch=1, epochs=1)
    workers = min(1, pick_workers(options.workers, device))
    (examples,) = islice(read_batches(dataset, keys, workers=workers, device=device), 1)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        shadow = wrap(copy.deepcopy(model), options, device, SINGLE_PROCESS).train()
        optimizer = make_optimizer(shadow, options)
        average = WeightAverage(shadow, options.ema) if options.ema is not None else None

        def fits(size: int) -> bool:
            tried = options.model_copy(update={"batch_size": size})
            batch = repeated(examples, size)
            try:
                take_step(shadow, objective, optimizer, batch, 0.0, tried, device, SINGLE_PROCESS)
            except (torch.OutOfMemoryError, TrainingError) as error:
                if not _out_of_memory(error):
                    raise
                fitted = False
            else:
                fitted = True
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return fitted

        size = _search(fits, most)
        del average
    if size == 0:
        raise TrainingError(
            "--batch-size auto: not even one clip fits into the GPU's memory; take a smaller --width, --frames or "
            "--size, or --precision bf16"
        )
    return size


def _search(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest size up to `most` that fits, less the margin; 0 if none does."""
    size, failed = min(FIRST, most), 0
    while size and not fits(size):
        size, failed = size // 2, size
    while size and not failed and size < most:
        larger = min(2 * size, most)
        size, failed = (larger, 0) if fits(larger) else (size, larger)
    if not size or not failed:
        return size
    while failed - size > max(1, size // 8):
        middle = (size + failed) // 2
        size, failed = (middle, failed) if fits(middle) else (size, middle)
    size = max(1, int(size * (1 - MARGIN)))
    return size - size % 8 if size >= 16 else size


def repeated(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a batch of `size` rows, those of a smaller batch again and again."""
    rows = batch_size_of(batch)
    index = [row % rows for row in range(size)]

    def take(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: take(inner) for name, inner in value.items()}
        return value[torch.tensor(index)] if torch.is_tensor(value) else [value[i] for i in index]

    return {name: take(value) for name, value in batch.items()}


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        error.__cause__, torch.OutOfMemoryError
    )
