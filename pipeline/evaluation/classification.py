"""Learning labels: the objective of stage three.

Shapes: B clips, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..training.loop import LossReport
from ..video.transforms import normalize_clip

HEAD = "label"
"""Name of the one head of a finetuned student."""


def classification(model: nn.Module, batch: dict[str, Any]) -> LossReport:
    """objective(model, batch): mean cross-entropy of the labels, and the share of clips that are right."""
    logits = model(normalize_clip(batch["clip"], torch.float32))[HEAD].float()
    right = (logits.detach().argmax(dim=1) == batch["label"]).float().mean()
    return LossReport(functional.cross_entropy(logits, batch["label"]), len(logits), {"accuracy": right})
