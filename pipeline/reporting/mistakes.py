"""Mistakes of finetuned runs: confusions, wrong test videos, and classes that change between runs.

Every number is computed from the predictions; pictures are read from videos that can be opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.errors import DistInitError
from ..common.numerics import best_classes
from ..common.tables import Table, columns
from ..corpus.sources import escape_path
from ..evaluation.ensemble import matching_rows, probabilities
from ..evaluation.metrics import video_values
from ..evaluation.predictions import Predictions
from .confusions import (
    Matrix,
    confusion_counts,
    draw_matrix,
    frequent_confusions,
    predicted_classes,
)
from .example_videos import Example, ExampleVideos
from .run_pairs import Pair
from .runs import Run

# Classes named for a video.
GUESSES = 3
# Classes in each of the two tables, most improved and most harmed.
CLASSES = 5
# Classes of each table that have example videos, and videos per class.
EXAMPLE_CLASSES = 3
EXAMPLES_PER_CLASS = 2
# Runs, and pairs of runs, whose mistakes are on the page.
MAX_RUNS = 60
MAX_PAIRS = 40

Guess = tuple[str, float]
"""A class and its probability."""


@dataclass(frozen=True)
class WrongVideo:
    """A test video that a run gets wrong.

    Attributes:
        example: Path and pictures of the video.
        label: The true class.
        label_probability: Probability of the true class, None if the video was unreadable.
        guesses: The classes with the highest probabilities.
        problem: Reason why the video was unreadable, "" if it was read.
    """

    example: Example
    label: str
    label_probability: float | None
    guesses: Sequence[Guess]
    problem: str


@dataclass(frozen=True)
class Mistakes:
    """The mistakes of one run.

    Attributes:
        run: The run.
        num_wrong: Number of its wrong test videos, unreadable ones included.
        num_videos: Number of its test videos.
        matrix: Its confusion matrix, None with too many classes.
        confusions: Its most frequent confusions, None if no class is confused with another.
        shown: The wrong videos on the page, the highest probability of a wrong class first.
    """

    run: Run
    num_wrong: int
    num_videos: int
    matrix: Matrix | None
    confusions: Table | None
    shown: Sequence[WrongVideo]


@dataclass(frozen=True)
class ChangedVideo:
    """A video that only one of two runs gets right; a guess is [] if the video was unreadable."""

    example: Example
    label: str
    base_guess: Sequence[Guess]
    guess: Sequence[Guess]


@dataclass(frozen=True)
class ClassChanges:
    """The classes that differ most between a run and its base, with videos that changed."""

    run: Run
    base: Run
    table: Table
    improved: Sequence[ChangedVideo]
    harmed: Sequence[ChangedVideo]


def find_mistakes(runs: Sequence[Run], videos: ExampleVideos, count: int) -> list[Mistakes]:
    """Describe the mistakes of the first MAX_RUNS evaluated runs.

    Args:
        runs: All runs.
        videos: Reader of pictures.
        count: Number of wrong videos to show per run.
    """
    tested = [(run, run.predictions) for run in runs if run.predictions is not None]
    return [_mistakes(run, predictions, videos, count) for run, predictions in tested[:MAX_RUNS]]


def _mistakes(run: Run, predictions: Predictions, videos: ExampleVideos, count: int) -> Mistakes:
    counts, probs, wrong = (
        confusion_counts(predictions),
        probabilities(predictions),
        wrong_videos(predictions),
    )
    return Mistakes(
        run,
        len(wrong),
        len(predictions.videos),
        draw_matrix(counts, predictions.classes),
        frequent_confusions(counts, predictions.classes),
        [_wrong_video(run, predictions, video, probs[video], videos) for video in wrong[:count]],
    )


def wrong_videos(predictions: Predictions) -> list[int]:
    """Return the wrong test videos, the highest probability of a wrong class first.

    Unreadable ones, which count as wrong, come last.
    """
    wrong = np.flatnonzero(video_values(predictions.clip_scores, predictions.labels)["top1"] == 0)
    confidence = np.nan_to_num(probabilities(predictions).max(axis=1), nan=-1.0)
    return wrong[np.argsort(-confidence[wrong], kind="stable")].tolist()


def _wrong_video(
    run: Run, predictions: Predictions, video: int, probs: np.ndarray, videos: ExampleVideos
) -> WrongVideo:
    """Describe a wrong video with the probabilities of the classes [K]."""
    label, guesses = int(predictions.labels[video]), _guesses(predictions, probs, GUESSES)
    return WrongVideo(
        example=videos.example(run, predictions, video),
        label=predictions.classes[label],
        label_probability=float(probs[label]) if guesses else None,
        guesses=guesses,
        problem="" if guesses else predictions.reasons[video],
    )


def _guesses(predictions: Predictions, probs: np.ndarray, count: int) -> list[Guess]:
    """Return the `count` best classes of a video [K] with probabilities, [] if it is unreadable."""
    return best_classes(probs, predictions.classes, count) if np.isfinite(probs).all() else []


def wrong_video_rows(runs: Sequence[Run]) -> Table:
    """Tabulate every wrong test video of every evaluated run, for a CSV."""
    titles = (
        "run",
        "video",
        "label",
        "predicted",
        "probability",
        "probability_of_label",
        "problem",
    )
    table = Table("wrong test videos", columns(*titles))
    for run in runs:
        predictions = run.predictions
        if predictions is None:
            continue
        probs, guesses = probabilities(predictions), predicted_classes(predictions)
        for video in wrong_videos(predictions):
            label, guess = int(predictions.labels[video]), int(guesses[video])
            numbers = (probs[video, guess], probs[video, label]) if guess >= 0 else ()
            table.add(
                *(run.name, escape_path(predictions.videos[video]), predictions.classes[label]),
                predictions.classes[guess] if guess >= 0 else "",
                *([f"{value:.6g}" for value in numbers] or ["", ""]),
                "" if guess >= 0 else predictions.reasons[video],
            )
    return table


def find_changes(pairs: Sequence[Pair], videos: ExampleVideos) -> list[ClassChanges]:
    """Describe the classes that change between the runs of a pair, for at most MAX_PAIRS pairs."""
    changes = (_changes(run, base, videos) for run, base in pairs[:MAX_PAIRS])
    return [change for change in changes if change is not None]


def _changes(run: Run, base: Run, videos: ExampleVideos) -> ClassChanges | None:
    predictions, base_predictions = run.predictions, base.predictions
    if predictions is None or base_predictions is None:
        return None
    try:
        order = np.array(matching_rows(predictions, base_predictions, run.name, base.name))
    except DistInitError:
        return None
    after = video_values(predictions.clip_scores, predictions.labels)["top1"]
    before = video_values(base_predictions.clip_scores, base_predictions.labels)["top1"][order]
    changes = np.bincount(predictions.labels, after - before, len(predictions.classes))
    improved, harmed = (
        [
            int(label)
            for label in np.argsort(-sign * changes, kind="stable")[:CLASSES]
            if sign * changes[label] > 0
        ]
        for sign in (1, -1)
    )
    if not improved and not harmed:
        return None
    table = _class_table(run, base, predictions, (improved, harmed), before, after)
    probs, base_probs = probabilities(predictions), probabilities(base_predictions)[order]

    def examples(classes: Sequence[int], sign: int) -> list[ChangedVideo]:
        changed = [
            np.flatnonzero((after - before == sign) & (predictions.labels == label))[
                :EXAMPLES_PER_CLASS
            ]
            for label in classes[:EXAMPLE_CLASSES]
        ]
        return [
            ChangedVideo(
                # The run that gets the video right has read it.
                videos.example(run, predictions, video)
                if sign > 0
                else videos.example(base, base_predictions, int(order[video])),
                predictions.classes[int(predictions.labels[video])],
                _guesses(base_predictions, base_probs[video], 1),
                _guesses(predictions, probs[video], 1),
            )
            for video in (int(video) for each in changed for video in each)
        ]

    return ClassChanges(run, base, table, examples(improved, 1), examples(harmed, -1))


def _class_table(
    run: Run,
    base: Run,
    predictions: Predictions,
    groups: tuple[Sequence[int], Sequence[int]],
    before: np.ndarray,
    after: np.ndarray,
) -> Table:
    """Tabulate the most improved and most harmed classes.

    Args:
        run: The run.
        base: The run that it is compared with.
        predictions: Predictions of the run.
        groups: The most improved classes, and the most harmed ones.
        before: Whether `base` gets each video right [V].
        after: Whether `run` does [V].
    """
    names = (f">right, {base.name}", f">right, {run.name}")
    table = Table("Classes that change most", columns("class", ">test videos", *names, ">change"))
    for title, classes in zip(("Most improved", "Most harmed"), groups, strict=True):
        if classes:
            table.head(title)
        for label in classes:
            in_class = predictions.labels == label
            numbers = [int(in_class.sum()), int(before[in_class].sum()), int(after[in_class].sum())]
            change = f"{numbers[2] - numbers[1]:+d}".replace("-", "−")
            table.add(predictions.classes[label], *map(str, numbers), change)
    return table
