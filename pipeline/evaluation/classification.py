"""The objective of finetuning: cross-entropy of the labels.

Shapes: B clips, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..clips.transforms import normalize_clip
from ..training.loop import LossReport

HEAD = "label"
"""Name of the one head of a finetuned student."""


class Classification:
    """objective(model, batch, counts): cross-entropy of the labels, and accuracy of the clips."""

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the number of clips, int64 [1]; all of them count."""
        return torch.tensor([len(batch["label"])])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor) -> LossReport:
        """Return the mean loss over `counts` clips, and the share that is classified correctly."""
        logits = model(normalize_clip(batch["clip"], torch.float32))[HEAD].float()
        right = (logits.detach().argmax(dim=1) == batch["label"]).sum()
        loss = functional.cross_entropy(logits, batch["label"], reduction="sum")
        return LossReport(loss / counts[0], {"accuracy": right / counts[0]})
