"""Losses of distillation: from student outputs, targets and weights of clips to one scalar.

Losses of logits are cross-entropy with a teacher's distribution (eq. 2 of the paper), squared error
between the student's logits and the teacher's averaged logits (section 4.2), and the cosine
distance of centred logits. Losses of features are cosine distance, and smooth L1 or squared error
after division by one scale per teacher.

Shapes: B clips, K classes or features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax, smooth_l1_loss

from .distillation_options import Loss, Reduction


@dataclass(frozen=True)
class HeadLoss:
    """The loss of one teacher's head.

    Args:
        output: Kind of the teacher's targets, "logits" or "features".
        loss: One of `LOSSES[output]`.
        tau: Temperature of the targets of cross-entropy.
        mse_reduction: Reduction of "squared-error" over classes. The paper trains this loss at a
            tenth of the rate of cross-entropy, and its losses start far higher. That suggests the
            sum; the mean is K times smaller.
        mean: [K], subtracted from features before "smooth-l1" and "mse".
        scale: Divisor of all dimensions of the features, for the same two losses.

    Example:
        `HeadLoss("features", "cosine").by_clip(student, targets)` → [B]
    """

    output: str = "logits"
    loss: Loss = "cross-entropy"
    tau: float = 1.0
    mse_reduction: Reduction = "sum"
    mean: Tensor | None = None
    scale: float = 1.0

    def by_clip(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each clip [B], from outputs [B, K] and mean teacher outputs [B, K]."""
        outputs, targets = outputs.float(), targets.float()
        if self.loss == "cross-entropy":
            return _cross_entropy(outputs, torch.softmax(targets / self.tau, dim=1))
        if self.loss == "squared-error":
            return _squares(outputs, targets, self.mse_reduction)
        if self.loss == "cosine":
            return _cosine(outputs, targets, centred=self.output == "logits")
        targets = self.normalized(targets)
        if self.loss == "mse":
            return _squares(outputs, targets, "mean")
        return smooth_l1_loss(outputs, targets, reduction="none").mean(dim=1)

    def normalized(self, targets: Tensor) -> Tensor:
        """Subtract the mean from features, and divide them by the scale."""
        if self.mean is not None:
            targets = targets - self.mean.to(targets.device)
        return targets / self.scale

    def __call__(
        self, outputs: Tensor, targets: Tensor, weight: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """Return the mean over the clips that count; see `mean_over_kept`."""
        return mean_over_kept(self.by_clip(outputs, targets), weight, count)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * log_softmax(logits, dim=1)).sum(dim=1)


def _squares(outputs: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    squares = (outputs - targets).square()
    return squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)


def _cosine(outputs: Tensor, targets: Tensor, *, centred: bool) -> Tensor:
    """Return 1 − cos of each row; `centred` first subtracts the mean of the row."""
    if centred:
        outputs = outputs - outputs.mean(dim=1, keepdim=True)
        targets = targets - targets.mean(dim=1, keepdim=True)
    return 1 - cosine_similarity(outputs, targets, dim=1)


def mean_over_kept(losses: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """Return Σ weight · losses / number of nonzero weights, for losses [B] and weight [B].

    `count` replaces that number if these clips are only a part of the clips of the mean. The
    results of all parts then add up to the mean.

    If no clip counts, the result is 0 with a graph, so that its gradients are zeros instead of NaN.
    """
    divisor = ((weight != 0).sum() if count is None else count).clamp(min=1)
    return (weight.to(losses.dtype) * losses).sum() / divisor
