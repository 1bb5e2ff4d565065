"""The entropy filter of `train-student`: its thresholds in nats, measured on drawn clips."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..common.progress_bar import progress_bar
from ..targets.sampler import TargetSampler, measure_entropies
from .distillation_options import TargetOptions

log = logging.getLogger(__name__)

# Enough to measure the share that a threshold in nats keeps, within about one per cent.
QUICK_DRAWS = 2000


@dataclass(frozen=True)
class Filter:
    """Entropy thresholds, and the shares of draws that they keep.

    Args:
        thresholds: Teacher → threshold in nats.
        kept: Share of draws that at least one head keeps.
        kept_by: Teacher with a threshold → share of draws that its head keeps.
    """

    thresholds: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0
    kept_by: dict[str, float] = field(default_factory=dict)


def measure_thresholds(
    options: TargetOptions, sampler: TargetSampler, saved: dict[str, Any] | None
) -> Filter:
    """Return the filter: its thresholds, and the shares of draws that they keep.

    A resumed run takes the thresholds of its checkpoint, to save the time of measuring them again.

    Raises:
        UsageError: The thresholds keep no clip.
    """
    teachers = sampler.teachers
    quantile = options.max_entropy_quantile
    if options.max_entropy is None and quantile is None:
        return Filter()
    saved_thresholds = (
        saved["filter"]["nats"]
        if saved and saved.get("filter", {}).get("quantile") == quantile
        else None
    )
    count = QUICK_DRAWS if quantile is None or saved_thresholds else options.quantile_draws
    entropies = np.stack(list(_with_progress(sampler, count)))
    if quantile is not None:
        quantiles = quantile if isinstance(quantile, dict) else dict.fromkeys(teachers, quantile)
        thresholds = saved_thresholds or {
            name: float(np.quantile(entropies[:, column], quantiles[name]))
            for column, name in enumerate(teachers)
            if name in quantiles
        }
    elif isinstance(options.max_entropy, dict):
        thresholds = dict(options.max_entropy)
    else:
        thresholds = {name: float(options.max_entropy or math.inf) for name in teachers}
    limits = np.array([thresholds.get(name, math.inf) for name in teachers])
    # Features without a classifier have no entropy (NaN), and always pass.
    passed = ~(entropies > limits)
    kept = float(passed.any(axis=1).mean())
    if kept == 0:
        lowest = ", ".join(
            f"{name} {value:.2f}"
            for name, value in zip(teachers, entropies.min(axis=0), strict=True)
        )
        raise UsageError(
            f"targets.max_entropy={options.max_entropy} keeps none of {len(entropies)} clips; "
            f"their lowest entropies: {lowest} nats"
        )
    kept_by = {
        name: float(passed[:, column].mean())
        for column, name in enumerate(teachers)
        if name in thresholds
    }
    shown = ", ".join(
        f"{name} at {thresholds[name]:.3f} nats keeps {share:.0%}"
        for name, share in kept_by.items()
    )
    any_head = (
        f"; {kept:.0%} count for at least one of {len(teachers)} heads" if len(teachers) > 1 else ""
    )
    log.info(f"entropy filter ({options.filter_mode}): {shown} of {len(entropies)} draws{any_head}")
    return Filter(thresholds, kept, kept_by)


def _with_progress(sampler: TargetSampler, count: int) -> Iterator[np.ndarray]:
    with progress_bar("measuring entropies", count, "draws") as bar:
        for entropies in measure_entropies(sampler, count):
            bar.advance(1)
            yield entropies
