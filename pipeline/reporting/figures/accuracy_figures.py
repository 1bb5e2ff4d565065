"""Figures of accuracies and differences, and of the gain of each class (Figure 7)."""

from __future__ import annotations

from collections.abc import Sequence

from ...evaluation.ensemble import Comparison
from ...evaluation.metrics import Estimate
from ..accuracy_tables import Difference
from ..runs import Run
from .canvas import INK, Figure, colour, finish, new_canvas, short

CLASS_GAINS = "figure-7-classes"
# Classes with the largest gains, and as many with the largest losses.
CLASSES = 12
Row = tuple[str, float, float, float]
"""Name, value, and both ends of its interval."""


def accuracies(runs: Sequence[Run]) -> Figure | None:
    """Draw top 1 of each evaluated run with its interval."""
    rows = [estimate_row(run.name, Estimate(**run.metrics["top1"])) for run in runs if run.metrics]
    if not rows:
        return None
    return _whiskers(
        rows, "accuracy", "Top 1 of each run", "top 1 accuracy, %", None,
        "The dot is the run’s top 1, the line its 95 % bootstrap interval over the test videos. If intervals overlap, "
        "look at the paired differences: their intervals are narrower.",
    )  # fmt: skip


def paired(differences: Sequence[Difference]) -> Figure | None:
    """Draw the paired differences between runs."""
    rows = [
        estimate_row(f"{difference.run.name} − {difference.base.name}", difference.estimate)
        for difference in differences
    ]
    return gains(rows, "differences", "Paired differences", "difference in top 1, points")


def estimate_row(name: str, estimate: Estimate) -> Row:
    """Return the row of an estimate, in percentage points."""
    return name, 100 * estimate.value, 100 * estimate.low, 100 * estimate.high


def gains(rows: Sequence[Row], name: str, title: str, axis: str) -> Figure | None:
    """Draw differences in points around the line of no difference."""
    if not rows:
        return None
    return _whiskers(
        rows, name, title, axis, 0.0,
        "Differences on the same test videos, paired, with 95 % intervals. A line that crosses zero does not show "
        "which is better.",
    )  # fmt: skip


def _whiskers(
    rows: Sequence[Row], name: str, title: str, axis: str, zero: float | None, caption: str
) -> Figure:
    canvas, (ax,) = new_canvas(8, 0.9 + 0.32 * len(rows))
    for i, (_, value, low, high) in enumerate(rows):
        # With few videos, the interval may not contain the mean.
        below, above = max(0.0, value - low), max(0.0, high - value)
        ax.errorbar(
            value, i, xerr=[[below], [above]], fmt="o", color=colour(i), capsize=3, lw=1.8, ms=6
        )
    ax.set_yticks(range(len(rows)), [short(row[0]) for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(axis)
    if zero is not None:
        ax.axvline(zero, color=INK, lw=1.2)
    return finish(canvas, name, title, caption, [row[0] for row in rows])


def class_gains(comparison: Comparison, a: Run, b: Run) -> Figure | None:
    """Draw Figure 7: the classes in which A is better or worse than B."""
    changed = [
        (name, gain) for name, gain in comparison.classes.items() if gain.estimate.value != 0
    ]
    if not changed:
        return None
    improved = [item for item in changed if item[1].estimate.value > 0][:CLASSES]
    harmed = [item for item in changed if item[1].estimate.value < 0][-CLASSES:]
    rows = improved + harmed
    canvas, (ax,) = new_canvas(8, 1.0 + 0.27 * len(rows))
    for i, (_, gain) in enumerate(rows):
        estimate = gain.estimate
        gained = estimate.value > 0
        ax.barh(i, 100 * estimate.value, color=colour(0 if gained else 1), height=0.66)
        ax.plot([100 * estimate.low, 100 * estimate.high], [i, i], color=INK, lw=0.9)
    labels = [f"{short(name, 30)} ({comparison.videos[name]})" for name, _ in rows]
    ax.set_yticks(range(len(rows)), labels)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.axvline(0, color=INK, lw=1)
    ax.set_xlabel("gain in top 1, points")
    num_unchanged = len(comparison.classes) - len(changed)
    caption = (
        f"Top 1 of {a.name} minus that of {b.name}, by class, with the number of its test videos; thin lines are 95 % "
        f"intervals, not corrected for the number of classes. Shown are the largest gains and losses, at most "
        f"{CLASSES} each; {num_unchanged} of {len(comparison.classes)} classes do not differ."
    )
    return finish(canvas, CLASS_GAINS, "Figure 7: which classes gain", caption, [a.name, b.name])
