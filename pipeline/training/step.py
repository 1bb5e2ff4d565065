"""One step of the optimizer: over pieces that fit on a GPU, and over all processes.

A step's loss is the sum over the clips that count divided by their number, both over all pieces of
all ranks. So the number must be known before the first backward pass, and the ranks' losses are
added, not averaged.
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
    """An objective's loss on some of a step's clips; the reports of all of them add up.

    Args:
        loss: scalar with a graph: the sum over these clips, divided by the step's count (0 with a
            graph if none of them counts).
        parts: further scalars for the log, divided in the same way: the loss of each teacher, the
            accuracy. The names are the same in every report.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is learned. Its batches are those of the data set, on the device already."""

    def counts(self, batch: Mapping[str, Any], /) -> Tensor:
        """Return what the losses of a step are divided by, int64 [1 or more], on the CPU.

        The first number is that of the clips of this batch that count at all, then whatever else
        the objective divides by (the clips that each head counts). They are added over the whole
        step.
        """
        ...

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor, /) -> LossReport:
        """Compute the loss of a batch.

        It runs under autocast when the precision is bf16; the loss itself is to be computed in
        float32.

        Args:
            model: maps the batch's clips to outputs.
            batch: on the device.
            counts: those of the whole step.
        """
        ...


@dataclass(frozen=True)
class StepReport:
    """A step as a whole, over all ranks.

    Args:
        loss: mean over the clips that count.
        kept: the number of clips that count.
        clips: the number of all clips.
        rejected: draws that the filter turned down.
        parts: means over the clips that count, by name.
        unreadable: (video, reason) of those that could not be read.
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
        model: the student, or the DistributedDataParallel around it.
        objective: gives the loss.
        optimizer: of the model's parameters.
        batch: this rank's share, on the CPU.
        rate: the learning rate.
        options: of the loop.
        device: where the model is.
        ranks: the processes that train together.

    Raises:
        TrainingError: on all ranks, when the loss or the gradient is not finite; nothing is
            updated.
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
        last = number == len(pieces) - 1
        # Gradients are exchanged once per step, with those of the last piece.
        waiting = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if waiting else nullcontext():  # type: ignore[operator]
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
        # DDP divides the sum of gradients by the number of ranks, but each rank's loss is a summand
        # already.
        (report.loss * ranks.world).backward()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"rank {ranks.rank}: {out_of_memory_hint(batch_size_of(piece))}"
        ) from error
    return LossReport(
        report.loss.detach(), {name: value.detach() for name, value in report.parts.items()}
    )


def split(batch: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """Split a batch into `pieces` parts of nearly equal size.

    The number of parts is the same on each rank, so some may be empty.
    """
    rows = batch_size_of(batch)
    bounds = [number * rows // pieces for number in range(pieces + 1)]
    return [_rows(batch, first, end) for first, end in pairwise(bounds)]


def _rows(batch: Mapping[str, Any], first: int, end: int) -> dict[str, Any]:
    return {
        key: _rows(value, first, end) if isinstance(value, Mapping) else value[first:end]
        for key, value in batch.items()
    }


def _not_finite(
    loss: float, rate: float, losses: list[float], pieces: list[dict[str, Any]], ranks: Ranks
) -> TrainingError:
    """Return the error of a step that is not finite.

    It names the videos of the pieces whose own loss is not finite, or all if each loss is finite.
    """

    def names(which: list[dict[str, Any]]) -> list[str]:
        return [name for piece in which for name in piece.get("name", ["unknown"])]

    bad = [piece for piece, value in zip(pieces, losses, strict=True) if not math.isfinite(value)]
    gathered = ranks.gather((names(bad), names(pieces)))
    videos = [name for some, _ in gathered for name in some] or [
        name for _, every in gathered for name in every
    ]
    what = "gradient" if math.isfinite(loss) else "loss"
    return TrainingError(
        f"the {what} is not finite (loss {loss}) at learning rate {rate:g}; "
        f"videos of the batch: {', '.join(videos)}; try a lower loop.lr, loop.clip_norm=5 or loop.precision=fp32"
    )
