"""Learning from cached targets: the objective of stage two and its held-out measure.

Shapes: B clips, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.nn.parallel import DistributedDataParallel

from ..clips.transforms import normalize_clip
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import TrainingError
from .loader import (
    DistributedBatchSampler,
    KeyedDataset,
    SequentialBatchSampler,
    read_batches,
    to_device,
)
from .losses import Reduction, soft_target_cross_entropy, squared_error
from .precision import autocast
from .step import LossReport

Loss = Literal["cross-entropy", "squared-error"]


class Distillation:
    """objective(model, batch, counts): the losses of all teachers added (paper, eq. 3), by their
    weights if there are any; the parts that are logged are without weight.

    loss: "cross-entropy" against softmax(mean logits / tau) (eq. 1 and 2), or "squared-error" on
    the mean logits themselves, which tau does not touch.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        *,
        loss: Loss = "cross-entropy",
        tau: float = 1.0,
        mse_reduction: Reduction = "sum",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.teachers = tuple(teachers)
        self.loss = loss
        self.tau = tau
        self.mse_reduction: Reduction = mse_reduction
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self.teachers}

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """int64 [1 + teachers]: the clips that at least one head counts, then those that each
        counts."""
        each = [batch["weight"][name].ne(0).sum() for name in self.teachers]
        return torch.stack([self.counted(batch).sum(), *each])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor) -> LossReport:
        """Clips that no head counts are left out of the forward pass: they were not decoded, and
        black clips would spoil the batch statistics. Without any clip the loss is 0 with a graph
        over all parameters."""
        counted = self.counted(batch)
        # Ranks that share gradients all need a forward pass, if need be of no clips.
        if not bool(counted.any()) and not isinstance(model, DistributedDataParallel):
            nothing = sum(
                (p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(())
            )
            return LossReport(nothing, {f"loss/{name}": torch.zeros(()) for name in self.teachers})
        outputs = self.forward(model, batch, counted)
        parts = {
            f"loss/{name}": self.head_loss(
                outputs[name],
                batch["targets"][name][counted],
                batch["weight"][name][counted],
                counts[number],
            )
            for number, name in enumerate(self.teachers, start=1)
        }
        weighted = [self.weights[name] * parts[f"loss/{name}"] for name in self.teachers]
        return LossReport(torch.stack(weighted).sum(), parts)

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        """bool [B]: the clips that at least one head counts."""
        return torch.stack([batch["weight"][name] for name in self.teachers]).ne(0).any(dim=0)

    def forward(
        self, model: nn.Module, batch: dict[str, Any], counted: Tensor
    ) -> dict[str, Tensor]:
        """Student logits of each teacher's head for the clips that count."""
        clip = batch["clip"] if bool(counted.all()) else batch["clip"][counted]
        outputs: dict[str, Tensor] = model(normalize_clip(clip, torch.float32))
        return outputs

    def head_loss(
        self, logits: Tensor, targets: Tensor, weight: Tensor, count: Tensor | None = None
    ) -> Tensor:
        """The loss of one head: logits[B, K] against mean teacher logits targets[B, K] with
        weight[B]; over `count` clips where these are some of a step's."""
        if self.loss == "squared-error":
            return squared_error(logits, targets, weight, self.mse_reduction, count)
        return soft_target_cross_entropy(
            logits, torch.softmax(targets.float() / self.tau, dim=1), weight, count
        )

    def measures(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """float64 [4] of one head, over clips [B] that the weight counts: their number, and the
        sums of their losses, of agreeing top classes and of KL(teacher‖student) at the
        temperature."""
        use = weight != 0
        one = torch.ones((), device=logits.device)
        logits, targets, weight = logits[use].float(), targets[use].float(), weight[use]
        divergence = kl_div(
            torch.log_softmax(logits, 1),
            torch.log_softmax(targets / self.tau, 1),
            reduction="sum",
            log_target=True,
        )
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        return torch.stack(
            [use.sum(), self.head_loss(logits, targets, weight, one), hits, divergence]
        ).double()


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
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, float]:
    """Over the first `n` held-out samples: "loss" (the weighted sum over teachers), "loss/NAME",
    and "agreement/NAME", the share of clips on which student and teacher have the same top class,
    and "kl/NAME", the divergence KL(teacher‖student) in nats at the temperature. Clips that do not
    count or cannot be read are left out; TrainingError if that is all of them. Ranks share the
    samples, each taking every W-th batch, and all get the same numbers. The model is left in eval
    mode."""
    model.eval()
    share = DistributedBatchSampler(SequentialBatchSampler(n, batch_size), ranks)

    def measured() -> Tensor:
        sums = torch.zeros(4, len(objective.teachers), dtype=torch.float64)
        for raw in read_batches(dataset, share, workers=workers, device=device):
            batch = to_device(raw, device)
            if not raw or not bool((counted := objective.counted(batch)).any()):
                continue
            with autocast(device, precision):
                outputs = objective.forward(model, batch, counted)
            for number, name in enumerate(objective.teachers):
                targets, weight = batch["targets"][name][counted], batch["weight"][name][counted]
                sums[:, number] += objective.measures(outputs[name], targets, weight).cpu()
        return sums

    kept, *measures = ranks.sum(ranks.on_all_ranks(measured)).unbind()
    if not bool(kept.any()):
        raise TrainingError(
            f"none of the {n} held-out clips could be used: unreadable, or all filtered"
        )
    means = {
        f"{what}/{name}": float(values[number] / kept[number])
        for what, values in zip(("loss", "agreement", "kl"), measures, strict=True)
        for number, name in enumerate(objective.teachers)
        if kept[number]
    }
    return {
        "loss": sum(
            weight * means.get(f"loss/{name}", 0.0) for name, weight in objective.weights.items()
        )
    } | means
