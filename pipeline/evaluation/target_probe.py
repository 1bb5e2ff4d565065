"""A linear probe of a teacher's cached targets: what can they teach about a user's classes?

Nothing is trained but a logistic regression on the targets averaged over each video, so that it
takes seconds and no video is opened.

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

# For targets whose mean squared distance from their mean is 1: the range of the best values on
# har7 and fight-surv, widened by a factor of ten on both sides.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
INNER_FOLDS = 3
BLOCK = 16_384  # rows decoded at a time, about


@dataclass(frozen=True)
class ProbeResult:
    """How well one teacher's targets, averaged over `frames` frames (None: all), tell classes.

    accuracy: on videos that the probe did not see. most_frequent: the share of the most frequent
    class among them. correct: bool [V], in the order of the labels that were tested.
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
    def tells_apart(self) -> bool:
        """Whether the interval is above the share of the most frequent class."""
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

    The probe is multinomial logistic regression. Targets are centred and divided by one scale for
    all dimensions, both measured on the training side of each fold, where the strength of the
    regularisation is chosen too. Folds keep the videos of a group together and the shares of the
    classes alike; the sides of a split take their place where the labels have them.

    Args:
        store: An open store.
        teacher: One of its teachers.
        labels: Of its videos, see `match_labels`.
        frame_counts: Numbers of cached frames per video, evenly spread; None for all.
        folds: Number of folds.
        seed: Of the folds.

    Raises:
        UsageError: There are fewer than two groups of videos to divide.
    """
    from threadpoolctl import threadpool_limits

    record = store.teacher(teacher)
    if record.grid and not record.plain_mean:
        raise UsageError(
            f"teacher {teacher!r} of {store.name} holds cells whose mean is not the model's "
            "feature, so that a probe of them does not measure the model; choose other teachers with --teacher"
        )
    means = mean_targets(store, teacher, labels.videos, frame_counts)
    sides = list(_sides(labels, folds, seed))
    tested = np.sort(np.concatenate([test for _, test in sides]))
    truth = labels.label[tested]
    most = float(np.max(np.bincount(truth)) / len(truth))
    for frames, targets in zip(frame_counts, means, strict=True):
        predicted = np.full(len(labels.label), -1)
        # Threads of a library of linear algebra cost more than they save on matrices this small.
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
            most,
            correct,
        )


def mean_targets(
    store: TargetStore,
    teacher: str,
    videos: NDArray[np.int64],
    frame_counts: Sequence[int | None],
) -> list[NDArray[np.float32]]:
    """Return [V, D] for each number of frames: outputs averaged over that many cached frames.

    Frames are the middles of as many equal parts of the cached ones; a video with fewer gives all.
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
    """Return the means of some videos, of which every frame is read once."""
    rows, first = store.rows_of(videos), np.cumsum(counts) - counts
    picked = [
        [at + _spread(count, frames) for count, at in zip(counts.tolist(), first, strict=True)]
        for frames in frame_counts
    ]
    needed = np.unique(np.concatenate([places for each in picked for places in each]))
    outputs = store.outputs(teacher, rows[needed])
    return [
        np.stack([outputs[np.searchsorted(needed, places)].mean(axis=0) for places in each])
        for each in picked
    ]


def _spread(count: int, frames: int | None) -> NDArray[np.int64]:
    if frames is None or frames >= count:
        return np.arange(count)
    return ((np.arange(frames) + 0.5) * count / frames).astype(np.int64)


def _sides(
    labels: StoreLabels, folds: int, seed: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the places of the videos to train on and to test on."""
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
        # A class of fewer videos than folds is missing from some; it counts as wrong there.
        warnings.simplefilter("ignore", UserWarning)
        divide = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train, test in divide.split(np.zeros(len(label)), label, group):
            if len(test):
                yield train, test


def fit_and_predict(
    train: NDArray[np.float32],
    label: NDArray[np.int64],
    group: NDArray[np.int64],
    test: NDArray[np.float32],
    seed: int,
) -> NDArray[np.int64]:
    """Return the predicted classes of test [n, D] by a probe of train [m, D] with label [m]."""
    if len(np.unique(label)) < 2:
        return np.full(len(test), label[0])
    mean = train.mean(axis=0, dtype=np.float64)
    scale = np.sqrt((np.square(train - mean)).sum(axis=1).mean()) or 1.0
    x, y = (train - mean) / scale, (test - mean) / scale
    if x.shape[1] > x.shape[0]:
        # The weights of the optimum are sums of training rows, so that coordinates in the space
        # which these span are enough: the same probe, in a tenth of the time.
        axes = np.linalg.svd(x, full_matrices=False)[2]
        x, y = x @ axes.T, y @ axes.T
    return _fit(x, label, _best_strength(x, label, group, seed)).predict(y)


def _best_strength(
    x: NDArray[np.float64], label: NDArray[np.int64], group: NDArray[np.int64], seed: int
) -> float:
    """Choose the strength with the most correct videos over inner folds; the smallest of equals."""
    groups = len(np.unique(group))
    if groups < 2:
        return STRENGTHS[len(STRENGTHS) // 2]
    right = np.zeros(len(STRENGTHS))
    for train, test in _grouped_folds(label, group, min(INNER_FOLDS, groups), seed):
        if len(np.unique(label[train])) < 2:
            continue
        for at, strength in enumerate(STRENGTHS):
            right[at] += (
                _fit(x[train], label[train], strength).predict(x[test]) == label[test]
            ).sum()
    return STRENGTHS[int(np.argmax(right))]


def _fit(x: NDArray[np.float64], label: NDArray[np.int64], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # Separable classes have no finite optimum without regularisation: near enough will do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=300).fit(x, label)
