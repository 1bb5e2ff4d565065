"""Learning from cached targets: the objective of stage two and its held-out measure.

Shapes: B clips, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..video.transforms import normalize_clip
from .device import autocast
from .loader import EachOnce, KeyedDataset, read_batches, to_device
from .loop import LossReport
from .losses.soft_target_cross_entropy import soft_target_cross_entropy
from .losses.squared_error import Reduction, squared_error

Loss = Literal["cross-entropy", "squared-error"]


class Distillation:
    """objective(model, batch): the losses of all teachers added (paper, eq. 3).

    loss: "cross-entropy" against softmax(mean logits / tau) (eq. 1 and 2), or "squared-error" on the mean
    logits themselves, which tau does not touch.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        *,
        loss: Loss = "cross-entropy",
        tau: float = 1.0,
        mse_reduction: Reduction = "sum",
    ) -> None:
        self.teachers = tuple(teachers)
        self.loss = loss
        self.tau = tau
        self.mse_reduction: Reduction = mse_reduction

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> LossReport:
        """Clips that no head counts are left out of the forward pass: they were not decoded, and black clips
        would spoil the batch statistics. Without any clip the loss is 0 with a graph over all parameters."""
        counts = self.counts(batch)
        if not bool(counts.any()):
            nothing = sum((p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(()))
            return LossReport(nothing, 0)
        outputs = self.forward(model, batch, counts)
        parts = {
            name: self.head_loss(outputs[name], batch["targets"][name][counts], batch["weight"][name][counts])
            for name in self.teachers
        }
        total = torch.stack(list(parts.values())).sum()
        return LossReport(total, counts.sum(), {f"loss/{name}": loss.detach() for name, loss in parts.items()})

    def counts(self, batch: dict[str, Any]) -> Tensor:
        """bool [B]: the clips that at least one head counts."""
        return torch.stack([batch["weight"][name] for name in self.teachers]).ne(0).any(dim=0)

    def forward(self, model: nn.Module, batch: dict[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """Student logits of each teacher's head for the clips that count."""
        clip = batch["clip"] if bool(counts.all()) else batch["clip"][counts]
        outputs: dict[str, Tensor] = model(normalize_clip(clip, torch.float32))
        return outputs

    def head_loss(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The loss of one head: logits[B, K] against mean teacher logits targets[B, K] with weight[B]."""
        if self.loss == "squared-error":
            return squared_error(logits, targets, weight, self.mse_reduction)
        return soft_target_cross_entropy(logits, torch.softmax(targets.float() / self.tau, dim=1), weight)


@torch.no_grad()
def evaluate_distillation(
    model: nn.Module,
    objective: Distillation,
    dataset: KeyedDataset,
    n: int,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    precision: str,
) -> dict[str, float]:
    """Over the first `n` held-out samples: "loss" (the sum over teachers), "loss/NAME", and "agreement/NAME",
    the share of clips on which student and teacher have the same top class. Clips that do not count or
    cannot be read are left out; TrainingError if that is all of them. The model is left in eval mode."""
    model.eval()
    sums = dict.fromkeys(objective.teachers, 0.0)
    hits = dict.fromkeys(objective.teachers, 0)
    kept = dict.fromkeys(objective.teachers, 0)
    for raw in read_batches(dataset, EachOnce(n, batch_size), workers=workers, device=device):
        if not raw:
            continue
        batch = to_device(raw, device)
        counts = objective.counts(batch)
        if not bool(counts.any()):
            continue
        with autocast(device, precision):
            outputs = objective.forward(model, batch, counts)
        for name in objective.teachers:
            targets, weight = batch["targets"][name][counts], batch["weight"][name][counts]
            count = int((weight != 0).sum())
            sums[name] += float(objective.head_loss(outputs[name], targets, weight)) * count
            hits[name] += int(((outputs[name].argmax(1) == targets.argmax(1)) & (weight != 0)).sum())
            kept[name] += count
    if not any(kept.values()):
        raise TrainingError(f"none of the {n} held-out clips could be used: unreadable, or all filtered")
    losses = {name: sums[name] / kept[name] for name in objective.teachers if kept[name]}
    result = {"loss": sum(losses.values())}
    for name, loss in losses.items():
        result[f"loss/{name}"] = loss
        result[f"agreement/{name}"] = hits[name] / kept[name]
    return result
