"""The page of a target store: sampled videos, predictions and entropies of the teachers, failures.

The page is one HTML file without scripts that contains its pictures.

Shapes: N cached frames of a video, F pictures of it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import StoreMismatchError, VideoError
from ..common.numerics import best_classes, softmax
from ..common.tables import Table, columns
from ..prepared.copies import read_copy
from ..prepared.folders import PreparedCorpus, prepared_corpora
from ..store.index import OK, STATUS
from ..store.reader import TargetStore
from ..store.stats import Failure, TeacherStats, failures, teacher_stats
from ..video.frames import read_frames
from ..video.geometry import View
from .charts import Line, entropy_curves, entropy_histogram
from .html_page import jpeg_url, render

# Classes in the table of frequencies.
FREQUENT = 10
# Videos and reasons in the tables of failures.
LISTED = 1000
REASONS = 20
# Pictures of a sampled video.
STRIP = 8
# Most confident and least confident frames of a teacher, one per video.
EXTREMES = 8
# Best classes named under a picture.
LABELS = 3
# Short side of a picture in pixels.
HEIGHT = 96
QUALITY = 80
Frames = tuple[NDArray[Any], ...]
"""Index, pts, row and seconds since the first frame, of each cached frame of a video [N]."""


@dataclass(frozen=True)
class Prediction:
    """A teacher's best classes for a frame with probabilities (τ = 1), and the entropy in nats."""

    labels: Sequence[tuple[str, float]]
    entropy: float


@dataclass(frozen=True)
class Picture:
    """A cached frame: `jpeg` as a data URL, None if it is unreadable; `predictions` by teacher."""

    video: str
    index: int
    seconds: float
    jpeg: str | None
    problem: str | None
    predictions: Mapping[str, Prediction]


@dataclass(frozen=True)
class VideoSummary:
    """One sampled video; `curves` has the entropies of each teacher in nats [N] by seconds [N]."""

    corpus: str
    path: str
    duration: float
    frames: int
    problem: str | None
    pictures: Sequence[Picture]
    curves: Sequence[Line]


@dataclass(frozen=True)
class TeacherSummary:
    """Statistics of a teacher, and its frames of lowest and highest entropy, one per video."""

    teacher_stats: TeacherStats
    lowest_entropy: Sequence[Picture]
    highest_entropy: Sequence[Picture]


@dataclass(frozen=True)
class StoreSummary:
    """The content of the page; `states` is the number of videos by status."""

    store: TargetStore
    states: Mapping[str, int]
    videos: Sequence[VideoSummary]
    teachers: Sequence[TeacherSummary]
    failures: Sequence[Failure]


class FrameReader:
    """Read small JPEGs of a store's videos, from originals or prepared copies.

    Attributes:
        teacher_states: Status of each video [V] by teacher.
    """

    def __init__(self, store: TargetStore, video_roots: Mapping[str, str]) -> None:
        self.store, self.video_roots = store, video_roots
        self.prepared: Mapping[str, PreparedCorpus] = prepared_corpora(video_roots)
        # Computed once, since each requires a pass over all segments.
        self.teacher_states = {
            name: store.index.teacher_state(name) for name in store.teachers_of("logits")
        }

    def read(self, video: int, index: NDArray[np.int64], pts: NDArray[np.int64]) -> list[str]:
        """Return each of the frames as the data URL of a JPEG.

        Args:
            video: Index of the video in the store.
            index: Frame indices [F].
            pts: Their pts [F].

        Raises:
            VideoError: The video is missing or unreadable.
            StoreMismatchError: The file is not the one that the teachers were run on.
        """
        store, view = self.store, View(resize=HEIGHT)
        corpus, _ = store.place(video)
        copies = self.prepared.get(corpus)
        if copies is None:
            path = store.video_path(video, self.video_roots)
            digest = store.digest(video)
            frames = read_frames(path, index, view, expect=(index, pts), digest=digest)
        elif copies.kind == "flow":
            raise VideoError(f"{copies.root} holds optical flow, no pictures")
        else:
            path = copies.path(store.video_path(video, {corpus: ""}))
            frames = read_copy(path, index, view, expect=(index, pts), digest=store.digest(video))
        return [jpeg_url(image, QUALITY) for image in frames.images]


def summarize_store(
    store: TargetStore, count: int, *, seed: int = 0, video_roots: Mapping[str, str] | None = None
) -> StoreSummary:
    """Sample videos of a store, and gather statistics of its teachers and failures.

    An unreadable video is shown with the reason instead of its pictures.

    Args:
        store: The store.
        count: Number of videos to sample among those with rows.
        seed: Seed of the sample.
        video_roots: Corpus → its folder now, or a folder of its prepared copies.

    Raises:
        StoreError: The store is damaged.
    """
    reader = FrameReader(store, video_roots or {})
    state = store.video_state
    usable = store.usable([])
    chosen = np.sort(np.random.default_rng(seed).permutation(usable)[:count])
    return StoreSummary(
        store=store,
        states={name: int((state == code).sum()) for code, name in STATUS.items()},
        videos=[_summarize_video(store, int(video), reader) for video in chosen],
        teachers=[_summarize_teacher(store, name, reader) for name in store.teachers_of("logits")],
        failures=list(failures(store)),
    )


def _summarize_video(store: TargetStore, video: int, reader: FrameReader) -> VideoSummary:
    record = store.video(video)
    frames = _, _, rows, seconds = _frames(store, video)
    names = [name for name, state in reader.teacher_states.items() if state[video] == OK]
    shown = np.unique(np.linspace(0, len(rows) - 1, STRIP).round().astype(np.int64))
    pictures = _pictures(reader, video, names, frames, shown)
    return VideoSummary(
        corpus=record.corpus,
        path=record.path,
        duration=record.duration,
        frames=len(rows),
        problem=pictures[0].problem,
        pictures=pictures,
        curves=[Line(name, seconds, store.entropy(name, rows)) for name in names],
    )


def _frames(store: TargetStore, video: int) -> Frames:
    """Return the cached frames of a video; without a clock, times are computed from indices."""
    record, (index, pts, rows) = store.video(video), store.frames(video)
    if record.time_base is not None and record.clock == "pts":
        seconds = (pts - pts[0]) * float(record.time_base)
    else:
        fps = record.fps if np.isfinite(record.fps) and record.fps > 0 else 1.0
        seconds = (index - index[0]) / fps
    return index, pts, rows, seconds


def _pictures(
    reader: FrameReader,
    video: int,
    teachers: Sequence[str],
    frames: Frames,
    shown: NDArray[np.int64],
) -> list[Picture]:
    """Read the cached frames of a video at the positions `shown` [F], in one pass."""
    index, pts, rows, seconds = (column[shown] for column in frames)
    store, problem = reader.store, None
    jpegs: Sequence[str | None] = [None] * len(rows)
    try:
        jpegs = reader.read(video, index, pts)
    except (VideoError, StoreMismatchError, OSError) as error:
        problem = str(error)
    predictions = {name: _predictions(store, name, rows) for name in teachers}
    _, path = store.place(video)
    return [
        Picture(
            path,
            int(index[i]),
            float(seconds[i]),
            jpegs[i],
            problem,
            {name: predictions[name][i] for name in teachers},
        )
        for i in range(len(rows))
    ]


def _predictions(store: TargetStore, teacher: str, rows: NDArray[np.int64]) -> list[Prediction]:
    probs = softmax(store.logits(teacher, rows).astype(np.float64))
    classes = store.teachers[teacher].classes
    return [
        Prediction(best_classes(frame_probs, classes, LABELS), float(entropy))
        for frame_probs, entropy in zip(probs, store.entropy(teacher, rows), strict=True)
    ]


def _summarize_teacher(store: TargetStore, name: str, reader: FrameReader) -> TeacherSummary:
    stats = teacher_stats(store, name)
    order = np.argsort(stats.entropy, kind="stable")
    order = order[np.isfinite(stats.entropy[order])]
    videos = store.read_table("video", stats.rows)
    ends = [
        _extremes(reader, name, stats.rows[positions], videos[positions])
        for positions in (order, order[::-1])
    ]
    return TeacherSummary(stats, *ends)


def _extremes(
    reader: FrameReader, name: str, rows: NDArray[np.int64], videos: NDArray[np.int64]
) -> list[Picture]:
    """Return the pictures of the first rows of EXTREMES videos, in the order of the rows.

    At most one row per video is shown, since neighbouring frames look alike.
    """
    _, first = np.unique(videos, return_index=True)
    pictures = []
    for position in np.sort(first)[:EXTREMES]:
        frames = _frames(reader.store, int(videos[position]))
        shown = np.flatnonzero(frames[2] == rows[position])
        pictures += _pictures(reader, int(videos[position]), [name], frames, shown)
    return pictures


def store_page(summary: StoreSummary, version: str) -> str:
    """Return the page as HTML."""
    store = summary.store
    classes = [len(teacher.teacher_stats.classes) for teacher in summary.teachers]
    # One scale for all videos, so that their curves can be compared.
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
    values: dict[str, Any] = {
        "name": stats.teacher,
        "num_classes": len(stats.classes),
        "caption": None,
    }
    if not len(stats.rows):
        return values
    counts, edges = stats.histogram()
    return {
        **values,
        "caption": _caption(stats, float(edges[-1])),
        "histogram": entropy_histogram(counts, edges),
        "frequent": _frequent_classes(stats),
        "lowest_entropy": teacher.lowest_entropy,
        "highest_entropy": teacher.highest_entropy,
    }


def _caption(stats: TeacherStats, highest: float) -> str:
    quantiles = stats.quantiles()
    sample = (
        ""
        if len(stats.rows) == stats.total
        else f" of {len(stats.rows):,} frames spread over the store,"
    )
    return (
        f"Confidence of the teacher: entropies{sample} from 0 to ln {len(stats.classes):,} = {highest:.2f} nats. "
        f"Median {quantiles[0.5]:.2f}; 5 to 95 %: {quantiles[0.05]:.2f} to {quantiles[0.95]:.2f}. The filter "
        "max_entropy keeps the frames to its left."
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
    """Return a table of reasons, and one of videos."""
    reasons = Table("Reasons", columns("reason", ">videos"))
    for reason, count in Counter(failure.reason for failure in failures).most_common(REASONS):
        reasons.add(reason, f"{count:,}")
    videos = Table("Videos that failed", columns("corpus", "video", "reason"))
    for failure in failures[:LISTED]:
        videos.add(failure.corpus, failure.path, failure.reason)
    if len(failures) > LISTED:
        videos.notes = [
            f"{len(failures) - LISTED:,} more: distinit targets info STORE --failed --json lists all."
        ]
    return reasons, videos
