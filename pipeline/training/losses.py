"""Losses of distillation: student outputs, targets and weights of clips in, one scalar out.

Of logits: cross-entropy against a teacher's distribution (eq. 2 of the paper), squared error
between the student's logits and the teacher's averaged logits (section 4.2), and the cosine of
centred logits. Of features: cosine, and smooth L1 or squared error at one scale per teacher.

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
        output: "logits" or "features", what the teacher's targets are.
        loss: One of `LOSSES[output]`.
        tau: Temperature of the targets of cross-entropy.
        mse_reduction: Over classes, of "squared-error". The paper trains it at a tenth of the
            cross-entropy's rate, as its losses begin far higher there, which suggests the sum; the
            mean is K times smaller.
        mean: [K], subtracted from features before "smooth-l1" and "mse".
        scale: The features' one scale for all dimensions, for the same two.

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
        """Return the loss of each clip [B] of outputs [B, K] against mean teacher outputs."""
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
        """Subtract the mean of features and divide them by their one scale."""
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
    """Return 1 − cos of each row; `centred`: after the mean of the row is subtracted."""
    if centred:
        outputs = outputs - outputs.mean(dim=1, keepdim=True)
        targets = targets - targets.mean(dim=1, keepdim=True)
    return 1 - cosine_similarity(outputs, targets, dim=1)


def mean_over_kept(losses: Tensor, weight: Tensor, count: Tensor | None = None) -> Tensor:
    """Return Σ weight · losses / number of weights that are not zero, of losses [B] and weight [B].

    `count` stands for that number where these clips are only some of those that the mean is over:
    the results for all of them then add up to it.

    Without a clip that counts it is 0, and still has a graph: backward gives zeros, not an error or
    NaN.
    """
    kept = ((weight != 0).sum() if count is None else count).clamp(min=1)
    return (weight.to(losses.dtype) * losses).sum() / kept
