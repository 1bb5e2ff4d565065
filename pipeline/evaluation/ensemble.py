"""Late fusion and paired comparison of models that were tested on the same videos.

Everything is computed from predictions files; no video is decoded.

Shapes: V test videos, K classes, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.errors import LabelsError, UsageError
from ..common.numerics import softmax
from ..corpus.sources import escape_path
from .metrics import (
    Estimate,
    bootstrap_ratios,
    by_group,
    class_values,
    interval,
    video_values,
)
from .predictions import FAILED, LOGITS, OK, Predictions, require_classes


@dataclass(frozen=True)
class Gain:
    """The accuracies of two models as fractions, and their difference.

    Attributes:
        a: Accuracy of the first model.
        b: Accuracy of the second one.
        estimate: a − b with its interval.
        p: Two-sided p-value of no difference.
    """

    a: float
    b: float
    estimate: Estimate
    p: float

    def as_dict(self) -> dict[str, float]:
        """Return the record for result.json."""
        return {
            "a": self.a,
            "b": self.b,
            "gain": self.estimate.value,
            "low": self.estimate.low,
            "high": self.estimate.high,
            "p": self.p,
        }


@dataclass(frozen=True)
class Comparison:
    """The gains of model A over model B.

    Attributes:
        measures: Gain in top1, top5, class_mean, and in per_clip if both models have it.
        classes: Gain in top 1 by class, the largest first.
        videos: Number of test videos by class.
    """

    measures: dict[str, Gain]
    classes: dict[str, Gain]
    videos: dict[str, int]


def fuse_predictions(
    parts: Sequence[Predictions], names: Sequence[str], weights: Sequence[float]
) -> Predictions:
    """Average the probabilities of several models into predictions with one clip per video.

    A video that one of the models could not read counts as wrong.

    Args:
        parts: Predictions of each model.
        names: Names of the models for messages.
        weights: Weight of each model.

    Raises:
        UsageError: Weights are not one per model, negative, or all 0.
        CheckpointError: Class lists differ.
        LabelsError: Videos or labels differ.
    """
    if len(weights) != len(parts) or min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(
            f"--weights: expected {len(parts)} numbers, none negative and not all 0, got {list(weights)}"
        )
    first = parts[0]
    orders = [
        matching_rows(first, part, names[0], name) for part, name in zip(parts, names, strict=True)
    ]
    fused = Predictions.empty(
        first.classes,
        first.videos,
        first.labels.tolist(),
        1,
        protocol={"fused": [part.protocol for part in parts], "weights": list(weights)},
        identity={"fused": [part.identity for part in parts]},
        sources=first.sources,
    )
    stacked = np.stack(
        [probabilities(part)[order] for part, order in zip(parts, orders, strict=True)]
    )
    mean = np.average(stacked.astype(np.float64), axis=0, weights=weights)
    fused.frames = first.frames
    for video in range(len(first.videos)):
        reasons = [
            f"{name}: {part.reasons[order[video]]}"
            for part, order, name in zip(parts, orders, names, strict=True)
            if part.status[order[video]] == FAILED
        ]
        if reasons:
            fused.fail(video, "; ".join(reasons))
            continue
        fused.status[video] = OK
        fused.clip_scores[video, 0] = mean[video]
    return fused


def probabilities(part: Predictions) -> np.ndarray:
    """Return video scores that sum to 1, float32 [V, K]; NaN for videos without scores.

    Mean logits are turned into their softmax.
    """
    scores = part.video_scores
    return softmax(scores) if part.protocol.get("scores") == LOGITS else scores


def compare_predictions(
    a: Predictions,
    b: Predictions,
    names: tuple[str, str],
) -> Comparison:
    """Compute the gain of A over B, paired by video, with a bootstrap over recordings or videos.

    The p-values of classes are not corrected for the number of classes: one in twenty classes
    without a difference has p < 0.05.

    Args:
        a: Predictions of model A.
        b: Predictions of model B for the same videos.
        names: Names of the two for messages.

    Raises:
        CheckpointError: Class lists differ.
        LabelsError: Videos or labels differ.
    """
    order = matching_rows(a, b, *names)
    labels, groups = a.labels, a.groups
    values_a = video_values(a.clip_scores, labels)
    values_b = video_values(b.clip_scores[order], labels)
    if any("fused" in each.protocol for each in (a, b)):
        del values_a["per_clip"]
    ones = np.ones((len(labels), 1))

    def ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
        return bootstrap_ratios(by_group(numerators, groups), by_group(denominators, groups))

    num_units = len(by_group(ones, groups))
    measures = {
        name: _gain(
            value,
            values_b[name],
            ratios((value - values_b[name])[:, None], ones)[:, 0],
            num_units,
        )
        for name, value in values_a.items()
    }
    k = len(a.classes)
    correct_a, present = class_values(values_a["top1"], labels, k)
    correct_b, _ = class_values(values_b["top1"], labels, k)
    # Classes without a test video have no accuracy.
    tested = np.flatnonzero(present.any(axis=0))
    correct_a, correct_b, present = correct_a[:, tested], correct_b[:, tested], present[:, tested]
    resampled = ratios(correct_a - correct_b, present)
    num_videos = present.sum(axis=0)
    accuracy_a, accuracy_b = correct_a.sum(axis=0) / num_videos, correct_b.sum(axis=0) / num_videos
    measures["class_mean"] = _gain(accuracy_a, accuracy_b, np.nanmean(resampled, axis=1), num_units)
    units = (by_group(present, groups) > 0).sum(axis=0)
    class_names = [a.classes[c] for c in tested]
    classes = {
        name: _gain(
            accuracy_a[[i]],
            accuracy_b[[i]],
            resampled[np.isfinite(resampled[:, i]), i],
            int(units[i]),
        )
        for i, name in enumerate(class_names)
    }
    by_gain = dict(sorted(classes.items(), key=lambda item: -item[1].estimate.value))
    videos = dict(zip(class_names, map(int, num_videos), strict=True))
    return Comparison(measures, by_gain, videos)


def _gain(a: np.ndarray, b: np.ndarray, resampled: np.ndarray, units: int) -> Gain:
    """Return the gain of mean a [n] over mean b [n] from resampled differences [R]."""
    mean_a, mean_b = float(a.mean()), float(b.mean())
    estimate = Estimate(mean_a - mean_b, *interval(resampled, units, min_mean=-1))
    return Gain(mean_a, mean_b, estimate, p_value(resampled, units))


def p_value(resampled: np.ndarray, units: int) -> float:
    """Compute the two-sided bootstrap p-value of no difference.

    It is 2 · min(share of resampled differences ≤ 0, share ≥ 0), each share with one added to its
    numerator and its denominator, and at most 1.

    Args:
        resampled: Resampled differences [R].
        units: Number n of resampled units. p is at least 2 · 2⁻ⁿ, the p-value of a sign test in
            which all units agree, so that a single video proves nothing.
    """
    share_below, share_above = (
        (count + 1) / (len(resampled) + 1)
        for count in ((resampled <= 0).sum(), (resampled >= 0).sum())
    )
    return float(min(1.0, max(2 * min(share_below, share_above), 2 * 0.5**units)))


def matching_rows(a: Predictions, b: Predictions, name_a: str, name_b: str) -> list[int]:
    """Return the row of b for each row of a; names are for messages.

    Raises:
        CheckpointError: Class lists differ.
        LabelsError: Videos or labels differ.
    """
    require_classes(b.classes, a.classes, origin=name_b, expected_origin=name_a)
    rows = {video: i for i, video in enumerate(b.videos)}
    unpaired = sorted(set(a.videos) ^ set(b.videos))
    if unpaired:
        tested_by = name_a if unpaired[0] in set(a.videos) else name_b
        raise LabelsError(
            f"{name_a} and {name_b} were tested on different videos: {len(unpaired)} are in only one of them, the "
            f"first is {escape_path(unpaired[0])} of {tested_by}"
        )
    order = [rows[video] for video in a.videos]
    relabelled = [
        video for video, k, i in zip(a.videos, a.labels, order, strict=True) if k != b.labels[i]
    ]
    if relabelled:
        raise LabelsError(
            f"{name_a} and {name_b} have different labels for {len(relabelled)} videos, the first is "
            f"{escape_path(relabelled[0])}"
        )
    return order
