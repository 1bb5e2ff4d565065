"""One step of the optimizer: over pieces that fit on a GPU, and over all processes.

A step's loss is the sum over the clips that count divided by their number, both over all pieces of
all ranks. So the number must be known before the first backward pass, and what ranks have is added,
not averaged.
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
from .loader import batch_size_of, to_device
from .loop_options import LoopOptions
from .precision import autocast, out_of_memory_hint


@dataclass(frozen=True)
class LossReport:
    """What an objective says of some of a step's clips, such that the reports of all of them add
    up.

    loss: scalar with a graph: the sum over these clips, divided by the step's count (0 with a graph
        if none of them counts). parts: scalars worth logging beside it, divided alike: the loss of
        each teacher, the accuracy. Always the same names.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What is learned. Its batches are those of the data set, on the device already."""

    def counts(self, batch: Mapping[str, Any], /) -> Tensor:
        """int64 [1 or more], on the CPU: the clips of this batch that count at all, then whatever
        else the objective divides by (the clips that each head counts). They are added over the
        whole step."""
        ...

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor, /) -> LossReport:
        """Forward and loss. counts: those of the whole step. It runs under autocast when precision
        is bf16; the loss itself is to be computed in float32."""
        ...


@dataclass(frozen=True)
class StepReport:
    """A step as a whole, over all ranks. loss, parts: means over the clips that count, `kept` of
    `clips`.

    rejected: draws that the filter turned down. broken: (video, reason) of those that could not be
        read.
    """

    loss: float
    kept: int
    clips: int
    rejected: int
    parts: dict[str, float]
    broken: list[tuple[str, str]]


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
    """One step on this rank's share of a batch. TrainingError, on all ranks, when the loss or the
    gradient is not finite: nothing is updated then."""
    broken = [item for found in batch.get("broken", ()) for item in found]
    told = torch.tensor(
        [
            batch_size_of(batch),
            int(batch["rejected"].sum()) if "rejected" in batch else 0,
            len(broken),
        ]
    )
    numbers = ranks.sum(torch.cat([told, objective.counts(batch)]))
    (clips, rejected, unreadable), counts = numbers[:3].tolist(), numbers[3:]
    if unreadable and ranks.world > 1:
        broken = [item for found in ranks.gather(broken) for item in found]

    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    pieces = split(batch, options.accumulation_steps(ranks.world))
    reports = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        # Gradients are exchanged once a step, with those of the last piece.
        waiting = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if waiting else nullcontext():  # type: ignore[operator]
            reports.append(_backward(model, objective, piece, counts, options, device, ranks))
    norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or math.inf)

    own = [float(report.loss) for report in reports]
    names = list(reports[0].parts)
    parts = [sum(float(report.parts[name]) for report in reports) for name in names]
    total, *parts = ranks.sum(torch.tensor([sum(own), *parts], dtype=torch.float64)).tolist()
    if not math.isfinite(total + float(norm)):
        raise _not_finite(total, rate, own, pieces, ranks)
    optimizer.step()
    return StepReport(
        total, int(counts[0]), clips, rejected, dict(zip(names, parts, strict=True)), broken
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
    """Adds the gradients of one piece; its report, without the graph."""
    try:
        with autocast(device, options.precision):
            report = objective(model, to_device(piece, device), counts)
        # DDP divides the sum of gradients by the number of ranks; what each has is a summand
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
    """A batch in `pieces` parts of nearly equal size, the same number on each rank: some may be
    empty."""
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
    """The error, with the videos of the pieces whose own loss is not finite, or of all if each loss
    is."""

    def names(which: list[dict[str, Any]]) -> list[str]:
        return [name for piece in which for name in piece.get("name", ["unknown"])]

    bad = [piece for piece, own in zip(pieces, losses, strict=True) if not math.isfinite(own)]
    found = ranks.gather((names(bad), names(pieces)))
    videos = [name for some, _ in found for name in some] or [
        name for _, every in found for name in every
    ]
    what = "gradient" if math.isfinite(loss) else "loss"
    return TrainingError(
        f"the {what} is not finite (loss {loss}) at learning rate {rate:g}; "
        f"videos of the batch: {', '.join(videos)}; try a lower loop.lr, loop.clip_norm=5 or loop.precision=fp32"
    )
