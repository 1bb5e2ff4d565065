"""Learn from cached targets: the objective of `train-student` and its held-out measures.

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
    """The objective of a student: the weighted sum of all teachers' losses (paper, eq. 3).

    The logged losses of single teachers are not weighted.

    Args:
        teachers: Names of the teachers.
        loss: Loss of each teacher that `heads` does not name; its targets must be logits.
        tau: Temperature of the targets of cross-entropy (eq. 1).
        mse_reduction: Reduction of "squared-error" over classes.
        weights: Teacher → factor of its loss, default 1.
        heads: Teacher → its loss.
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
        default = HeadLoss("logits", loss, tau, mse_reduction)
        self.heads = {name: (heads or {}).get(name, default) for name in self.teachers}
        self.weights = {name: (weights or {}).get(name, 1.0) for name in self.teachers}

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Count the clips of at least one head, then those of each head: int64 [1 + N]."""
        by_head = [batch["weight"][name].ne(0).sum() for name in self.teachers]
        return torch.stack([self.counted(batch).sum(), *by_head])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor) -> LossReport:
        """Return the losses of a batch.

        Clips that no head counts are left out of the forward pass: they were not decoded, and black
        clips would spoil the batch statistics. If no clip counts, the loss is 0 with a graph over
        all parameters.
        """
        counted = self.counted(batch)
        # Every rank of DistributedDataParallel needs a forward pass, even without clips.
        if not bool(counted.any()) and not isinstance(model, DistributedDataParallel):
            zero = sum(
                (p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(())
            )
            return LossReport(zero, {f"loss/{name}": torch.zeros(()) for name in self.teachers})
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
        if (masks := self._dropping_masks(losses, weight, batch, counted)) is not None:
            undropped = self._weighted(
                [
                    mean_over_kept(losses[name], weight[name] * masks[name], counts[number])
                    for number, name in enumerate(self.teachers, start=1)
                ]
            )
            # Dropping affects the gradient alone. The value is that of all losses, so that runs
            # with and without dropping can be compared.
            total = undropped + (total - undropped).detach()
        return LossReport(total, parts)

    def _weighted(self, losses: Sequence[Tensor]) -> Tensor:
        weights = self.weights.values()
        weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
        return torch.stack(weighted).sum()

    def _dropping_masks(
        self,
        losses: Mapping[str, Tensor],
        weight: Mapping[str, Tensor],
        batch: Mapping[str, Any],
        counted: Tensor,
    ) -> dict[str, Tensor] | None:
        """Return teacher → [B], 1 for clips whose loss counts and 0 where the teacher is dropped.

        In teacher dropping (UNIC) the teacher with the highest weighted loss of a clip always
        counts. Any other teacher counts unless the random numbers of the clip
        (`batch["dropped"]`) drop it. Return None without teacher dropping.
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
        """Return which clips count for at least one head, bool [B]."""
        return torch.stack([batch["weight"][name] for name in self.teachers]).ne(0).any(dim=0)

    def forward(
        self, model: nn.Module, batch: dict[str, Any], counted: Tensor
    ) -> dict[str, Tensor]:
        """Return the outputs of each teacher's head for the clips that count."""
        clip = batch["clip"] if bool(counted.all()) else batch["clip"][counted]
        outputs: dict[str, Tensor] = model(normalize_clip(clip, torch.float32))
        return outputs

    def measures(
        self, name: str, outputs: Tensor, targets: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        """Return the measures of one head, summed over the clips of weight [B] other than 0.

        All are float64 scalars. "count" is the number of these clips, "loss" the sum of their
        losses. For logits, "agreement" counts clips with the same top class. "kl" is
        KL(teacher‖student) at the temperature, for losses that fix the scale of the logits; other
        losses have "cosine", the similarity.
        """
        is_counted, head = weight != 0, self.heads[name]
        outputs, targets = outputs[is_counted].float(), targets[is_counted].float()
        one = torch.ones((), device=outputs.device)
        sums = {
            "count": is_counted.sum(),
            "loss": head(outputs, targets, weight[is_counted], one),
        }
        if head.output == "logits":
            sums["agreement"] = (outputs.argmax(1) == targets.argmax(1)).sum()
        if head.loss in ("cross-entropy", "squared-error"):
            sums["kl"] = kl_div(
                torch.log_softmax(outputs, 1),
                torch.log_softmax(targets / head.tau, 1),
                reduction="sum",
                log_target=True,
            )
        elif head.loss == "cosine":
            sums["cosine"] = (1 - head.by_clip(outputs, targets)).sum()
        else:
            sums["cosine"] = cosine_similarity(outputs, head.normalized(targets), dim=1).sum()
        return {key: value.double() for key, value in sums.items()}


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
    """Measure a student on the first `n` held-out samples, and leave it in eval mode.

    Clips that do not count or cannot be read are left out. Each of W ranks takes every W-th batch,
    and all ranks return the same numbers.

    Returns:
        "loss" (the weighted sum over teachers), and for each teacher "loss/NAME" and the means of
        `Distillation.measures`: "agreement/NAME" and "kl/NAME", or "cosine/NAME".

    Raises:
        TrainingError: No clip could be used.
    """
    model.eval()
    share = DistributedBatchSampler(SequentialBatchSampler(n, batch_size), ranks)
    keys = [
        (measure, name)
        for name, head in objective.heads.items()
        for measure in ("count", "loss", *_extra_measures(head))
    ]

    def measure_share() -> Tensor:
        sums = dict.fromkeys(keys, torch.zeros((), dtype=torch.float64))
        for read_batch in read_batches(dataset, share, workers=workers, device=device):
            batch = to_device(read_batch, device)
            if not batch or not bool((counted := objective.counted(batch)).any()):
                continue
            with autocast(device, precision):
                outputs = objective.forward(model, batch, counted)
            for name in objective.teachers:
                targets, weight = batch["targets"][name][counted], batch["weight"][name][counted]
                measures = objective.measures(name, outputs[name], targets, weight)
                for measure, value in measures.items():
                    sums[measure, name] = sums[measure, name] + value.cpu()
        return torch.stack(list(sums.values()))

    totals = ranks.sum(ranks.on_all_ranks(measure_share)).tolist()
    sums = dict(zip(keys, totals, strict=True))
    if not any(sums["count", name] for name in objective.teachers):
        raise TrainingError(
            f"none of the {n} held-out clips could be used: unreadable, or all filtered"
        )
    means = {
        f"{measure}/{name}": value / sums["count", name]
        for (measure, name), value in sums.items()
        if measure != "count" and sums["count", name]
    }
    return {
        "loss": sum(
            weight * means.get(f"loss/{name}", 0.0) for name, weight in objective.weights.items()
        )
    } | means


def _extra_measures(head: HeadLoss) -> tuple[str, ...]:
    last = "kl" if head.loss in ("cross-entropy", "squared-error") else "cosine"
    return ("agreement", last) if head.output == "logits" else (last,)
