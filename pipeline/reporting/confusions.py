"""Confusion matrices of finetuned runs: counts, the most frequent confusions, and a drawing.

Shapes: V test videos, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.tables import Table, columns
from ..evaluation.predictions import Predictions
from .charts import COLOURS
from .figures.canvas import short

RIGHT, WRONG = COLOURS[0], COLOURS[1]
# Levels of colour: few, so that all squares of a level are one path.
LEVELS = 6
MAX_CONFUSIONS = 10
# Characters of a class name.
MAX_LABEL = 28
# Largest number of classes, side of a square and size of its text in pixels.
SIZES = ((12, 36, 13), (32, 24, 11), (math.inf, 10, 8))
# With more classes, squares are too small for numbers.
MAX_COUNTED = 32
# With more classes, squares are too small to be seen on a page.
MAX_DRAWN = 400


@dataclass(frozen=True)
class Squares:
    """The squares of one colour: `path` is the `d` of an SVG path, opacity is from 0 to 1."""

    colour: str
    opacity: float
    path: str


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix in pixels: a row per true class, a column per prediction.

    Attributes:
        width: Width of the drawing.
        height: Height of the drawing.
        left: Left edge of the squares.
        top: Upper edge of the squares.
        side: Side of a square.
        font: Size of the class names.
        rows: Names of the rows.
        columns: Names of the columns.
        squares: The squares with at least one video, grouped by colour.
        counts: Position (x, y) and text of each number, and whether it is white.
    """

    width: int
    height: int
    left: int
    top: int
    side: int
    font: int
    rows: Sequence[str]
    columns: Sequence[str]
    squares: Sequence[Squares]
    counts: Sequence[tuple[float, float, str, bool]]


def predicted_classes(predictions: Predictions) -> NDArray[np.int64]:
    """Return the best class of each video [V], −1 where the video is unreadable."""
    scores = predictions.video_scores
    finite = np.isfinite(scores).all(axis=1)
    return np.where(finite, np.where(finite[:, None], scores, 0).argmax(axis=1), -1)


def confusion_counts(predictions: Predictions) -> NDArray[np.int64]:
    """Count videos by true and predicted class, [K, K + 1]; the last column is unreadable videos.

    Among classes of equal score the one with the lowest index is predicted, as in top 1. The
    diagonal's share of all videos therefore equals top 1.
    """
    num_classes = len(predictions.classes)
    counts = np.zeros((num_classes, num_classes + 1), np.int64)
    np.add.at(counts, (predictions.labels, predicted_classes(predictions)), 1)
    return counts


def frequent_confusions(counts: NDArray[np.int64], classes: Sequence[str]) -> Table | None:
    """Tabulate the most frequent confusions, or return None without a wrong video.

    Args:
        counts: Result of `confusion_counts`, [K, K + 1].
        classes: Names of the K classes.
    """
    wrong = counts[:, :-1].copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")
    pairs = [divmod(int(index), len(classes)) for index in order[: (wrong > 0).sum()]]
    if not pairs:
        return None
    titles = ("true class", "predicted", ">videos", ">share of the class, %")
    table = Table("Most frequent confusions", columns(*titles))
    for label, guess in pairs[:MAX_CONFUSIONS]:
        share = wrong[label, guess] / counts[label].sum()
        table.add(
            classes[label], classes[guess], str(int(wrong[label, guess])), f"{100 * share:.0f}"
        )
    if len(pairs) > MAX_CONFUSIONS:
        table.notes = [f"{len(pairs) - MAX_CONFUSIONS} more pairs of classes are confused."]
    return table


def draw_matrix(counts: NDArray[np.int64], classes: Sequence[str]) -> Matrix | None:
    """Place the squares of a confusion matrix; return None with more than MAX_DRAWN classes.

    The larger a square's share of the videos of the true class, the darker it is.

    Args:
        counts: Result of `confusion_counts`, [K, K + 1].
        classes: Names of the K classes.
    """
    if len(classes) > MAX_DRAWN:
        return None
    rows = [short(name, MAX_LABEL) for name in classes]
    columns = rows + ["unreadable"] * bool(counts[:, -1].any())
    _, side, font = next(size for size in SIZES if len(classes) <= size[0])
    longest = max(map(len, columns)) * 0.62 * font
    left, top = round(longest + 10), round(longest * 0.87 + 10)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    levels = np.ceil(shares * LEVELS).astype(int)
    paths: dict[tuple[bool, int], str] = {}
    numbers: list[tuple[float, float, str, bool]] = []
    for row, column in np.argwhere(counts[:, : len(columns)] > 0).tolist():
        key = (row == column, int(levels[row, column]))
        x, y = left + column * side, top + row * side
        paths[key] = paths.get(key, "") + f"M{x} {y}h{side - 1}v{side - 1}h{1 - side}z"
        if len(classes) <= MAX_COUNTED:
            text = str(int(counts[row, column]))
            centre = (side - 1) / 2
            numbers.append((x + centre, y + centre + font * 0.36, text, 2 * key[1] > LEVELS))
    squares = [
        Squares(RIGHT if right else WRONG, round(0.1 + 0.9 * level / LEVELS, 2), path)
        for (right, level), path in sorted(paths.items())
    ]
    width = left + side * len(columns) + round(longest * 0.5) + 6
    return Matrix(
        width, top + side * len(rows) + 4, left, top, side, font, rows, columns, squares, numbers
    )  # fmt: skip
