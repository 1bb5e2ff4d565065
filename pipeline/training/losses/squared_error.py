"""Squared error between the student's logits and the teacher's averaged logits (paper, section
4.2)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .kept import mean_over_kept

Reduction = Literal["sum", "mean"]


def squared_error(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    reduction: Reduction = "sum",
    count: Tensor | None = None,
) -> Tensor:
    """(z - t)^2 of logits[B, K] and mean teacher logits[B, K], summed or averaged over classes;
    mean over the clips whose weight[B] is not zero, or over `count` (see `mean_over_kept`); 0 with
    a graph if there is none.

    The paper trains it at a tenth of the cross-entropy's rate because "initial loss values are much
    higher", which suggests the sum (the default); with K classes the mean is K times smaller.
    """
    squares = (logits.float() - targets.float()).square()
    losses = squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)
    return mean_over_kept(losses, weight, count)
