"""A linear probe of the cached targets of a teacher: how well do they predict labels?

The probe is a logistic regression on the mean target of each video. It takes seconds, and opens no
video.

Shapes: V labelled videos, D numbers per target, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError
from ..store.reader import TargetStore
from .metrics import Estimate, estimate_mean
from .store_labels import StoreLabels

# Values of C, for targets whose mean squared distance from their mean is 1: the range of the best
# values on har7 and fight-surv, widened by a factor of ten on both sides.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
INNER_FOLDS = 3
# About how many rows are decoded at a time.
BLOCK = 16_384


@dataclass(frozen=True)
class ProbeResult:
    """The accuracy of a probe of one teacher.

    Attributes:
        teacher: Name of the teacher.
        output: Kind of its output.
        encoding: Encoding of its targets in the store.
        width: D, the numbers per target.
        frames: Number of frames per video that targets were averaged over; None for all.
        accuracy: Accuracy on videos that the probe was not trained on.
        most_frequent: Share of the most frequent class among these videos.
        correct: Whether each of these videos was classified correctly, bool [V], in the order of
            the labels.
    """

    teacher: str
    output: str
    encoding: str
    width: int
    frames: int | None
    accuracy: Estimate
    most_frequent: float
    correct: NDArray[np.bool_]

    @property
    def beats_most_frequent(self) -> bool:
        """Whether the interval of the accuracy is above the share of the most frequent class."""
        return self.accuracy.low > self.most_frequent


def probe_teacher(
    store: TargetStore,
    teacher: str,
    labels: StoreLabels,
    frame_counts: Sequence[int | None],
    *,
    folds: int = 5,
    seed: int = 0,
) -> Iterator[ProbeResult]:
    """Yield the accuracy of a linear probe for each number of frames.

    The probe is a multinomial logistic regression. Targets are centred and divided by one scale for
    all dimensions. Both are measured, and the strength of the regularisation is chosen, on the
    training side of each fold. Folds keep the videos of a group together and have similar shares of
    the classes. Labels with a split are tested on its test side instead.

    Args:
        store: An open store.
        teacher: One of its teachers.
        labels: Labels of its videos, see `match_labels`.
        frame_counts: Numbers of cached frames per video, evenly spread; None for all.
        folds: Number of folds.
        seed: Seed of the folds.

    Raises:
        UsageError: There are fewer than two groups for folds, or no test video or fewer than two
            training classes in a split, or the mean cells of the teacher are not its feature.
    """
    from threadpoolctl import threadpool_limits

    record = store.teacher(teacher)
    if record.grid and not record.plain_mean:
        raise UsageError(
            f"teacher {teacher!r} of {store.name} has cells whose mean is not the feature of the model, "
            "so that a probe of them does not measure the model; choose other teachers with --teacher"
        )
    means = mean_targets(store, teacher, labels.videos, frame_counts)
    sides = list(_sides(labels, folds, seed))
    tested = np.sort(np.concatenate([test for _, test in sides]))
    truth = labels.label[tested]
    most_frequent = float(np.max(np.bincount(truth)) / len(truth))
    for frames, targets in zip(frame_counts, means, strict=True):
        predicted = np.full(len(labels.label), -1)
        # On matrices this small, the threads of a linear algebra library cost more than they save.
        with threadpool_limits(1):
            for train, test in sides:
                predicted[test] = fit_and_predict(
                    targets[train], labels.label[train], labels.group[train], targets[test], seed
                )
        correct = predicted[tested] == truth
        accuracy = estimate_mean(correct.astype(np.float64), labels.group[tested])
        yield ProbeResult(
            teacher,
            record.output,
            record.encoding,
            targets.shape[1],
            frames,
            accuracy,
            most_frequent,
            correct,
        )


def mean_targets(
    store: TargetStore,
    teacher: str,
    videos: NDArray[np.int64],
    frame_counts: Sequence[int | None],
) -> list[NDArray[np.float32]]:
    """Return outputs averaged over cached frames, [V, D] for each number of frames.

    The cached frames of a video are divided into that number of equal parts, and the middle of each
    part is used. All frames are used if a video has fewer.
    """
    counts = store.row_counts[videos]
    ends = np.cumsum(counts)
    blocks = np.split(np.arange(len(videos)), np.flatnonzero(np.diff(ends // BLOCK)) + 1)
    means = [
        _block_means(store, teacher, videos[block], counts[block], frame_counts) for block in blocks
    ]
    return [np.concatenate(each) for each in zip(*means, strict=True)]


def _block_means(
    store: TargetStore,
    teacher: str,
    videos: NDArray[np.int64],
    counts: NDArray[np.int64],
    frame_counts: Sequence[int | None],
) -> list[NDArray[np.float32]]:
    """Return the means of some videos, and read every frame once."""
    rows, first_rows = store.rows_of(videos), np.cumsum(counts) - counts
    # Positions in `rows` for each number of frames and each video.
    positions = [
        [
            first + _spread(count, frames)
            for count, first in zip(counts.tolist(), first_rows, strict=True)
        ]
        for frames in frame_counts
    ]
    needed = np.unique(
        np.concatenate([indices for per_video in positions for indices in per_video])
    )
    outputs = store.outputs(teacher, rows[needed])
    return [
        np.stack([outputs[np.searchsorted(needed, indices)].mean(axis=0) for indices in per_video])
        for per_video in positions
    ]


def _spread(count: int, frames: int | None) -> NDArray[np.int64]:
    if frames is None or frames >= count:
        return np.arange(count)
    return ((np.arange(frames) + 0.5) * count / frames).astype(np.int64)


def _sides(
    labels: StoreLabels, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the positions in the labels of the videos to train on, and of those to test."""
    if labels.test is not None:
        train, test = np.flatnonzero(~labels.test), np.flatnonzero(labels.test)
        if len(np.unique(labels.label[train])) < 2 or len(test) == 0:
            raise UsageError(
                f"--split: {len(train)} training and {len(test)} test videos of the split are in "
                f"the store; a probe requires training videos of at least 2 classes and a test video"
            )
        yield train, test
        return
    groups = len(np.unique(labels.group))
    if groups < 2:
        raise UsageError(
            f"--dataset: all {len(labels.videos)} labelled videos are of one source; folds require "
            f"at least 2"
        )
    yield from _grouped_folds(labels.label, labels.group, min(folds, groups), seed)


def _grouped_folds(
    label: NDArray[np.int64], group: NDArray[np.int64], folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    from sklearn.model_selection import StratifiedGroupKFold

    with warnings.catch_warnings():
        # A class with fewer videos than folds is missing in some folds, and counts as wrong there.
        warnings.simplefilter("ignore", UserWarning)
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train, test in splitter.split(np.zeros(len(label)), label, group):
            if len(test):
                yield train, test


def fit_and_predict(
    train: NDArray[np.float32],
    label: NDArray[np.int64],
    group: NDArray[np.int64],
    test: NDArray[np.float32],
    seed: int,
) -> NDArray[np.int64]:
    """Fit a probe on train [m, D] and label [m], and predict the classes of test [n, D]."""
    if len(np.unique(label)) < 2:
        return np.full(len(test), label[0])
    mean = train.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((np.square(train - mean)).sum(axis=1).mean()) or 1.0
    x, y = (train - mean) / scale, (test - mean) / scale
    if x.shape[1] > x.shape[0]:
        # The optimal weights are sums of training rows. Coordinates in the span of these rows give
        # the same probe in a tenth of the time.
        axes = np.linalg.svd(x, full_matrices=False)[2]
        x, y = x @ axes.T, y @ axes.T
    return _fit(x, label, _best_strength(x, label, group, seed)).predict(y)


def _best_strength(
    x: NDArray[np.float64], label: NDArray[np.int64], group: NDArray[np.int64], seed: int
) -> float:
    """Return the strength with the most correct videos over inner folds; the smallest of equals."""
    groups = len(np.unique(group))
    if groups < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    num_correct = np.zeros(len(STRENGTHS))
    for train, test in _grouped_folds(label, group, min(INNER_FOLDS, groups), seed):
        if len(np.unique(label[train])) < 2:
            continue
        for i, strength in enumerate(STRENGTHS):
            predicted = _fit(x[train], label[train], strength).predict(x[test])
            num_correct[i] += (predicted == label[test]).sum()
    return STRENGTHS[int(np.argmax(num_correct))]


def _fit(x: NDArray[np.float64], label: NDArray[np.int64], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # With weak regularisation, separable classes may not converge; an approximation is enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=300).fit(x, label)
