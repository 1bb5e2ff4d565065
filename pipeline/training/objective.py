"""The objective of a distillation, made from its options and the store, and its reference losses.

The reference losses are the loss of the best constant predictor and the lower bound. A loss that
falls from its first steps to that of the best constant predictor looks like learning, but is not; a
run that ended there was once mistaken for a result (docs/results.md).

Shapes: M draws, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.errors import UsageError
from ..common.numerics import distribution_entropy
from ..common.progress_bar import progress_bar
from ..targets.sampler import ClipSample, TargetSampler
from ..targets.teacher_targets import TeacherTargets, soft_targets
from .distillation import Distillation
from .distillation_options import Loss, TargetOptions, resolve_losses
from .losses import HeadLoss

log = logging.getLogger(__name__)

BISECTIONS = 24
# With so many draws the error of the baseline loss is below K / (2 · DRAWS) nats; it is largest for
# targets of low entropy.
DRAWS = 2000
# A student with a smaller explained fraction has learned next to nothing.
TOO_LITTLE = 0.05


def make_objective(
    options: TargetOptions, targets: Mapping[str, TeacherTargets], baselines: Mapping[str, float]
) -> Distillation:
    """Make the objective of a student: the weighted losses of these teachers.

    Args:
        options: Losses, temperature and weights.
        targets: Teacher → its targets.
        baselines: Teacher → divisor of its loss; teachers that are not named have none.

    Raises:
        UsageError: A loss does not exist for the output of its teacher.
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
    """Return teacher → the loss of its best constant predictor; {} without `balance_losses`.

    A resumed run takes the values of its checkpoint.
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
    num_draws = min(DRAWS, 10 * len(sampler.videos))
    with progress_bar("measuring targets", num_draws, "draws") as bar:
        for number in range(num_draws):
            yield sampler.draw(*divmod(number, sampler.epoch_clips))
            bar.advance(1)


@dataclass(frozen=True)
class LossBounds:
    """The baseline loss and the lower bound of a student's loss.

    Both are weighted sums over teachers, as in training.

    Args:
        constant: Loss of the best constant predictor.
        perfect: Lower bound: loss of a student that predicts every target.
    """

    constant: float
    perfect: float

    def explained_fraction(self, loss: float) -> float:
        """Return how far a loss has come from `constant` (0) to `perfect` (1).

        The fraction is negative for a loss above `constant`, and 0 if all clips have the same
        target.
        """
        room = self.constant - self.perfect
        return (self.constant - loss) / room if room > 1e-6 else 0.0


def loss_bounds(samples: Iterable[ClipSample], objective: Distillation) -> LossBounds | None:
    """Return the bounds of an objective, for each teacher over the draws that count for it.

    Return None if no draw counts.
    """
    by_teacher = head_bounds(samples, objective)
    if not by_teacher:
        return None
    weights = objective.weights
    return LossBounds(
        constant=sum(weights[name] * constant for name, (constant, _) in by_teacher.items()),
        perfect=sum(weights[name] * perfect for name, (_, perfect) in by_teacher.items()),
    )


def head_bounds(
    samples: Iterable[ClipSample], objective: Distillation
) -> dict[str, tuple[float, float]]:
    """Return teacher → (loss of the best constant predictor, lower bound), both unweighted."""
    targets: dict[str, list[NDArray[np.float32]]] = {name: [] for name in objective.teachers}
    for sample in samples:
        for name, rows in targets.items():
            if sample.weight[name]:
                rows.append(sample.targets[name])
    return {
        name: _bounds(np.stack(rows), objective.heads[name])
        for name, rows in targets.items()
        if rows
    }


def most_frequent_shares(
    samples: Iterable[ClipSample], teachers: Iterable[str]
) -> dict[str, float]:
    """Return teacher → the share of clips with its most frequent top class.

    This share is the agreement of a constant predictor. Only clips that count for the teacher are
    included. Teachers of features have no share.
    """
    top_classes: dict[str, list[int]] = {name: [] for name in teachers}
    for sample in samples:
        for name, classes in top_classes.items():
            if sample.weight[name]:
                classes.append(int(np.argmax(sample.targets[name])))
    return {
        name: float(np.max(np.bincount(classes)) / len(classes))
        for name, classes in top_classes.items()
        if classes
    }


def _bounds(targets: NDArray[np.float32], head: HeadLoss) -> tuple[float, float]:
    """Return (loss of the best constant, lower bound) for one teacher's mean outputs [M, K].

    Cross-entropy (eq. 2): the entropy of the mean target, and the mean entropy of the targets, at
    the head's τ. Squared errors: the variance of the targets, and 0. Cosine: 1 minus the length of
    the mean of the unit vectors, whose direction is the best constant, and 0. Smooth L1: the loss
    of the constant where the derivative is zero in every dimension, and 0.
    """
    if head.loss == "cross-entropy":
        soft = np.stack([soft_targets(each, head.tau) for each in targets]).astype(np.float64)
        entropy_of_mean = distribution_entropy(soft.mean(axis=0))
        return float(entropy_of_mean), float(distribution_entropy(soft).mean())
    exact = targets.astype(np.float64)
    if head.loss == "squared-error":
        variance = exact.var(axis=0)
        return float(variance.sum() if head.mse_reduction == "sum" else variance.mean()), 0.0
    if head.loss == "cosine":
        if head.output == "logits":
            exact -= exact.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(exact, axis=1, keepdims=True)
        return float(1 - np.linalg.norm((exact / np.maximum(norms, 1e-12)).mean(axis=0))), 0.0
    if head.mean is not None:
        exact -= head.mean.double().numpy(force=True)
    exact /= head.scale
    if head.loss == "mse":
        return float(exact.var(axis=0).mean()), 0.0
    distance = np.abs(exact - _huber_location(exact))
    return float(np.where(distance < 1, distance**2 / 2, distance - 0.5).mean()), 0.0


def _huber_location(targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the constant [K] with the smallest smooth L1 loss to targets [M, K], by bisection."""
    low, high = targets.min(axis=0), targets.max(axis=0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = np.clip(targets - middle, -1, 1).sum(axis=0) > 0
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray((low + high) / 2)
