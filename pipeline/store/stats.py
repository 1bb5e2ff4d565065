"""Statistics of one teacher over all rows of a store or, if large, over evenly spread rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reader import TargetStore
from .storage import LocalFiles

SURVEYED = 200_000  # rows read of a store in a folder; all of a small one
REMOTE_SURVEYED, RUN = 16_384, 128  # of a remote store fewer, in runs that share a request
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 24  # of the entropy histogram, from 0 to ln K


@dataclass(frozen=True)
class TeacherStats:
    """Statistics of one teacher.

    rows int64 [n] of the store that were read, ascending, of `total`; their entropy float32 [n] in
    nats and the index of their best class, top int64 [n].
    """

    teacher: str
    classes: tuple[str, ...]
    total: int
    rows: NDArray[np.int64]
    entropy: NDArray[np.float32]
    top: NDArray[np.int64]

    def histogram(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return counts of finite entropies in BINS equal bins from 0 to ln K nats, and edges."""
        highest = max(float(np.log(len(self.classes))), 1e-9)
        values = self.entropy[np.isfinite(self.entropy)].astype(np.float64)
        counts, edges = np.histogram(np.clip(values, 0, highest), BINS, (0.0, highest))
        return counts.astype(np.int64), edges

    def quantiles(self) -> dict[float, float]:
        """Entropy in nats at QUANTILES; nan where there is none."""
        values = self.entropy[np.isfinite(self.entropy)]
        quantiles = (
            np.quantile(values, QUANTILES).tolist()
            if len(values)
            else [float("nan")] * len(QUANTILES)
        )
        return dict(zip(QUANTILES, quantiles, strict=True))

    def most_frequent(self, count: int) -> list[tuple[str, float]]:
        """Return the classes that are most often the best one, each with its share of the rows."""
        counts = Counter(self.top.tolist()).most_common(count)
        return [(self.classes[k], n / len(self.top)) for k, n in counts]


@dataclass(frozen=True)
class Failure:
    """A video without rows, or without rows of one teacher, and why."""

    corpus: str
    path: str
    reason: str


def teacher_stats(store: TargetStore, teacher: str) -> TeacherStats:
    """Read a teacher's rows, at most SURVEYED of them (REMOTE_SURVEYED behind a URL).

    Raises:
        StoreError: A row cannot be read.
    """
    rows = store.committed_rows(teacher)
    total, local = len(rows), isinstance(store.files, LocalFiles)
    most, run = (SURVEYED, 1) if local else (REMOTE_SURVEYED, RUN)
    if total > most:
        starts = np.linspace(0, total - run, most // run).astype(np.int64)
        rows = rows[(starts[:, None] + np.arange(run)).ravel()]
    entropies, tops = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    for at in range(0, len(rows), 4096):
        some = rows[at : at + 4096]
        entropies.append(store.entropy(teacher, some))
        tops.append(store.logits(teacher, some).argmax(1).astype(np.int64))
    classes = store.teachers[teacher].classes
    return TeacherStats(
        teacher, classes, total, rows, np.concatenate(entropies), np.concatenate(tops)
    )


def failures(store: TargetStore) -> Iterator[Failure]:
    """Return videos that failed, and those without rows of one teacher alone.

    The reason of the second kind begins with the teacher's name.
    """
    reasons = store.index.video_reasons()
    texts = {i: [text] for i, text in reasons.items()}
    for name in store.teachers:
        for i, text in store.index.video_reasons(name).items():
            if i not in reasons:
                texts.setdefault(i, []).append(f"{name}: {text}")
    for i in sorted(texts):
        yield from (Failure(*store.place(i), text) for text in texts[i])
