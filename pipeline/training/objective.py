"""The objective of a distillation, from its options and the store."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..common.errors import UsageError
from ..common.progress_bar import progress_bar
from ..targets.sampler import ClipSample, TargetSampler
from ..targets.teacher_targets import TeacherTargets
from .distillation import Distillation
from .distillation_options import Loss, TargetOptions, resolve_losses
from .losses import HeadLoss
from .reference_losses import DRAWS, head_bounds

log = logging.getLogger(__name__)


def make_objective(
    options: TargetOptions, targets: Mapping[str, TeacherTargets], baselines: Mapping[str, float]
) -> Distillation:
    """Return what a student learns: the losses of these teachers.

    Args:
        options: Losses, temperature and weights.
        targets: teacher → what its targets are.
        baselines: teacher → the loss that its own is divided by, where it is.

    Raises:
        UsageError: A loss is not one of that teacher's output.
    """
    losses = resolve_losses(options.loss, {name: each.output for name, each in targets.items()})
    heads = {name: head_loss(options, targets[name], loss) for name, loss in losses.items()}
    weights = {
        name: options.loss_weights.get(name, 1.0) / baselines.get(name, 1.0) for name in targets
    }
    return Distillation(tuple(targets), weights=weights, heads=heads)


def head_loss(options: TargetOptions, targets: TeacherTargets, loss: Loss) -> HeadLoss:
    """Return the loss of one teacher's head, with the statistics of the store that it needs."""
    head = HeadLoss(targets.output, loss, options.tau, options.mse_reduction)
    if loss not in ("smooth-l1", "mse"):
        return head
    mean, scale = targets.store.statistics(targets.teacher)
    if not scale > 0:
        raise UsageError(
            f"--loss {loss}: all features of teacher {targets.teacher!r} in {targets.store.name} "
            f"are equal; they have no scale"
        )
    return replace(head, mean=torch.from_numpy(mean), scale=scale)


def measure_baselines(
    options: TargetOptions, sampler: TargetSampler, saved: dict[str, Any] | None
) -> dict[str, float]:
    """Return teacher → the loss of its best constant predictor, {} without `balance_losses`.

    A resumed run takes those of its checkpoint.
    """
    if not options.balance_losses:
        return {}
    if saved is not None and "baselines" in saved:
        return dict(saved["baselines"])
    objective = make_objective(options, sampler.targets, {})
    bounds = head_bounds(first_draws(sampler), objective)
    baselines = {name: constant for name, (constant, _) in bounds.items() if constant > 0}
    shown = ", ".join(f"{name} by {value:.3g}" for name, value in baselines.items())
    log.info(f"losses are divided by those of the best constant predictors: {shown}")
    return baselines


def first_draws(sampler: TargetSampler) -> Iterator[ClipSample]:
    """Yield the first draws of a training, at most ten per video."""
    count = min(DRAWS, 10 * len(sampler.videos))
    with progress_bar("measuring targets", count, "draws") as bar:
        for number in range(count):
            yield sampler.draw(*divmod(number, sampler.epoch_clips))
            bar.advance(1)
