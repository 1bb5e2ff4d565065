"""The mean over the clips that count, shared by the losses."""

from __future__ import annotations

from torch import Tensor


def mean_over_kept(losses: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """sum(weight * losses) / number of weights that are not zero, of losses[B] and weight[B].

    `count` stands for that number where these clips are only some of those that the mean is over:
    the results for all of them then add up to it.

    Without a clip that counts it is 0, and still has a graph: backward gives zeros, not an error or
    NaN.
    """
    kept = ((weight != 0).sum() if count is None else count).clamp(min=1)
    return (weight.to(losses.dtype) * losses).sum() / kept
