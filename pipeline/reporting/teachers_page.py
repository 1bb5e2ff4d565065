"""Teachers of a store side by side: tables for a terminal, and a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.errors import StoreMismatchError, VideoError
from ..common.numerics import best_classes, softmax
from ..common.tables import Table, columns
from ..evaluation.teacher_comparison import TeacherComparison
from ..store.reader import TargetStore
from .html_page import render
from .store_page import FrameReader

LABELS = 3
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class DisputedVideo:
    """A video on which teachers disagree.

    Attributes:
        corpus: Name of its corpus.
        path: Path of the video.
        disagreement: Mean disagreement of the teachers, from 0 to 1.
        labels: Teacher → best classes of its mean logits with their probabilities.
        picture: Data URL of the middle cached frame, None if it was not read.
        problem: Reason why it could not be read, None without one.
    """

    corpus: str
    path: str
    disagreement: float
    labels: Mapping[str, Sequence[tuple[str, float]]]
    picture: str | None = None
    problem: str | None = None

    def describe_labels(self) -> str:
        """Return the best classes of each teacher as text."""
        return "; ".join(
            f"{name}: " + ", ".join(f"{label} {100 * share:.0f} %" for label, share in best)
            for name, best in self.labels.items()
        )


def disputed_videos(
    store: TargetStore,
    comparison: TeacherComparison,
    count: int,
    video_roots: Mapping[str, str] | None = None,
) -> list[DisputedVideo]:
    """Return the videos on which teachers disagree most.

    Args:
        store: The store.
        comparison: The comparison of its teachers.
        count: Number of videos.
        video_roots: Corpus → its folder now; None reads no pictures.
    """
    reader = None if video_roots is None else FrameReader(store, video_roots)
    videos = []
    for position, disagreement in comparison.most_disputed(count):
        video = int(comparison.videos[position])
        labels = {
            view.name: best_classes(
                softmax(view.means[position].astype(np.float64)), view.classes, LABELS
            )
            for view in comparison.teachers
            if view.classes
        }
        picture = problem = None
        if reader is not None:
            index, pts, _ = store.frames(video)
            middle = slice(len(index) // 2, len(index) // 2 + 1)
            try:
                (picture,) = reader.read(video, index[middle], pts[middle])
            except (VideoError, StoreMismatchError, OSError) as error:
                problem = str(error)
        videos.append(DisputedVideo(*store.place(video), disagreement, labels, picture, problem))
    return videos


def teachers_table(comparison: TeacherComparison) -> Table:
    """Tabulate the confidence of each teacher: 1 − entropy / ln K, comparable between all K."""
    table = Table(
        f"Confidence over {len(comparison.rows):,} frames",
        columns("teacher", "output", ">width", ">confidence, median", ">5 to 95 %"),
        notes=[
            "Confidence is 1 − entropy / ln K: 1 if a teacher is certain of one of K classes, 0 if it "
            "gives all the same probability."
        ],
    )
    for view in comparison.teachers:
        low = middle = high = "–"
        if view.confidence is not None:
            low, middle, high = (
                f"{value:.2f}" for value in np.quantile(view.confidence, QUANTILES)
            )
        spread = f"{low} to {high}" if view.confidence is not None else "–"
        table.add(view.name, view.output, f"{view.outputs.shape[1]:,}", middle, spread)
    return table


def pairs_table(comparison: TeacherComparison) -> Table:
    """Tabulate the measures of every pair."""
    table = Table(
        "Pairs of teachers",
        columns(
            "teachers",
            ">same best class, %",
            ">linear CKA",
            ">common neighbours (by chance), %",
            ">correlation of entropies",
            ">first more confident, %",
        ),
        notes=[
            "Linear CKA: 1 if a rotation and a factor make the outputs equal, 0 if they are unrelated.",
            "Common neighbours: share of a frame's nearest frames of other videos (by cosine) that "
            "both teachers have in common.",
        ],
    )
    for pair in comparison.pairs:
        table.add(
            f"{pair.first}, {pair.second}",
            _percent(pair.agreement),
            f"{pair.cka:.2f}",
            f"{_percent(pair.neighbours)} ({_percent(pair.neighbours_by_chance)})",
            "–" if pair.entropy_correlation is None else f"{pair.entropy_correlation:.2f}",
            _percent(pair.first_more_confident),
        )
    return table


def disputed_table(videos: Sequence[DisputedVideo]) -> Table:
    """Tabulate the videos on which teachers disagree most."""
    table = Table(
        "Videos on which the teachers disagree most",
        columns("video", ">disagreement, %", "best classes"),
    )
    for video in videos:
        table.add(
            f"{video.corpus}: {video.path}", _percent(video.disagreement), video.describe_labels()
        )
    return table


def teachers_page(
    store: TargetStore,
    comparison: TeacherComparison,
    videos: Sequence[DisputedVideo],
    version: str,
) -> str:
    """Return the page as HTML."""
    return render(
        "teachers.html.j2",
        title="Teachers side by side",
        version=version,
        store=store,
        num_frames=len(comparison.rows),
        num_videos=len(comparison.videos),
        teachers=teachers_table(comparison),
        pairs=pairs_table(comparison),
        videos=videos,
    )


def as_dict(comparison: TeacherComparison, videos: Sequence[DisputedVideo]) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "frames": len(comparison.rows),
        "videos": len(comparison.videos),
        "teachers": [
            {
                "name": view.name,
                "output": view.output,
                "width": view.outputs.shape[1],
                "confidence": None
                if view.confidence is None
                else {
                    f"q{round(100 * q):02d}": float(np.quantile(view.confidence, q))
                    for q in QUANTILES
                },
            }
            for view in comparison.teachers
        ],
        "pairs": [
            {key: value for key, value in vars(pair).items() if key != "disagreement"}
            | {"mean_disagreement": float(pair.disagreement.mean())}
            for pair in comparison.pairs
        ],
        "disputed": [
            {
                "corpus": video.corpus,
                "path": video.path,
                "disagreement": video.disagreement,
                "labels": {name: list(map(list, best)) for name, best in video.labels.items()},
            }
            for video in videos
        ],
    }


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
