"""The entropy filter of stage two: its thresholds in nats, measured on the clips that are drawn."""

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

# Enough to measure the share that a threshold in nats keeps to about one per cent.
QUICK_DRAWS = 2000


@dataclass(frozen=True)
class Filter:
    """Entropy thresholds, and what they keep.

    Args:
        thresholds: Nats, by teacher.
        kept: Share of draws that at least one head keeps.
        kept_by: Share that each head with a threshold keeps, by teacher.
    """

    thresholds: dict[str, float] = field(default_factory=dict)
    kept: float = 1.0
    kept_by: dict[str, float] = field(default_factory=dict)


def measure_thresholds(
    options: TargetOptions, sampler: TargetSampler, saved: dict[str, Any] | None
) -> Filter:
    """Return the filter's thresholds, and what they keep of the draws.

    A resumed run takes those that its checkpoint has in nats: measuring again would cost as much
    again.

    Raises:
        UsageError: They keep no clip.
    """
    teachers = sampler.teachers
    quantile = options.max_entropy_quantile
    if options.max_entropy is None and quantile is None:
        return Filter()
    known = (
        saved["filter"]["nats"]
        if saved and saved.get("filter", {}).get("quantile") == quantile
        else None
    )
    count = QUICK_DRAWS if quantile is None or known else options.quantile_draws
    found = np.stack(list(_with_progress(sampler, count)))
    if quantile is not None:
        wanted = quantile if isinstance(quantile, dict) else dict.fromkeys(teachers, quantile)
        thresholds = known or {
            name: float(np.quantile(found[:, column], wanted[name]))
            for column, name in enumerate(teachers)
            if name in wanted
        }
    elif isinstance(options.max_entropy, dict):
        thresholds = dict(options.max_entropy)
    else:
        thresholds = {name: float(options.max_entropy or math.inf) for name in teachers}
    limits = np.array([thresholds.get(name, math.inf) for name in teachers])
    passed = ~(found > limits)  # features without a head have no entropy (NaN) and always count
    kept = float(passed.any(axis=1).mean())
    if kept == 0:
        low = ", ".join(
            f"{name} {value:.2f}" for name, value in zip(teachers, found.min(axis=0), strict=True)
        )
        raise UsageError(
            f"targets.max_entropy={options.max_entropy} keeps none of {len(found)} clips; "
            f"their lowest entropies: {low} nats"
        )
    kept_by = {
        name: float(passed[:, i].mean()) for i, name in enumerate(teachers) if name in thresholds
    }
    shown = ", ".join(
        f"{name} at {thresholds[name]:.3f} nats keeps {share:.0%}"
        for name, share in kept_by.items()
    )
    together = (
        f"; {kept:.0%} count for at least one of {len(teachers)} heads" if len(teachers) > 1 else ""
    )
    log.info(f"entropy filter ({options.filter_mode}): {shown} of {len(found)} draws{together}")
    return Filter(thresholds, kept, kept_by)


def _with_progress(sampler: TargetSampler, count: int) -> Iterator[np.ndarray]:
    with progress_bar("measuring entropies", count, "draws") as bar:
        for found in measure_entropies(sampler, count):
            bar.advance(1)
            yield found
