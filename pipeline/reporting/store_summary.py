"""Summarize a target store: sampled videos, predictions and entropies of the teachers, failures.

`store_page` makes a page of it. Shapes: N cached frames of a video, F pictures of it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..common.errors import StoreMismatchError, VideoError
from ..common.numerics import softmax
from ..prepared.copies import read_copy
from ..prepared.folders import PreparedCorpus, prepared_corpora
from ..store.index import OK, STATUS
from ..store.reader import TargetStore, check_file
from ..store.stats import Failure, TeacherStats, failures, teacher_stats
from ..video.container import digest
from ..video.frames import read_frames
from ..video.geometry import View

STRIP = 8  # pictures of a sampled video
EXTREMES = 8  # most and least confident frames of a teacher, one per video
LABELS = 3  # best classes named under a picture
HEIGHT = 96  # short side of a picture, in pixels
QUALITY = 80


@dataclass(frozen=True)
class Prediction:
    """The best classes of a teacher for a frame with their probabilities (τ = 1), and the entropy.

    The entropy is in nats.
    """

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
    """One sampled video. curves: teacher → (seconds [N], entropy in nats [N])."""

    corpus: str
    path: str
    duration: float
    frames: int
    problem: str | None
    pictures: Sequence[Picture]
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float32]]]


@dataclass(frozen=True)
class TeacherSummary:
    """A teacher over the whole store, with frames of lowest and highest entropy, one per video."""

    teacher_stats: TeacherStats
    lowest_entropy: Sequence[Picture]
    highest_entropy: Sequence[Picture]


@dataclass(frozen=True)
class StoreSummary:
    """The content of the page; `states` has the number of videos by status."""

    store: TargetStore
    states: Mapping[str, int]
    videos: Sequence[VideoSummary]
    teachers: Sequence[TeacherSummary]
    failures: Sequence[Failure]


class FrameReader:
    """Read small JPEGs of a store's videos, from originals or copies, as a training reads them.

    Attributes:
        teacher_states: Status of each video [V] by teacher.
    """

    def __init__(self, store: TargetStore, video_roots: Mapping[str, str]) -> None:
        self.store, self.video_roots = store, video_roots
        self.prepared: Mapping[str, PreparedCorpus] = prepared_corpora(video_roots)
        # Computed once, since each is a pass over all segments.
        self.teacher_states = {
            name: store.index.teacher_state(name) for name in store.teachers_of("logits")
        }

    def read(self, video: int, index: NDArray[np.int64], pts: NDArray[np.int64]) -> list[str]:
        """Return a data URL for each of the frames with index [F] and pts [F].

        Raises:
            VideoError: The video is missing or unreadable.
            StoreMismatchError: The file is not the one that the teachers saw.
        """
        store, view = self.store, View(resize=HEIGHT)
        corpus, _ = store.place(video)
        copies = self.prepared.get(corpus)
        if copies is None:
            path = store.video_path(video, self.video_roots)
            check_file(store, video, path, digest(path))
            found = read_frames(path, index, view, expect=(index, pts))
        elif copies.kind == "flow":
            raise VideoError(f"{copies.root} holds optical flow, no pictures")
        else:
            path = copies.path(store.video_path(video, {corpus: ""}))
            found = read_copy(path, index, view, expect=(index, pts), digest=store.digest(video))
        return [_data_url(image) for image in found.images]


def summarize_store(
    store: TargetStore, count: int, *, seed: int = 0, video_roots: Mapping[str, str] | None = None
) -> StoreSummary:
    """Sample videos of a store, and gather statistics of its teachers and failures.

    An unreadable video is shown with the reason instead of its pictures.

    Args:
        store: The store.
        count: Videos to sample among those with rows.
        seed: Seed of the sample.
        video_roots: Corpus → folder where it is located now, or of prepared copies.

    Raises:
        StoreError: The store is damaged.
    """
    reader = FrameReader(store, video_roots or {})
    state = store.video_state
    usable = np.flatnonzero((state == OK) & (store.row_counts > 0))
    chosen = np.sort(np.random.default_rng(seed).permutation(usable)[:count])
    return StoreSummary(
        store=store,
        states={name: int((state == code).sum()) for code, name in STATUS.items()},
        videos=[_video(store, int(v), reader) for v in chosen],
        teachers=[_teacher(store, name, reader) for name in store.teachers_of("logits")],
        failures=list(failures(store)),
    )


def _video(store: TargetStore, video: int, reader: FrameReader) -> VideoSummary:
    record = store.video(video)
    index, pts, rows = store.frames(video)
    seconds = _seconds(store, video, index, pts)
    names = [name for name, state in reader.teacher_states.items() if state[video] == OK]
    shown = np.unique(np.linspace(0, len(rows) - 1, STRIP).round().astype(np.int64))
    pictures = _pictures(
        store, video, reader, names, index[shown], pts[shown], seconds[shown], rows[shown]
    )
    return VideoSummary(
        corpus=record.corpus,
        path=record.path,
        duration=record.duration,
        frames=len(rows),
        problem=pictures[0].problem,
        pictures=pictures,
        curves={name: (seconds, store.entropy(name, rows)) for name in names},
    )


def _seconds(
    store: TargetStore, video: int, index: NDArray[np.int64], pts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the time since the first cached frame [N], from frame numbers without a clock."""
    record = store.video(video)
    if record.time_base is not None and record.clock == "pts":
        return (pts - pts[0]) * float(record.time_base)
    return (index - index[0]) / (record.fps if np.isfinite(record.fps) and record.fps > 0 else 1.0)


def _pictures(
    store: TargetStore,
    video: int,
    reader: FrameReader,
    teachers: Sequence[str],
    index: NDArray[np.int64],
    pts: NDArray[np.int64],
    seconds: NDArray[np.float64],
    rows: NDArray[np.int64],
) -> list[Picture]:
    """Read F cached frames of one video in one pass."""
    problem: str | None = None
    jpegs: list[str] | list[None] = [None] * len(rows)
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
    odds = softmax(store.logits(teacher, rows).astype(np.float64))
    best = np.argsort(-odds, axis=1, kind="stable")[:, :LABELS]
    classes = store.teachers[teacher].classes
    return [
        Prediction([(classes[k], float(row[k])) for k in top], float(nats))
        for row, top, nats in zip(odds, best, store.entropy(teacher, rows), strict=True)
    ]


def _teacher(store: TargetStore, name: str, reader: FrameReader) -> TeacherSummary:
    found = teacher_stats(store, name)
    order = np.argsort(found.entropy, kind="stable")
    order = order[np.isfinite(found.entropy[order])]
    videos = store.read_table("video", found.rows)
    ends = [_extremes(store, name, reader, found.rows[o], videos[o]) for o in (order, order[::-1])]
    return TeacherSummary(found, *ends)


def _extremes(
    store: TargetStore,
    name: str,
    reader: FrameReader,
    rows: NDArray[np.int64],
    videos: NDArray[np.int64],
) -> list[Picture]:
    """Return the first rows in the given order, at most one per video.

    Neighbours of a frame would all look like it.
    """
    _, first = np.unique(videos, return_index=True)
    pictures = []
    for at in np.sort(first)[:EXTREMES]:
        video = int(videos[at])
        index, pts, all_rows = store.frames(video)
        i = np.flatnonzero(all_rows == rows[at])
        seconds = _seconds(store, video, index, pts)
        pictures += _pictures(
            store, video, reader, [name], index[i], pts[i], seconds[i], all_rows[i]
        )
    return pictures


def _data_url(image: NDArray[np.uint8]) -> str:
    """Encode RGB uint8 [h, w, 3] as the data URL of a JPEG."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
