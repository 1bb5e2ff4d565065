"""What finetuned runs get wrong: their confusions, wrong test videos, and what changes with a run.

Every number is computed from the predictions; pictures are read where the videos can be opened.
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

GUESSES = 3  # classes named for a video
CLASSES = 5  # in the tables of the most improved and of the most harmed classes
EXAMPLES_PER_CLASS = 2
EXAMPLE_CLASSES = 3  # that have examples, of the most improved and of the most harmed
MAX_RUNS = 60  # with their mistakes on the page
MAX_PAIRS = 40

Guess = tuple[str, float]
"""A class and its probability."""


@dataclass(frozen=True)
class WrongVideo:
    """A test video that a run gets wrong.

    Attributes:
        example: Its path and pictures.
        label: Its true class.
        of_label: Probability of the true class, None if the video was unreadable.
        guesses: The classes with the highest probabilities.
        problem: Why it was unreadable, "" if it was read.
    """

    example: Example
    label: str
    of_label: float | None
    guesses: Sequence[Guess]
    problem: str


@dataclass(frozen=True)
class Mistakes:
    """The mistakes of one run: `num_wrong` of `num_videos` test videos.

    Attributes:
        run: The run.
        num_wrong: Number of its wrong test videos, unreadable ones included.
        num_videos: Number of its test videos.
        matrix: Its confusion matrix, None with too many classes.
        confusions: Its most frequent confusions, None if no video is confused.
        shown: Some wrong videos, those with the highest probability of a wrong class first.
    """

    run: Run
    num_wrong: int
    num_videos: int
    matrix: Matrix | None
    confusions: Table | None
    shown: Sequence[WrongVideo]


@dataclass(frozen=True)
class ChangedVideo:
    """A video that one of two runs gets right, and the best class of each; [] if unreadable."""

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
    """Describe the mistakes of the evaluated runs, the first MAX_RUNS.

    Args:
        runs: All runs.
        videos: Reader of pictures.
        count: Wrong videos to show per run.
    """
    tested = [(run, run.predictions) for run in runs if run.predictions is not None]
    return [_mistakes(run, found, videos, count) for run, found in tested[:MAX_RUNS]]


def _mistakes(run: Run, found: Predictions, videos: ExampleVideos, count: int) -> Mistakes:
    counts, odds, wrong = confusion_counts(found), probabilities(found), wrong_videos(found)
    return Mistakes(
        run,
        len(wrong),
        len(found.videos),
        draw_matrix(counts, found.classes),
        frequent_confusions(counts, found.classes),
        [_wrong_video(run, found, video, odds[video], videos) for video in wrong[:count]],
    )


def wrong_videos(found: Predictions) -> list[int]:
    """Return the wrong test videos, the highest probability of a wrong class first.

    Unreadable ones, which count as wrong, come last.
    """
    wrong = np.flatnonzero(video_values(found.clip_scores, found.labels)["top1"] == 0)
    confidence = np.nan_to_num(probabilities(found).max(axis=1), nan=-1.0)
    return wrong[np.argsort(-confidence[wrong], kind="stable")].tolist()


def _wrong_video(
    run: Run, found: Predictions, video: int, odds: np.ndarray, videos: ExampleVideos
) -> WrongVideo:
    """Describe a wrong video; odds: the probabilities of its classes [K]."""
    label, guesses = int(found.labels[video]), _guesses(found, odds, GUESSES)
    return WrongVideo(
        example=videos.example(run, found, video),
        label=found.classes[label],
        of_label=float(odds[label]) if guesses else None,
        guesses=guesses,
        problem="" if guesses else found.reasons[video],
    )


def _guesses(found: Predictions, odds: np.ndarray, count: int) -> list[Guess]:
    """Return the `count` best classes of a video [K] with probabilities, [] if it is unreadable."""
    return best_classes(odds, found.classes, count) if np.isfinite(odds).all() else []


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
        found = run.predictions
        if found is None:
            continue
        odds, guesses = probabilities(found), predicted_classes(found)
        for video in wrong_videos(found):
            label, guess = int(found.labels[video]), int(guesses[video])
            numbers = (odds[video, guess], odds[video, label]) if guess >= 0 else ()
            table.add(
                *(run.name, escape_path(found.videos[video]), found.classes[label]),
                found.classes[guess] if guess >= 0 else "",
                *([f"{value:.6g}" for value in numbers] or ["", ""]),
                "" if guess >= 0 else found.reasons[video],
            )
    return table


def find_changes(pairs: Sequence[Pair], videos: ExampleVideos) -> list[ClassChanges]:
    """Describe how the classes of each run differ from those of its base, the first MAX_PAIRS."""
    found = (_changes(run, base, videos) for run, base in pairs[:MAX_PAIRS])
    return [each for each in found if each is not None]


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
            int(at)
            for at in np.argsort(-sign * changes, kind="stable")[:CLASSES]
            if sign * changes[at] > 0
        ]
        for sign in (1, -1)
    )
    if not improved and not harmed:
        return None
    table = _class_table(run, base, predictions, (improved, harmed), before, after)
    odds, base_odds = probabilities(predictions), probabilities(base_predictions)[order]

    def examples(classes: Sequence[int], sign: int) -> list[ChangedVideo]:
        changed = [
            np.flatnonzero((after - before == sign) & (predictions.labels == at))[
                :EXAMPLES_PER_CLASS
            ]
            for at in classes[:EXAMPLE_CLASSES]
        ]
        return [
            ChangedVideo(
                # The run that gets it right has read it.
                videos.example(run, predictions, video)
                if sign > 0
                else videos.example(base, base_predictions, int(order[video])),
                predictions.classes[int(predictions.labels[video])],
                _guesses(base_predictions, base_odds[video], 1),
                _guesses(predictions, odds[video], 1),
            )
            for video in (int(video) for each in changed for video in each)
        ]

    return ClassChanges(run, base, table, examples(improved, 1), examples(harmed, -1))


def _class_table(
    run: Run,
    base: Run,
    found: Predictions,
    chosen: tuple[Sequence[int], Sequence[int]],
    before: np.ndarray,
    after: np.ndarray,
) -> Table:
    """Tabulate the chosen classes, improved and harmed; before, after: right videos [V]."""
    names = (f">right, {base.name}", f">right, {run.name}")
    table = Table("Classes that change most", columns("class", ">test videos", *names, ">change"))
    for title, classes in zip(("Most improved", "Most harmed"), chosen, strict=True):
        if classes:
            table.head(title)
        for at in classes:
            mine = found.labels == at
            numbers = [int(mine.sum()), int(before[mine].sum()), int(after[mine].sum())]
            change = f"{numbers[2] - numbers[1]:+d}".replace("-", "−")
            table.add(found.classes[at], *map(str, numbers), change)
    return table
