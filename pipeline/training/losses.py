"""Losses of distillation: student logits, targets and weights of clips in, one scalar out.

Cross-entropy against a teacher's distribution (eq. 2 of the paper), and squared error between the
student's logits and the teacher's averaged logits (section 4.2).

Shapes: B clips, K classes.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import log_softmax

Reduction = Literal["sum", "mean"]


def soft_target_cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor, count: Tensor | None = None
) -> Tensor:
    """-sum_k y_k log f_k of logits[B, K] against distributions targets[B, K]: sum over classes,
    mean over the clips whose weight[B] is not zero, or over `count` (see `mean_over_kept`); 0 with
    a graph if there is none. Computed in float32."""
    losses = -(targets.float() * log_softmax(logits.float(), dim=1)).sum(dim=1)
    return mean_over_kept(losses, weight, count)


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


def mean_over_kept(losses: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """sum(weight * losses) / number of weights that are not zero, of losses[B] and weight[B].

    `count` stands for that number where these clips are only some of those that the mean is over:
    the results for all of them then add up to it.

    Without a clip that counts it is 0, and still has a graph: backward gives zeros, not an error or
    NaN.
    """
    kept = ((weight != 0).sum() if count is None else count).clamp(min=1)
    return (weight.to(losses.dtype) * losses).sum() / kept
