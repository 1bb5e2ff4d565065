"""The mean over the clips that count, shared by the losses."""

from __future__ import annotations

from torch import Tensor


def mean_over_kept(losses: Tensor, weight: Tensor) -> Tensor:
    """sum(weight * losses) / number of weights that are not zero, of losses[B] and weight[B].

    Without a clip that counts it is 0, and still has a graph: backward gives zeros, not an error or NaN.
    """
    kept = (weight != 0).sum().clamp(min=1)
    return (weight.to(losses.dtype) * losses).sum() / kept
