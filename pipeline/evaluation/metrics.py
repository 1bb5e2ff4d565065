"""Accuracies on a test set, with confidence intervals.

Shapes: V test videos, N clips of a video, K classes, R bootstrap resamples, M columns.

An unreadable video has no finite scores and counts as wrong in every number; it never leaves the
denominator.

Clips that were cut from one recording tend to be right or wrong together. If the recordings are
known (`groups` [V], the number of the recording), intervals come from resampling recordings instead
of videos.

If every resample gives the same value (two videos, both correct), the bootstrap gives no interval.
The interval is then that of an exact test of a proportion (Clopper and Pearson): if n units are all
equal, a share p of all units may differ as long as (1 − p)ⁿ ≥ 0.025.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MEASURES = {"per_clip": "per clip", "top1": "top 1", "top5": "top 5", "class_mean": "class mean"}

RESAMPLES = 10_000
SEED = 0
# Resamples that are held in memory at a time.
_BLOCK = 256


@dataclass(frozen=True)
class Estimate:
    """A mean over the test videos and its 95 % interval, as fractions."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return the record for result.json."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def percent(self) -> str:
        """Format the accuracy for a sentence, such as `36.4 % [31.2, 41.7]`."""
        return f"{100 * self.value:.1f} % {brackets(self.low, self.high)}"


def brackets(low: float, high: float) -> str:
    """Format an interval of fractions in per cent, such as `[31.2, 41.7]`."""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def signed_brackets(low: float, high: float) -> str:
    """Format the interval of a difference in points, such as `[+4.7, +14.5]`."""
    return f"[{signed(low)}, {signed(high)}]"


def hits(scores: np.ndarray, labels: np.ndarray, top: int = 1) -> np.ndarray:
    """Return whether the label is among the `top` best scores: scores [..., K], labels [...].

    Among equal scores the lower class ranks first, as in argmax. With scores that are not finite
    the result is False.
    """
    score = np.take_along_axis(scores, labels[..., None].astype(np.int64), axis=-1)
    earlier = np.arange(scores.shape[-1]) < labels[..., None]
    rank = ((scores > score) | ((scores == score) & earlier)).sum(axis=-1)
    return (rank < top) & np.isfinite(scores).all(axis=-1)


def video_values(clip_scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Compute `per_clip`, `top1` and `top5` of each video, float64 [V].

    `top1` and `top5` use the mean scores of the clips; `per_clip` is the share of the clips whose
    best class is the label.

    Args:
        clip_scores: [V, N, K].
        labels: [V].
    """
    video_scores = mean_scores(clip_scores)
    clip_labels = np.broadcast_to(labels[:, None], clip_scores.shape[:2])
    return {
        "per_clip": hits(clip_scores, clip_labels).mean(axis=1),
        "top1": hits(video_scores, labels, 1).astype(np.float64),
        "top5": hits(video_scores, labels, 5).astype(np.float64),
    }


def mean_scores(clip_scores: np.ndarray) -> np.ndarray:
    """Average scores [V, N, K] over the clips of each video, float32 [V, K]."""
    return clip_scores.mean(axis=1, dtype=np.float64).astype(np.float32)


def bootstrap_ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Compute Σ numerators / Σ denominators over resampled videos.

    Videos are drawn with replacement; all M columns share a draw, so that they stay paired.

    Args:
        numerators: [V, M].
        denominators: [V, M].

    Returns:
        float64 [R, M], NaN for 0 / 0.
    """
    n = len(numerators)
    rng = np.random.default_rng(SEED)
    ratios = np.empty((RESAMPLES, numerators.shape[1]))
    for first in range(0, RESAMPLES, _BLOCK):
        count = min(_BLOCK, RESAMPLES - first)
        # How often each resample [count] has drawn each video [n].
        indices = rng.integers(n, size=(count, n)) + np.arange(count)[:, None] * n
        draws = np.bincount(indices.ravel(), minlength=count * n).reshape(count, n)
        weights = draws.astype(np.float64)
        with np.errstate(invalid="ignore"):
            ratios[first : first + count] = (weights @ numerators) / (weights @ denominators)
    return ratios


def by_group(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Sum values [V, M] over each of G groups, float64 [G, M]; without groups keep the values."""
    if groups is None:
        return np.asarray(values, dtype=np.float64)
    _, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(np.max(index)) + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def estimate_mean(
    values: np.ndarray, groups: np.ndarray | None = None, *, min_mean: float = 0
) -> Estimate:
    """Estimate the mean of values [V] between `min_mean` and 1, with its interval."""
    sums, counts = by_group(values[:, None], groups), by_group(np.ones((len(values), 1)), groups)
    means = bootstrap_ratios(sums, counts)
    return Estimate(float(values.mean()), *interval(means[:, 0], len(sums), min_mean))


def interval(
    resampled: np.ndarray, units: int | np.ndarray, min_mean: float = 0
) -> tuple[float, float]:
    """Return the 95 % interval of a mean between `min_mean` and 1.

    Args:
        resampled: Resampled means [R].
        units: Number of resampled units, or that of each class [K] if the mean is over classes.
        min_mean: The smallest possible mean.

    Returns:
        The 2.5 and 97.5 % quantiles, or the exact bounds if all resampled means are equal.
    """
    low, high = (float(end) for end in np.quantile(resampled, (0.025, 0.975)))
    if high - low > 1e-12:
        return low, high
    # The largest share of all units that may differ from those in the sample.
    unseen = float(np.mean(1 - 0.025 ** (1 / np.asarray(units))))
    return low - unseen * (low - min_mean), high + unseen * (1 - high)


def class_values(top1: np.ndarray, labels: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return correct [V, K] and present [V, K]; the ratio of their column sums is the accuracy.

    Both are 0 outside of the class of a video.

    Args:
        top1: 1 for a video whose best class is the label, else 0, [V].
        labels: [V].
        k: Number of classes.
    """
    present = (labels[:, None] == np.arange(k)).astype(np.float64)
    return present * top1[:, None], present


def estimate_class_mean(
    top1: np.ndarray,
    labels: np.ndarray,
    k: int,
    groups: np.ndarray | None = None,
) -> Estimate:
    """Estimate the mean over classes of their top-1 accuracy.

    A resample without videos of a class averages the other classes. The arguments are those of
    `class_values`, and the recording of each video.
    """
    correct, present = class_values(top1, labels, k)
    tested = present.any(axis=0)
    correct, present = by_group(correct[:, tested], groups), by_group(present[:, tested], groups)
    value = (correct.sum(axis=0) / present.sum(axis=0)).mean()
    means = np.nanmean(bootstrap_ratios(correct, present), axis=1)
    return Estimate(float(value), *interval(means, (present > 0).sum(axis=0)))


def accuracies(
    clip_scores: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
) -> dict[str, Estimate]:
    """Estimate all accuracies from clip_scores [V, N, K] and labels [V], see MEASURES."""
    values = video_values(clip_scores, labels)
    result = {name: estimate_mean(each, groups) for name, each in values.items()}
    result["class_mean"] = estimate_class_mean(values["top1"], labels, clip_scores.shape[2], groups)
    return result


def estimate_difference(
    a: np.ndarray,
    b: np.ndarray,
    groups: np.ndarray | None = None,
) -> Estimate:
    """Estimate the mean of a − b, where a [V] and b [V] belong to the same videos."""
    if a.shape != b.shape:
        raise ValueError(f"a paired difference requires equal shapes, got {a.shape} and {b.shape}")
    return estimate_mean(a - b, groups, min_mean=-1)


def signed(fraction: float) -> str:
    """Format a difference of fractions in points, such as `+11.4` or `−5.7`."""
    return f"{100 * fraction:+.1f}".replace("-", "−")
