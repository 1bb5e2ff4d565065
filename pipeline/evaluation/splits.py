"""Several splits of one data set: the mean and how far they lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

MEASURES = ("per_clip", "top1", "top5", "class_mean")


def mean_over_splits(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the metrics of each split (see `metrics_from_file`): `mean`, `std` (over n − 1; None for
    one split) and `splits` of each accuracy that all have, as fractions. Every split counts the
    same, whatever its number of videos, as published three-split means do."""
    found = {}
    for name in MEASURES:
        if not all(name in each for each in metrics):
            continue  # fused scores have no accuracy per clip
        values = np.array([each[name]["value"] for each in metrics])
        found[name] = {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            "splits": values.tolist(),
        }
    return found
