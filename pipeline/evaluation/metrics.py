"""Accuracies of a test set and how sure one can be of them.

Shape letters: V test videos, N clips of a video, K classes, R bootstrap resamples. A video without
finite scores (it could not be read) counts as wrong in every number; it never leaves the
denominator.

Where every resample gives the same value (two videos, both right), the bootstrap is silent, and the
interval is what an exact test of a proportion leaves open (Clopper and Pearson): all of n units
alike, another share p of all units may differ with (1 − p)ⁿ ≥ 0.025.

Clips cut from one recording are right or wrong together: where the recordings are known
(`groups[V]`, a number each), intervals come from resampling recordings, not videos.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MEASURES = {"per_clip": "per clip", "top1": "top 1", "top5": "top 5", "class_mean": "class mean"}

RESAMPLES = 10_000
SEED = 0
_BLOCK = 256  # resamples held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over the test videos with its 95 % interval, all as fractions."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def hits(scores: np.ndarray, labels: np.ndarray, top: int = 1) -> np.ndarray:
    """scores[..., K], labels[...] -> bool[...]: is the label among the `top` best scores.

    Among equal scores the lower class comes first, as in argmax. Scores that are not finite never
    hit.
    """
    own = np.take_along_axis(scores, labels[..., None].astype(np.int64), axis=-1)
    earlier = np.arange(scores.shape[-1]) < labels[..., None]
    rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=-1)
    return (rank < top) & np.isfinite(scores).all(axis=-1)


def video_values(clip_scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """clip_scores[V, N, K], labels[V] -> float64[V] of each accuracy: `per_clip`, `top1`, `top5`.

    top 1 and top 5 are those of the mean of the clips' scores; per clip is the share of a video's
    clips whose own best class is the label.
    """
    video_scores = mean_scores(clip_scores)
    clip_labels = np.broadcast_to(labels[:, None], clip_scores.shape[:2])
    return {
        "per_clip": hits(clip_scores, clip_labels).mean(axis=1),
        "top1": hits(video_scores, labels, 1).astype(np.float64),
        "top5": hits(video_scores, labels, 5).astype(np.float64),
    }


def mean_scores(clip_scores: np.ndarray) -> np.ndarray:
    """clip_scores[V, N, K] -> float32[V, K]: the mean over a video's clips."""
    return clip_scores.mean(axis=1, dtype=np.float64).astype(np.float32)


def bootstrap_ratios(
    above: np.ndarray, below: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """above[V, M], below[V, M] -> float64[R, M]: Σ above / Σ below over resampled videos; NaN for 0
    / 0.

    The videos are drawn with replacement, the same draw for all M columns, so that columns stay
    paired.
    """
    n = len(above)
    rng = np.random.default_rng(seed)
    ratios = np.empty((resamples, above.shape[1]))
    for first in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - first)
        drawn = rng.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n).astype(np.float64)
        with np.errstate(invalid="ignore"):
            ratios[first : first + count] = (times @ above) / (times @ below)
    return ratios


def by_group(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """values[V, M], groups[V] -> float64[G, M]: the sums over each group; the values themselves
    without groups."""
    if groups is None:
        return np.asarray(values, dtype=np.float64)
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(np.max(index)) + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def estimate_mean(
    values: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    least: float = 0,
) -> Estimate:
    """values[V] in [least, 1] -> their mean with its interval."""
    above, below = by_group(values[:, None], groups), by_group(np.ones((len(values), 1)), groups)
    means = bootstrap_ratios(above, below, resamples=resamples, seed=seed)
    return Estimate(float(values.mean()), *interval(means[:, 0], len(above), least))


def interval(
    resampled: np.ndarray, units: int | np.ndarray, least: float = 0, most: float = 1
) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of resampled means of `units` units; where they are one value,
    which all units have, the exact bounds between `least` and `most`. units[K]: of each class,
    where the mean is one over classes."""
    low, high = (float(end) for end in np.quantile(resampled, (0.025, 0.975)))
    if high - low > 1e-12:
        return low, high
    others = float(
        np.mean(1 - 0.025 ** (1 / np.asarray(units)))
    )  # the largest share of units that may be otherwise
    return low - others * (low - least), high + others * (most - high)


def class_values(top1: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """top1[V], labels[V] -> (right[V, K], present[V, K]), whose column sums give each class's
    accuracy."""
    present = (labels[:, None] == np.arange(k)).astype(np.float64)
    return present * top1[:, None], present


def estimate_class_mean(
    top1: np.ndarray,
    labels: np.ndarray,
    k: int,
    groups: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """top1[V], labels[V] -> the mean over classes of their top-1 accuracy; classes a resample lacks
    are left out."""
    right, present = class_values(top1, labels, k)
    there = present.any(axis=0)
    right, present = by_group(right[:, there], groups), by_group(present[:, there], groups)
    value = (right.sum(axis=0) / present.sum(axis=0)).mean()
    means = np.nanmean(bootstrap_ratios(right, present, resamples=resamples, seed=seed), axis=1)
    return Estimate(float(value), *interval(means, (present > 0).sum(axis=0)))


def accuracies(
    clip_scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Estimate]:
    """clip_scores[V, N, K], labels[V] -> `per_clip`, `top1`, `top5`, `class_mean`, each with its
    interval."""
    values = video_values(clip_scores, labels)
    result = {
        name: estimate_mean(v, groups, resamples=resamples, seed=seed) for name, v in values.items()
    }
    result["class_mean"] = estimate_class_mean(
        values["top1"], labels, clip_scores.shape[2], groups, resamples=resamples, seed=seed
    )
    return result


def estimate_difference(
    a: np.ndarray,
    b: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """a[V], b[V] of the same videos -> mean of a − b, paired, with its interval."""
    if a.shape != b.shape:
        raise ValueError(f"a paired difference needs the same videos, got {a.shape} and {b.shape}")
    return estimate_mean(a - b, groups, resamples=resamples, seed=seed, least=-1)


def signed(fraction: float) -> str:
    """`+11.4` or `−5.7`, in points."""
    return f"{100 * fraction:+.1f}".replace("-", "−")
