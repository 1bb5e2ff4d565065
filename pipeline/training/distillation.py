"""Learning from cached targets: the objective of stage two and its held-out measure.

Shapes: B clips, K classes or features, N teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div
from torch.nn.parallel import DistributedDataParallel

from ..clips.transforms import normalize_clip
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import TrainingError
from .distillation_options import Loss, Reduction
from .hardware import autocast
from .loader import (
    DistributedBatchSampler,
    KeyedDataset,
    SequentialBatchSampler,
    read_batches,
    to_device,
)
from .losses import HeadLoss, mean_over_kept
from .step import LossReport


class Distillation:
    """objective(model, batch, counts): the weighted sum of all teachers' losses (paper, eq. 3).

    The parts that are logged are without weight.

    Args:
        teachers: Their names.
        loss: Of all teachers whose targets are logits and that `heads` does not name.
        tau: Temperature of the targets of cross-entropy (eq. 1).
        mse_reduction: Over classes, of "squared-error".
        weights: teacher → factor of its loss, default 1.
        heads: teacher → its loss.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        *,
        loss: Loss = "cross-entropy",
        tau: float = 1.0,
        mse_reduction: Reduction = "sum",
        weights: Mapping[str, float] | None = None,
        heads: Mapping[str, HeadLoss] | None = None,
    ) -> None:
        self.teachers = tuple(teachers)
        usual = HeadLoss("logits", loss, tau, mse_reduction)
        self.heads = {name: (heads or {}).get(name, usual) for name in self.teachers}
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self.teachers}

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Count clips, int64 [1 + teachers]: those of at least one head, then those of each."""
        each = [batch["weight"][name].ne(0).sum() for name in self.teachers]
        return torch.stack([self.counted(batch).sum(), *each])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor) -> LossReport:
        """Return the losses of a batch.

        Clips that no head counts are not in the forward pass: they were not decoded, and black
        clips would spoil the batch statistics. Without any clip the loss is 0 with a graph over all
        parameters.
        """
        counted = self.counted(batch)
        # Ranks that share gradients all need a forward pass, if need be of no clips.
        if not bool(counted.any()) and not isinstance(model, DistributedDataParallel):
            nothing = sum(
                (p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(())
            )
            return LossReport(nothing, {f"loss/{name}": torch.zeros(()) for name in self.teachers})
        outputs = self.forward(model, batch, counted)
        targets, weight = (
            {name: batch[key][name][counted] for name in self.teachers}
            for key in ("targets", "weight")
        )
        losses = {
            name: self.heads[name].by_clip(outputs[name], targets[name]) for name in self.teachers
        }
        parts = {
            f"loss/{name}": mean_over_kept(losses[name], weight[name], counts[number])
            for number, name in enumerate(self.teachers, start=1)
        }
        total = self._weighted(list(parts.values()))
        if (kept := self._undropped(losses, weight, batch, counted)) is not None:
            learned = self._weighted(
                [
                    mean_over_kept(losses[name], weight[name] * kept[name], counts[number])
                    for number, name in enumerate(self.teachers, start=1)
                ]
            )
            # The gradient of what is not dropped, and the value of all: losses stay comparable.
            total = learned + (total - learned).detach()
        return LossReport(total, parts)

    def _weighted(self, losses: Sequence[Tensor]) -> Tensor:
        weights = self.weights.values()
        return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()

    def _undropped(
        self,
        losses: Mapping[str, Tensor],
        weight: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        counted: Tensor,
    ) -> dict[str, Tensor] | None:
        """Return teacher → 1 for the clips [B] whose loss is learned from, 0 for those dropped.

        Teacher dropping (UNIC): of a clip, the teacher with the highest weighted loss always
        counts, each other one unless the clip's own random numbers (`batch["dropped"]`) drop it.
        None where nothing is dropped.
        """
        if "dropped" not in batch or len(self.teachers) == 1:
            return None
        scaled = [self.weights[name] * losses[name].detach() for name in self.teachers]
        counts = torch.stack([weight[name] for name in self.teachers]) != 0
        highest = torch.where(counts, torch.stack(scaled), -torch.inf).argmax(dim=0)
        return {
            name: (~batch["dropped"][name][counted] | (highest == number)).to(weight[name].dtype)
            for number, name in enumerate(self.teachers)
        }

    def counted(self, batch: Mapping[str, Any]) -> Tensor:
        """Return which clips at least one head counts, bool [B]."""
        return torch.stack([batch["weight"][name] for name in self.teachers]).ne(0).any(dim=0)

    def forward(
        self, model: nn.Module, batch: dict[str, Any], counted: Tensor
    ) -> dict[str, Tensor]:
        """Return the student's outputs of each teacher's head for the clips that count."""
        clip = batch["clip"] if bool(counted.all()) else batch["clip"][counted]
        outputs: dict[str, Tensor] = model(normalize_clip(clip, torch.float32))
        return outputs

    def measures(
        self, name: str, outputs: Tensor, targets: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Return what is measured of one head, over the clips [B] that the weight counts.

        float64 scalars: "count", and the sums of "loss"; of logits "agreement", clips with the same
        top class, and "kl", KL(teacher‖student) at the temperature, unless the loss leaves the
        scale of the logits free; otherwise "cosine", the similarity.
        """
        use, head = weight != 0, self.heads[name]
        outputs, targets, weight = outputs[use].float(), targets[use].float(), weight[use]
        one = torch.ones((), device=outputs.device)
        found = {"count": use.sum(), "loss": head(outputs, targets, weight, one)}
        if head.output == "logits":
            found["agreement"] = (outputs.argmax(1) == targets.argmax(1)).sum()
        if head.loss in ("cross-entropy", "squared-error"):
            found["kl"] = kl_div(
                torch.log_softmax(outputs, 1),
                torch.log_softmax(targets / head.tau, 1),
                reduction="sum",
                log_target=True,
            )
        elif head.loss == "cosine":
            found["cosine"] = (1 - head.by_clip(outputs, targets)).sum()
        else:
            found["cosine"] = cosine_similarity(outputs, head.normalized(targets), dim=1).sum()
        return {key: value.double() for key, value in found.items()}


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
    """Measure a student on the first `n` held-out samples; the model is left in eval mode.

    Clips that do not count or cannot be read are left out. Ranks share the samples, each taking
    every W-th batch, and all get the same numbers.

    Returns:
        "loss" (the weighted sum over teachers), and by teacher "loss/NAME" and the means of
        `Distillation.measures`: "agreement/NAME" and "kl/NAME", or "cosine/NAME".

    Raises:
        TrainingError: No clip could be used.
    """
    model.eval()
    share = DistributedBatchSampler(SequentialBatchSampler(n, batch_size), ranks)
    keys = [
        (what, name)
        for name, head in objective.heads.items()
        for what in ("count", "loss", *_extra_measures(head))
    ]

    def measured() -> Tensor:
        sums = dict.fromkeys(keys, torch.zeros((), dtype=torch.float64))
        for raw in read_batches(dataset, share, workers=workers, device=device):
            batch = to_device(raw, device)
            if not raw or not bool((counted := objective.counted(batch)).any()):
                continue
            with autocast(device, precision):
                outputs = objective.forward(model, batch, counted)
            for name in objective.teachers:
                targets, weight = batch["targets"][name][counted], batch["weight"][name][counted]
                found = objective.measures(name, outputs[name], targets, weight)
                for what, value in found.items():
                    sums[what, name] = sums[what, name] + value.cpu()
        return torch.stack(list(sums.values()))

    totals = ranks.sum(ranks.on_all_ranks(measured)).tolist()
    sums = dict(zip(keys, totals, strict=True))
    if not any(sums["count", name] for name in objective.teachers):
        raise TrainingError(
            f"none of the {n} held-out clips could be used: unreadable, or all filtered"
        )
    means = {
        f"{what}/{name}": value / sums["count", name]
        for (what, name), value in sums.items()
        if what != "count" and sums["count", name]
    }
    return {
        "loss": sum(
            weight * means.get(f"loss/{name}", 0.0) for name, weight in objective.weights.items()
        )
    } | means


def _extra_measures(head: HeadLoss) -> tuple[str, ...]:
    last = "kl" if head.loss in ("cross-entropy", "squared-error") else "cosine"
    return ("agreement", last) if head.output == "logits" else (last,)
