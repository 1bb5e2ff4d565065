"""Predictions of several models on the same videos: late fusion, and which of two is better.

Shapes: V test videos, K classes, R bootstrap resamples. Nothing is decoded: all of it comes from
    predictions files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.errors import LabelsError, UsageError
from ..common.numerics import softmax
from ..corpus.sources import escape_path
from .metrics import (
    RESAMPLES,
    SEED,
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
    """How much more of the videos a model has right than another, as fractions; `p`: two-sided, of
    no difference."""

    a: float
    b: float
    estimate: Estimate
    p: float

    def as_dict(self) -> dict[str, float]:
        return {
            "a": self.a,
            "b": self.b,
            "gain": self.estimate.value,
            **_ends(self.estimate),
            "p": self.p,
        }


@dataclass(frozen=True)
class Comparison:
    """Of A over B: `measures` by name (top1, top5, class_mean, and per_clip where both have it);
    top 1 of each class by name, the largest gain first; the test `videos` of each class."""

    measures: dict[str, Gain]
    classes: dict[str, Gain]
    videos: dict[str, int]


def fuse_predictions(
    parts: Sequence[Predictions], names: Sequence[str], weights: Sequence[float]
) -> Predictions:
    """The weighted mean of the models' video probabilities, as predictions of one clip a video.

    A model's probabilities are its video scores; where those are mean logits, their softmax. A
    video that one model could not read has failed: it counts as wrong.

    Raises UsageError (weights), CheckpointError (classes), LabelsError (videos or labels differ).
    """
    if len(weights) != len(parts) or min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(
            f"--weights: got {list(weights)}, expected {len(parts)} numbers, none negative, not all 0"
        )
    first = parts[0]
    orders = [_order(first, part, names[0], name) for part, name in zip(parts, names, strict=True)]
    fused = Predictions.empty(
        first.classes,
        first.videos,
        first.labels.tolist(),
        1,
        protocol={"fused": [part.protocol for part in parts], "weights": list(weights)},
        identity={"fused": [part.identity for part in parts]},
        sources=first.sources,
    )
    each = np.stack([probabilities(part)[order] for part, order in zip(parts, orders, strict=True)])
    total = np.average(each.astype(np.float64), axis=0, weights=weights)
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
        fused.clip_scores[video, 0] = total[video]
    return fused


def probabilities(part: Predictions) -> np.ndarray:
    """float32 [V, K]: the video scores, which sum to 1; NaN for videos without."""
    scores = part.video_scores
    return softmax(scores) if part.protocol.get("scores") == LOGITS else scores


def compare_predictions(
    a: Predictions,
    b: Predictions,
    names: tuple[str, str],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """What A gains over B on the same videos, paired, by the bootstrap over recordings or else
    videos.

    p = 2 · min(share of resampled gains ≤ 0, share ≥ 0), each share with one added above and below,
    at most 1 and, of n videos or sources, at least that of a sign test on which all agree, 2 · 2⁻ⁿ:
    one video proves nothing. The classes' p are each on its own: of K classes without a difference,
    a twentieth is below 0.05.

    Raises CheckpointError (classes), LabelsError (videos or labels differ).
    """
    order = _order(a, b, *names)
    labels, groups = a.labels, a.groups
    values = [video_values(a.clip_scores, labels), video_values(b.clip_scores[order], labels)]
    fused = any("fused" in each.protocol for each in (a, b))
    one = np.ones((len(labels), 1))

    def gain(x: np.ndarray, y: np.ndarray, resampled: np.ndarray, units: int) -> Gain:
        ours, theirs = float(x.mean()), float(y.mean())
        estimate = Estimate(ours - theirs, *interval(resampled, units, least=-1))
        return Gain(ours, theirs, estimate, p_value(resampled, units))

    def ratios(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return bootstrap_ratios(
            by_group(above, groups), by_group(below, groups), resamples=resamples, seed=seed
        )

    count = len(by_group(one, groups))
    measures = {
        name: gain(
            values[0][name],
            values[1][name],
            ratios((values[0][name] - values[1][name])[:, None], one)[:, 0],
            count,
        )
        for name in values[0]
        if not (fused and name == "per_clip")
    }
    k = len(a.classes)
    (right_a, present), (right_b, _) = (class_values(each["top1"], labels, k) for each in values)
    there = np.flatnonzero(present.any(axis=0))
    per_class = ratios((right_a - right_b)[:, there], present[:, there])
    each_a, each_b = (
        right[:, there].sum(axis=0) / present[:, there].sum(axis=0) for right in (right_a, right_b)
    )
    measures["class_mean"] = gain(each_a, each_b, np.nanmean(per_class, axis=1), count)
    units = (by_group(present[:, there], groups) > 0).sum(axis=0)
    classes = {
        a.classes[c]: gain(
            each_a[[i]], each_b[[i]], per_class[np.isfinite(per_class[:, i]), i], int(units[i])
        )
        for i, c in enumerate(there)
    }
    ordered = dict(sorted(classes.items(), key=lambda item: -item[1].estimate.value))
    return Comparison(measures, ordered, {a.classes[c]: int(present[:, c].sum()) for c in there})


def p_value(resampled: np.ndarray, units: int) -> float:
    """Two-sided bootstrap p-value of a difference of 0, of so many resampled units."""
    below, above = (
        (count + 1) / (len(resampled) + 1)
        for count in ((resampled <= 0).sum(), (resampled >= 0).sum())
    )
    return float(min(1.0, max(2 * min(below, above), 2 * 0.5**units)))


def _order(a: Predictions, b: Predictions, name_a: str, name_b: str) -> list[int]:
    """Row of b for each row of a."""
    require_classes(b.classes, a.classes, here=name_b, there=name_a)
    rows = {video: i for i, video in enumerate(b.videos)}
    odd = sorted(set(a.videos) ^ set(b.videos))
    if odd:
        holder = name_a if odd[0] in set(a.videos) else name_b
        raise LabelsError(
            f"{name_a} and {name_b} were tested on other videos: {len(odd)} are in one alone, the first is "
            f"{escape_path(odd[0])} of {holder}"
        )
    order = [rows[video] for video in a.videos]
    wrong = [
        video for video, own, i in zip(a.videos, a.labels, order, strict=True) if own != b.labels[i]
    ]
    if wrong:
        raise LabelsError(
            f"{name_a} and {name_b} have other labels for {len(wrong)} videos, the first is {escape_path(wrong[0])}"
        )
    return order


def _ends(estimate: Estimate) -> dict[str, Any]:
    return {"low": estimate.low, "high": estimate.high}
