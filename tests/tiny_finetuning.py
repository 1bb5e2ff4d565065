"""Options of a finetuning of one second, which tests can change."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_finetuning(dataset: str, out: Path, **changes: Any) -> dict[str, Any]:
    """Return values of a FinetuneConfig: two epochs of two steps of a narrow network."""
    return {
        "dataset": dataset,
        "out": str(out),
        "student": {"architecture": "r3d_18", "width": 0.0625},
        "clips": {"size": 32, "clip_frames": 4},
        "loop": {
            "batch_size": 4,
            "epochs": 2,
            "epoch_clips": 8,
            "lr": 0.02,
            "workers": 0,
            "device": "cpu",
        },
        "test": {"clips": 2, "workers": 0},
        **changes,
    }
