"""Cross-entropy against a teacher's distribution (paper, eq. 2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax

from .kept import mean_over_kept


def soft_target_cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor, count: Tensor | None = None
) -> Tensor:
    """-sum_k y_k log f_k of logits[B, K] against distributions targets[B, K]: sum over classes,
    mean over the clips whose weight[B] is not zero, or over `count` (see `mean_over_kept`); 0 with
    a graph if there is none. Computed in float32."""
    losses = -(targets.float() * log_softmax(logits.float(), dim=1)).sum(dim=1)
    return mean_over_kept(losses, weight, count)
