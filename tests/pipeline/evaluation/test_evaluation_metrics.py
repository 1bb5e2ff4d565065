"""Metrics and clip starts against plain loops, and against torchmetrics if it is installed."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distinit.pipeline.evaluation.labelled_clips import clip_starts, frame_indices
from distinit.pipeline.evaluation.metrics import (
    accuracies,
    estimate_class_mean,
    estimate_difference,
    estimate_mean,
    hits,
    video_values,
)


def random_scores(v: int, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(v, n, k))
    scores = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return scores.astype(np.float32), rng.integers(k, size=v).astype(np.int32)


@given(num_frames=st.integers(1, 5000), span=st.integers(1, 200), k=st.integers(2, 20))
@settings(max_examples=300, deadline=None)
def test_starts_are_the_formula(num_frames: int, span: int, k: int) -> None:
    expected = [floor(Fraction(i * max(num_frames - span, 0), k - 1)) for i in range(k)]
    starts = clip_starts(num_frames, span, k)
    assert starts.tolist() == expected
    for start in starts:
        frames = frame_indices(int(start), span, num_frames)
        assert frames.tolist() == [min(start + t, num_frames - 1) for t in range(span)]


def test_ten_clips_of_every_length_reach_both_ends() -> None:
    for n in range(1, 400):
        starts = clip_starts(n, 8)
        assert starts[0] == 0
        assert starts[-1] == max(n - 8, 0)
        assert len(starts) == 10
    assert clip_starts(21, 8, 1).tolist() == [6]
    with pytest.raises(ValueError, match="0"):
        clip_starts(0, 8)


@pytest.mark.parametrize("k", [2, 5, 7, 60])
def test_accuracies_equal_a_plain_loop(k: int) -> None:
    scores, labels = random_scores(40, 10, k, seed=k)
    per_clip, top1, top5 = 0, 0, 0
    for video, label in zip(scores, labels, strict=True):
        per_clip += sum(int(np.argmax(clip) == label) for clip in video)
        mean = video.astype(np.float64).mean(axis=0)
        order = sorted(range(k), key=lambda c: (-mean[c], c))
        top1 += order[0] == label
        top5 += label in order[:5]
    result = accuracies(scores, labels)
    assert result["per_clip"].value == pytest.approx(per_clip / 400)
    assert result["top1"].value == pytest.approx(top1 / 40)
    assert result["top5"].value == pytest.approx(top5 / 40)


def test_accuracies_equal_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.functional.classification")
    torch = pytest.importorskip("torch")
    scores, labels = random_scores(200, 10, 12)
    mean = torch.from_numpy(scores.astype(np.float64).mean(axis=1))
    result = accuracies(scores, labels)
    for name, top, average in (
        ("top1", 1, "micro"),
        ("top5", 5, "micro"),
        ("class_mean", 1, "macro"),
    ):
        expected = classification.multiclass_accuracy(
            mean, torch.from_numpy(labels).long(), num_classes=12, top_k=top, average=average
        )
        assert result[name].value == pytest.approx(float(expected), abs=1e-6)


def test_unreadable_videos_are_wrong_and_stay_in_the_denominator() -> None:
    scores = np.zeros((4, 10, 3), dtype=np.float32)
    labels = np.array([0, 1, 2, 0], dtype=np.int32)
    # All are correct but one, which has no scores. Comparisons with NaN must not make it correct.
    scores[np.arange(4), :, labels] = 1
    scores[3] = np.nan
    result = accuracies(scores, labels)
    assert [result[name].value for name in ("per_clip", "top1", "top5")] == [0.75] * 3
    assert result["class_mean"].value == pytest.approx((0.5 + 1 + 1) / 3)


def test_equal_scores_count_for_the_lower_class_alone() -> None:
    scores = np.full((3, 4), 0.25)
    assert hits(scores, np.array([0, 1, 3])).tolist() == [True, False, False]
    assert hits(scores, np.array([0, 1, 3]), top=2).tolist() == [True, True, False]


def test_interval_of_a_mean_has_the_spread_of_the_binomial() -> None:
    values = np.repeat([1.0, 0.0], [30, 70])
    estimate = estimate_mean(values)
    # The exact 2.5 and 97.5 % quantiles of Binomial(100, 0.3)/100.
    chances = np.cumsum([_binomial(100, 0.3, i) for i in range(101)])
    low, high = (int(np.searchsorted(chances, q)) / 100 for q in (0.025, 0.975))
    assert estimate.value == pytest.approx(0.3)
    assert estimate.low == pytest.approx(low, abs=0.011)
    assert estimate.high == pytest.approx(high, abs=0.011)
    assert estimate_mean(values) == estimate, "the bootstrap is seeded"


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    rng = np.random.default_rng(3)
    a = (rng.random(300) < 0.5).astype(np.float64)
    b = a.copy()
    # The two differ on fifteen videos.
    b[:15] = 1 - b[:15]
    paired = estimate_difference(a, b)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.high - paired.low < 0.6 * (estimate_mean(a).high - estimate_mean(a).low)
    with pytest.raises(ValueError):
        estimate_difference(a, b[:-1])


def test_class_mean_weighs_classes_not_videos() -> None:
    scores, labels = random_scores(90, 2, 3)
    labels[:] = np.repeat([0, 1, 2], [80, 5, 5])
    top1 = video_values(scores, labels)["top1"]
    expected = np.mean([top1[labels == c].mean() for c in range(3)])
    estimate = estimate_class_mean(top1, labels, 3)
    assert estimate.value == pytest.approx(expected)
    assert estimate.low <= expected <= estimate.high


def _binomial(n: int, p: float, i: int) -> float:
    choose = 1
    for j in range(i):
        choose = choose * (n - j) // (j + 1)
    return choose * p**i * (1 - p) ** (n - i)


@pytest.mark.parametrize(("units", "low"), [(1, 0.025), (2, 0.158), (10, 0.692), (100, 0.964)])
def test_the_interval_of_equal_values_is_the_exact_one(units: int, low: float) -> None:
    estimate = estimate_mean(np.ones(units))
    assert (estimate.value, estimate.high) == (1, 1)
    # From a table of Clopper and Pearson's intervals.
    assert estimate.low == pytest.approx(low, abs=1e-3)
    assert estimate_mean(np.zeros(units)).high == pytest.approx(1 - low, abs=1e-3)
    difference = estimate_difference(np.ones(units), np.ones(units))
    assert (difference.low, difference.high) == (
        pytest.approx(low - 1, abs=1e-3),
        pytest.approx(1 - low, abs=1e-3),
    )
    # Three videos of a recording are one unit.
    grouped = estimate_mean(np.ones(units * 3), np.arange(units * 3) // 3)
    assert grouped.low == pytest.approx(low, abs=1e-3)
    mean = estimate_class_mean(np.repeat([1.0, 0.0], units), np.repeat([0, 1], units), 2)
    assert mean.low < mean.value < mean.high
