"""One step of the optimizer, over pieces of a batch that fit on a GPU, and over all processes.

The loss of a step is the sum over the clips that count, divided by their number; both are taken
over all pieces of all ranks. So the number is computed before the first backward pass, and the
losses of the ranks are added, not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common.distributed import Ranks
from ..common.errors import TrainingError
from .hardware import autocast, out_of_memory_hint
from .loader import batch_size_of, to_device
from .loop_options import LoopOptions


@dataclass(frozen=True)
class LossReport:
    """The loss of a piece of a step's clips. The reports of all pieces add up to the step's loss.

    Args:
        loss: Scalar with a graph: the sum over these clips, divided by the count of the whole step;
            0 with a graph if no clip counts.
        parts: More scalars for the log, divided in the same way, such as the loss of each teacher
            or the accuracy. All reports have the same names.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """The loss that is minimised. It gets batches of the data set, already on the device."""

    def counts(self, batch: Mapping[str, Any], /) -> Tensor:
        """Return the divisors of a step's losses, int64 [1 or more], on the CPU.

        The first one is the number of clips of this batch that count. The objective may add others,
        such as the number of clips that count for each head. They are summed over the whole step.
        """
        ...

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor, /) -> LossReport:
        """Compute the loss of a batch.

        With precision bf16 it runs under autocast; the loss itself must be computed in float32.

        Args:
            model: Maps the clips of the batch to outputs.
            batch: The batch, on the device.
            counts: Sums of `counts` over the whole step.
        """
        ...


@dataclass(frozen=True)
class StepReport:
    """The result of a step over all ranks.

    Args:
        loss: Mean over the clips that count.
        kept: Number of clips that count.
        clips: Number of all clips.
        rejected: Number of draws that the filter rejected.
        parts: Means over the clips that count, by name.
        unreadable: (video, reason) of each unreadable video.
    """

    loss: float
    kept: int
    clips: int
    rejected: int
    parts: dict[str, float]
    unreadable: list[tuple[str, str]]


def take_step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    rate: float,
    options: LoopOptions,
    device: torch.device,
    ranks: Ranks,
) -> StepReport:
    """Do one step on this rank's share of a batch.

    Args:
        model: The student, or the DistributedDataParallel around it.
        objective: Computes the loss.
        optimizer: Optimizer of the model's parameters.
        batch: This rank's share, on the CPU.
        rate: The learning rate.
        options: Options of the loop.
        device: The device of the model.
        ranks: The processes that train together.

    Raises:
        TrainingError: The loss or the gradient is not finite, on all ranks; nothing is updated.
    """
    unreadable = [item for items in batch.get("unreadable", ()) for item in items]
    numbers = torch.tensor(
        [
            batch_size_of(batch),
            int(batch["rejected"].sum()) if "rejected" in batch else 0,
            len(unreadable),
        ]
    )
    sums = ranks.sum(torch.cat([numbers, objective.counts(batch)]))
    (clips, rejected, num_unreadable), counts = sums[:3].tolist(), sums[3:]
    if num_unreadable and ranks.world > 1:
        unreadable = [item for items in ranks.gather(unreadable) for item in items]

    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    pieces = split(batch, options.accumulation_steps(ranks.world))
    reports = []
    for number, piece in enumerate(pieces):
        is_last = number == len(pieces) - 1
        # Ranks exchange gradients once per step, in the backward pass of the last piece.
        without_sync = isinstance(model, DistributedDataParallel) and not is_last
        with model.no_sync() if without_sync else nullcontext():  # type: ignore[operator]
            reports.append(_backward(model, objective, piece, counts, options, device, ranks))
    norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or math.inf)

    losses = [float(report.loss) for report in reports]
    names = list(reports[0].parts)
    parts = [sum(float(report.parts[name]) for report in reports) for name in names]
    total, *parts = ranks.sum(torch.tensor([sum(losses), *parts], dtype=torch.float64)).tolist()
    if not math.isfinite(total + float(norm)):
        raise _not_finite(total, rate, losses, pieces, ranks)
    optimizer.step()
    return StepReport(
        total, int(counts[0]), clips, rejected, dict(zip(names, parts, strict=True)), unreadable
    )


def _backward(
    model: nn.Module,
    objective: Objective,
    piece: dict[str, Any],
    counts: Tensor,
    options: LoopOptions,
    device: torch.device,
    ranks: Ranks,
) -> LossReport:
    """Add the gradients of one piece, and return its report without the graph."""
    try:
        with autocast(device, options.precision):
            report = objective(model, to_device(piece, device), counts)
        # DDP averages the gradients of the ranks, but the losses of the ranks have to be added.
        (report.loss * ranks.world).backward()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"rank {ranks.rank}: {out_of_memory_hint(batch_size_of(piece))}"
        ) from error
    return LossReport(
        report.loss.detach(), {name: value.detach() for name, value in report.parts.items()}
    )


def split(batch: Mapping[str, Any], num_pieces: int) -> list[dict[str, Any]]:
    """Split a batch into pieces of nearly equal size.

    Every rank has the same number of pieces, so some may be empty.
    """
    size = batch_size_of(batch)
    bounds = [number * size // num_pieces for number in range(num_pieces + 1)]
    return [_rows(batch, first, end) for first, end in pairwise(bounds)]


def _rows(batch: Mapping[str, Any], first: int, end: int) -> dict[str, Any]:
    return {
        key: _rows(value, first, end) if isinstance(value, Mapping) else value[first:end]
        for key, value in batch.items()
    }


def _not_finite(
    loss: float, rate: float, losses: list[float], pieces: list[dict[str, Any]], ranks: Ranks
) -> TrainingError:
    """Return the error of a step whose loss or gradient is not finite.

    It names the videos of the pieces whose loss is not finite, or all videos if each loss is
    finite.
    """

    def names_of(subset: list[dict[str, Any]]) -> list[str]:
        return [name for piece in subset for name in piece.get("name", ["unknown"])]

    bad = [piece for piece, value in zip(pieces, losses, strict=True) if not math.isfinite(value)]
    gathered = ranks.gather((names_of(bad), names_of(pieces)))
    videos = [name for bad_names, _ in gathered for name in bad_names] or [
        name for _, all_names in gathered for name in all_names
    ]
    quantity = "gradient" if math.isfinite(loss) else "loss"
    return TrainingError(
        f"the {quantity} is not finite (loss {loss}) at learning rate {rate:g}; "
        f"videos of the batch: {', '.join(videos)}; try a lower loop.lr, loop.clip_norm=5 or loop.precision=fp32"
    )
