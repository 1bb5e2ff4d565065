"""The summary of a store as one self-contained HTML page without scripts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.tables import Table, columns
from ..store.stats import Failure, TeacherStats
from .charts import entropy_curves, entropy_histogram
from .html_page import render
from .store_summary import StoreSummary, TeacherSummary

FREQUENT = 10  # classes in the table of frequencies
LISTED = 1000  # failed videos in their table
REASONS = 20  # reasons of failures in their table


def store_page(summary: StoreSummary, version: str) -> str:
    """Return the page as HTML."""
    store = summary.store
    classes = [len(teacher.teacher_stats.classes) for teacher in summary.teachers]
    # One scale for all videos, so that their curves compare.
    highest = max(map(math.log, classes), default=1.0)
    return render(
        "store.html.j2",
        title="Summary of a target store",
        version=version,
        store=store,
        states=", ".join(f"{n:,} {name}" for name, n in summary.states.items() if n),
        videos=[
            (video, entropy_curves(video.curves, highest, legend=len(classes) > 1))
            for video in summary.videos
        ],
        num_missing=sum(video.problem is not None for video in summary.videos),
        teachers=[_teacher(teacher) for teacher in summary.teachers],
        features=[store.teacher(name) for name in store.teachers_of("features")],
        failures=_failures(summary.failures) if summary.failures else None,
        identity=json.dumps(store.identity(), indent=1, ensure_ascii=False),
    )


def _teacher(teacher: TeacherSummary) -> dict[str, Any]:
    """Return the values of a teacher for the template; `caption` is None if it has no rows."""
    stats = teacher.teacher_stats
    shown: dict[str, Any] = {
        "name": stats.teacher,
        "num_classes": len(stats.classes),
        "caption": None,
    }
    if not len(stats.rows):
        return shown
    counts, edges = stats.histogram()
    return {
        **shown,
        "caption": _caption(stats, float(edges[-1])),
        "histogram": entropy_histogram(counts, edges),
        "frequent": _frequent_classes(stats),
        "lowest_entropy": teacher.lowest_entropy,
        "highest_entropy": teacher.highest_entropy,
    }


def _caption(stats: TeacherStats, highest: float) -> str:
    quantiles = stats.quantiles()
    part = (
        ""
        if len(stats.rows) == stats.total
        else f" of {len(stats.rows):,} frames spread over the store,"
    )
    return (
        f"Confidence of the teacher: entropies{part} from 0 to ln {len(stats.classes):,} = {highest:.2f} nats. Median "
        f"{quantiles[0.5]:.2f}; 5 to 95 %: {quantiles[0.05]:.2f} to {quantiles[0.95]:.2f}. The filter max_entropy "
        "keeps the frames to its left."
    )


def _frequent_classes(stats: TeacherStats) -> Table:
    table = Table("Most frequent best class", columns("class", ">share of frames, %"))
    for label, share in stats.most_frequent(FREQUENT):
        table.add(label, f"{100 * share:.1f}")
    distinct = len(np.unique(stats.top))
    table.notes = [
        f"{distinct:,} of {len(stats.classes):,} classes are the best one of at least one frame."
    ]
    return table


def _failures(failures: Sequence[Failure]) -> tuple[Table, Table]:
    """Return a table of reasons and one of videos."""
    reasons = Table("Reasons", columns("reason", ">videos"))
    for reason, count in Counter(failure.reason for failure in failures).most_common(REASONS):
        reasons.add(reason, f"{count:,}")
    each = Table("Videos that failed", columns("corpus", "video", "reason"))
    for failure in failures[:LISTED]:
        each.add(failure.corpus, failure.path, failure.reason)
    if len(failures) > LISTED:
        each.notes = [
            f"{len(failures) - LISTED:,} more: distinit targets info STORE --failed --json lists all."
        ]
    return reasons, each
