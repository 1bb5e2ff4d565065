"""Statistics of one teacher over all rows of a store, or over evenly spread rows of a large one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reader import TargetStore
from .storage import LocalFiles

# At most this many rows of a store in a folder are read.
MAX_ROWS = 200_000
# Fewer rows of a remote store are read, in runs of consecutive rows that share a request.
MAX_REMOTE_ROWS, REMOTE_RUN_ROWS = 16_384, 128
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Bins of the entropy histogram, from 0 to ln K.
BINS = 24


@dataclass(frozen=True)
class TeacherStats:
    """Statistics of one teacher.

    total: number of the teacher's rows. rows int64 [n]: the rows that were read, ascending. entropy
    float32 [n]: their entropies in nats. top int64 [n]: the class with the largest logit of each.
    """

    teacher: str
    classes: tuple[str, ...]
    total: int
    rows: NDArray[np.int64]
    entropy: NDArray[np.float32]
    top: NDArray[np.int64]

    def histogram(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return counts of finite entropies in BINS equal bins from 0 to ln K nats, and edges."""
        max_entropy = max(float(np.log(len(self.classes))), 1e-9)
        values = self.entropy[np.isfinite(self.entropy)].astype(np.float64)
        counts, edges = np.histogram(np.clip(values, 0, max_entropy), BINS, (0.0, max_entropy))
        return counts.astype(np.int64), edges

    def quantiles(self) -> dict[float, float]:
        """Return the entropies in nats at QUANTILES; nan without rows."""
        values = self.entropy[np.isfinite(self.entropy)]
        quantiles = (
            np.quantile(values, QUANTILES).tolist()
            if len(values)
            else [float("nan")] * len(QUANTILES)
        )
        return dict(zip(QUANTILES, quantiles, strict=True))

    def most_frequent(self, count: int) -> list[tuple[str, float]]:
        """Return the classes that are most often the top class, each with its share of the rows."""
        counts = Counter(self.top.tolist()).most_common(count)
        return [(self.classes[k], n / len(self.top)) for k, n in counts]


@dataclass(frozen=True)
class Failure:
    """A video without rows, or without rows of one teacher, and the reason."""

    corpus: str
    path: str
    reason: str


def teacher_stats(store: TargetStore, teacher: str) -> TeacherStats:
    """Read a teacher's rows, at most MAX_ROWS of them (MAX_REMOTE_ROWS behind a URL).

    Raises:
        StoreError: A row cannot be read.
    """
    rows = store.committed_rows(teacher)
    total, local = len(rows), isinstance(store.files, LocalFiles)
    max_rows, run_rows = (MAX_ROWS, 1) if local else (MAX_REMOTE_ROWS, REMOTE_RUN_ROWS)
    if total > max_rows:
        starts = np.linspace(0, total - run_rows, max_rows // run_rows).astype(np.int64)
        rows = rows[(starts[:, None] + np.arange(run_rows)).ravel()]
    entropies, tops = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for start in range(0, len(rows), 4096):
        block = rows[start : start + 4096]
        entropies.append(store.entropy(teacher, block))
        tops.append(store.logits(teacher, block).argmax(1).astype(np.int64))
    classes = store.teachers[teacher].classes
    return TeacherStats(
        teacher, classes, total, rows, np.concatenate(entropies), np.concatenate(tops)
    )


def failures(store: TargetStore) -> Iterator[Failure]:
    """Yield the videos that failed, and those that failed only for one teacher.

    A reason of the second kind begins with the teacher's name.
    """
    reasons = store.index.video_reasons()
    texts = {i: [text] for i, text in reasons.items()}
    for name in store.teachers:
        for i, text in store.index.video_reasons(name).items():
            if i not in reasons:
                texts.setdefault(i, []).append(f"{name}: {text}")
    for i in sorted(texts):
        yield from (Failure(*store.place(i), text) for text in texts[i])
