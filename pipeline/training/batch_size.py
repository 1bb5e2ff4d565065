"""`--batch-size auto`: measure how many clips fit on a device, by trying training steps."""

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

# Clips per device that are tried first, and at most.
FIRST_SIZE, MAX_SIZE = 8, 1024
# Share of memory that stays free, because the tried steps do not need it: fragmentation,
# validation, buffers of several GPUs.
MARGIN = 0.1
# With fewer steps a student learns less from the same clips, however fast they are.
MIN_STEPS = 500
# Number of real clips, which are repeated to the size that is tried.
EXAMPLES = 4


def with_batch_size(
    options: L,
    world: int,
    total_clips: int,
    parts: Callable[[], tuple[nn.Module, KeyedDataset, Objective]],
) -> L:
    """Return the options with a number in place of `batch_size: auto`.

    Without a CUDA device it is the default, because larger batches are not faster on a CPU.

    Args:
        options: Options of the loop.
        world: Number of processes that share a batch.
        total_clips: Number of clips of the whole training.
        parts: Makes the student, its clips and its objective; called only with a GPU.

    Raises:
        TrainingError: Not even one clip fits.
    """
    if options.batch_size != "auto":
        return options
    device = resolve_device(options.device)
    if device.type != "cuda":
        size, reason = DEFAULT_BATCH_SIZE, "the default without a CUDA device"
    else:
        max_size = min(MAX_SIZE, max(1, total_clips // MIN_STEPS // world))
        size = world * largest_that_fits(*parts(), options, device, max_size)
        reason = (
            f"the largest that fits, up to {MAX_SIZE} per GPU and with at least {MIN_STEPS} steps"
        )
    log.info(f"batch size {size}: {reason}")
    return options.model_copy(update={"batch_size": size})


def largest_that_fits(
    model: nn.Module,
    dataset: KeyedDataset,
    objective: Objective,
    options: LoopOptions,
    device: torch.device,
    max_size: int = MAX_SIZE,
) -> int:
    """Return the largest batch size, up to `max_size`, that fits into memory, less a margin.

    Each size is tried by a whole step on a copy of the model with its optimizer, so that neither
    weights nor random states change. The size is doubled until a step runs out of memory, and then
    refined.

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
            step_options = options.model_copy(update={"batch_size": size})
            batch = repeated(examples, size)
            try:
                take_step(
                    shadow, objective, optimizer, batch, 0.0, step_options, device, SINGLE_PROCESS
                )
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

        size = _search(fits, max_size)
        del average
    if size == 0:
        raise TrainingError(
            "--batch-size auto: not even one clip fits into the GPU's memory; take a smaller --width, --frames or "
            "--size, or --precision bf16"
        )
    return size


def _search(fits: Callable[[int], bool], max_size: int) -> int:
    """Return the largest size up to `max_size` that fits, less the margin; 0 if none fits."""
    size, failed = min(FIRST_SIZE, max_size), 0
    while size and not fits(size):
        size, failed = size // 2, size
    while size and not failed and size < max_size:
        larger = min(2 * size, max_size)
        size, failed = (larger, 0) if fits(larger) else (size, larger)
    if not size or not failed:
        return size
    while failed - size > max(1, size // 8):
        middle = (size + failed) // 2
        size, failed = (middle, failed) if fits(middle) else (size, middle)
    size = max(1, int(size * (1 - MARGIN)))
    return size - size % 8 if size >= 16 else size


def repeated(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a batch of `size` rows that repeats the rows of a smaller batch."""
    rows = batch_size_of(batch)
    sources = [row % rows for row in range(size)]

    def take(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: take(inner) for name, inner in value.items()}
        if torch.is_tensor(value):
            return value[torch.tensor(sources)]
        return [value[row] for row in sources]

    return {name: take(value) for name, value in batch.items()}


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or isinstance(
        error.__cause__, torch.OutOfMemoryError
    )
