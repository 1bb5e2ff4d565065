"""Between which two losses a student learns: one that has learned nothing, and one that knows every
target.

A loss that falls a little, from its first steps to that of a constant guess, looks like learning
and is none. A run whose student ended there was once taken for a finding of its own
(docs/results.md).

Shapes: M draws, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.numerics import distribution_entropy
from ..targets.sampler import ClipSample
from ..targets.soft_targets import soft_targets
from .distillation import Distillation

DRAWS = 2000  # of a constant guess's loss the error is below K / (2 · DRAWS) nats, most of it for targets that are sure
TOO_LITTLE = 0.05  # of the way between the two, below which a student has learned next to nothing


@dataclass(frozen=True)
class LossBounds:
    """constant: the least loss of a student that says the same of every clip. perfect: that of one
    that says every target. Both with the teachers' losses added by their weights, as in the
    training."""

    constant: float
    perfect: float

    def learned(self, loss: float) -> float:
        """How far a loss is from `constant` (0) to `perfect` (1); below 0 where it is worse than a
        constant guess, and 0 where no clip differs from another."""
        room = self.constant - self.perfect
        return (self.constant - loss) / room if room > 1e-6 else 0.0


def loss_bounds(found: Iterable[ClipSample], objective: Distillation) -> LossBounds | None:
    """The bounds of an objective over draws, each teacher's over those that it counts; None where
    none counts.

    Cross-entropy (eq. 2): the entropy of the mean target, and the mean entropy of the targets, at
    the objective's τ. Squared error: the variance of the mean logits, summed or averaged over
    classes, and 0.
    """
    targets: dict[str, list[NDArray[np.float64]]] = {name: [] for name in objective.teachers}
    for draw in found:
        for name, each in targets.items():
            if draw.weight[name]:
                logits = draw.logits[name]
                wanted = (
                    soft_targets(logits, objective.tau)
                    if objective.loss == "cross-entropy"
                    else logits
                )
                each.append(np.asarray(wanted, np.float64))
    if not any(targets.values()):
        return None
    of_teachers = {name: _of(np.stack(each), objective) for name, each in targets.items() if each}
    return LossBounds(*(_weighted(of_teachers, objective.weights, place) for place in (0, 1)))


def _of(targets: NDArray[np.float64], objective: Distillation) -> tuple[float, float]:
    """(constant, perfect) of one teacher's targets [M, K]."""
    if objective.loss == "cross-entropy":
        return (
            float(distribution_entropy(targets.mean(axis=0))),
            float(distribution_entropy(targets).mean()),
        )
    variance = targets.var(axis=0)
    return float(variance.sum() if objective.mse_reduction == "sum" else variance.mean()), 0.0


def _weighted(
    of_teachers: Mapping[str, tuple[float, float]], weights: Mapping[str, float], place: int
) -> float:
    return sum(weights[name] * bounds[place] for name, bounds in of_teachers.items())
