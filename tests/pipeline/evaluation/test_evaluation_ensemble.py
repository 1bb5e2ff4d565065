"""Late fusion and paired comparison against NumPy and scikit-learn, and properties of p-values."""

from __future__ import annotations

import numpy as np
import pytest

from distinit.pipeline.common.errors import CheckpointError, LabelsError, UsageError
from distinit.pipeline.evaluation.ensemble import compare_predictions, fuse_predictions, p_value
from distinit.pipeline.evaluation.metrics import estimate_class_mean, estimate_mean
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.evaluation.splits import mean_over_splits

V, N, K = 60, 4, 5
CLASSES = [f"class {k}" for k in range(K)]


def make_predictions(
    seed: int, confidence: float, *, scores: str = "softmax", order: np.ndarray | None = None
) -> Predictions:
    """Return predictions of 60 videos in some order, of which video 7 is unreadable.

    `confidence` is the advantage of the logit of the label.
    """
    order = np.arange(V) if order is None else order
    rng = np.random.default_rng(seed)
    labels = np.arange(V) % K
    logits = rng.normal(size=(V, N, K)) + confidence * np.eye(K)[labels][:, None]
    predictions = Predictions.empty(
        CLASSES,
        [f"v{i}.mp4" for i in order],
        labels[order].tolist(),
        N,
        protocol={"clips": N, "scores": scores},
        identity={"seed": seed},
        sources=[f"s{i // 3}" for i in order],
    )
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for row, video in enumerate(order):
        if video == 7:
            predictions.fail(row, "no video stream")
        else:
            values = logits if scores == "logits" else softmax
            predictions.set_scores(row, values[video].astype(np.float32), np.zeros(N), 9)
    return predictions


def test_fusion_is_the_weighted_mean_of_the_probabilities() -> None:
    order = np.random.default_rng(0).permutation(V)
    a, b = make_predictions(1, 1.0), make_predictions(2, 1.0, scores="logits", order=order)
    fused = fuse_predictions([a, b], ["a", "b"], [1, 3])
    logits = np.empty((V, K))
    logits[order] = b.clip_scores.mean(axis=1)
    second = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = (a.clip_scores.mean(axis=1) + 3 * second) / 4
    np.testing.assert_allclose(fused.video_scores, expected, atol=1e-6, equal_nan=True)
    assert [f["video"] for f in fused.failures()] == ["v7.mp4"]
    assert "a: no video stream; b: no video stream" in fused.reasons
    first_only = fuse_predictions([a, b], ["a", "b"], [1, 0])
    np.testing.assert_allclose(first_only.video_scores, a.video_scores, atol=1e-6, equal_nan=True)
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(UsageError, match="--weights"):
            fuse_predictions([a, b], ["a", "b"], weights)


def test_a_comparison_pairs_videos_and_counts_by_class() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    order = np.random.default_rng(3).permutation(V)
    a, b = make_predictions(1, 1.5), make_predictions(2, 0.3, order=order)
    comparison = compare_predictions(a, b, ("a", "b"))
    labels = np.arange(V) % K
    guesses = []
    for part, rows in ((a, np.arange(V)), (b, np.argsort(order))):
        guess = np.nan_to_num(part.video_scores[rows]).argmax(axis=1)
        # An unreadable video counts as wrong.
        guess[7] = (labels[7] + 1) % K
        guesses.append(guess)
    recalls = [
        metrics.recall_score(labels, guess, average=None, labels=range(K)) for guess in guesses
    ]
    for k, name in enumerate(CLASSES):
        assert (comparison.classes[name].a, comparison.classes[name].b) == pytest.approx(
            (recalls[0][k], recalls[1][k])
        )
        assert comparison.videos[name] == V // K
    gains = [gain.estimate.value for gain in comparison.classes.values()]
    assert gains == sorted(gains, reverse=True)
    top1 = comparison.measures["top1"]
    assert top1.a == pytest.approx(metrics.accuracy_score(labels, guesses[0]))
    assert top1.estimate.value == pytest.approx(top1.a - top1.b)
    assert comparison.measures["class_mean"].a == pytest.approx(
        metrics.balanced_accuracy_score(labels, guesses[0])
    )
    assert top1.estimate.low > 0
    assert top1.p < 0.01
    reverse = compare_predictions(b, a, ("b", "a")).measures["top1"]
    assert reverse.estimate.value == -top1.estimate.value
    assert reverse.p < 0.01


def test_p_without_a_difference() -> None:
    """p is 1 for one model twice, and below 0.05 in about 5 % of comparisons of equal models."""
    a = make_predictions(1, 1.0)
    assert compare_predictions(a, make_predictions(1, 1.0), ("a", "a")).measures["top1"].p == 1.0
    p_values = []
    for seed in range(4, 124, 2):
        models = make_predictions(seed, 0.8), make_predictions(seed + 1, 0.8)
        p_values.append(compare_predictions(*models, ("a", "b")).measures["top1"].p)
    assert sum(p < 0.05 for p in p_values) <= 10, "of 60 comparisons 3 are expected"


def test_a_few_videos_that_all_agree_prove_little() -> None:
    """Every resample has the same gain. p is that of a sign test: 1 for one unit, 1/4 for three
    and 1/64 for seven."""
    gains = np.full(10_000, -1.0)
    assert [p_value(gains, units) for units in (1, 3, 7)] == [1.0, 0.25, 2 / 128]
    assert p_value(gains, 100) == pytest.approx(2 / 10_001)


def test_other_videos_classes_or_labels_are_refused() -> None:
    a, b = make_predictions(1, 1.0), make_predictions(2, 1.0)
    b.videos[3] = "elsewhere.mp4"
    with pytest.raises(LabelsError, match=r"2 .*elsewhere\.mp4"):
        compare_predictions(a, b, ("a", "b"))
    b = make_predictions(2, 1.0)
    b.labels[3] = 0
    with pytest.raises(LabelsError, match=r"1 .*v3\.mp4"):
        fuse_predictions([a, b], ["a", "b"], [1, 1])
    b = make_predictions(2, 1.0)
    b.classes[1] = "another"
    with pytest.raises(CheckpointError, match=r"'another'.*'class 1'"):
        compare_predictions(a, b, ("a", "b"))


def test_intervals_resample_sources_if_all_are_known() -> None:
    """Ten videos per source that agree count as one: the interval is that of 30 coins, not 300."""
    rng = np.random.default_rng(0)
    coins = rng.integers(2, size=30).astype(np.float64)
    values, groups = coins.repeat(10), np.arange(30).repeat(10)
    by_source, by_video, one_per_source = (
        estimate_mean(values, groups),
        estimate_mean(values),
        estimate_mean(coins),
    )
    assert (by_source.value, by_source.low, by_source.high) == (
        one_per_source.value,
        one_per_source.low,
        one_per_source.high,
    )
    assert by_source.high - by_source.low > 2.5 * (by_video.high - by_video.low)
    labels = np.arange(300) % 3
    clustered, plain = (
        estimate_class_mean(values, labels, 3, groups),
        estimate_class_mean(values, labels, 3),
    )
    assert clustered.value == plain.value
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)
    predictions = make_predictions(1, 1.0)
    assert predictions.resampled == {"resampled": "sources", "units": 20}
    predictions.sources[4] = ""
    assert predictions.resampled == {"resampled": "videos", "units": V}, (
        "one unknown source leaves only videos"
    )


def test_mean_and_deviation_over_splits() -> None:
    values = [0.5, 0.6, 0.1]
    names = ("per_clip", "top1", "top5", "class_mean")
    means = mean_over_splits([{name: {"value": value} for name in names} for value in values])
    assert means["top1"] == {
        "mean": pytest.approx(np.mean(values)),
        "std": pytest.approx(np.std(values, ddof=1)),
        "splits": values,
    }
    assert mean_over_splits([{name: {"value": 0.5} for name in names}])["top1"]["std"] is None
