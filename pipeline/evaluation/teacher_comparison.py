"""Compare the teachers of a store: measure how much their outputs agree.

Teachers with different classes are compared by the geometry of their outputs: linear CKA (Kornblith
et al., ICML 2019) and the overlap of nearest neighbours.

Shapes: n frames, V videos, K and D numbers per row of two teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError
from ..common.numerics import distribution_entropy, softmax
from ..store.reader import TargetStore
from .target_probe import mean_targets

# Nearest neighbours of a frame or a video whose overlap is measured.
NUM_NEIGHBOURS = 10
# Frames or videos to search neighbours among; their table of similarities has 32 MB.
MAX_COMPARED = 2000
# Frames to average outputs over when videos are compared.
FRAMES_PER_VIDEO = 6


@dataclass(frozen=True)
class TeacherView:
    """One teacher on the sampled frames, and averaged over the sampled videos.

    outputs: float32 [n, K]. entropy: nats [n], None for features. means: float32 [V, K].
    """

    name: str
    output: str
    classes: tuple[str, ...]
    outputs: NDArray[np.float32]
    entropy: NDArray[np.float32] | None
    means: NDArray[np.float32]

    @property
    def confidence(self) -> NDArray[np.float64] | None:
        """1 − entropy / ln K of each frame [n]: 0 is uniform, 1 certain; None for features."""
        if self.entropy is None:
            return None
        return 1 - self.entropy.astype(np.float64) / max(float(np.log(len(self.classes))), 1e-9)


@dataclass(frozen=True)
class PairComparison:
    """Measures of two teachers on the same frames; None if a measure does not apply.

    Attributes:
        first: Name of one teacher.
        second: Name of the other teacher.
        agreement: Share of frames with the same best class; requires equal classes.
        cka: Linear CKA, 1 for outputs that are equal up to rotation and scale, 0 for unrelated
            ones.
        neighbours: Mean share of the nearest frames of other videos that both teachers have in
            common.
        neighbours_by_chance: Expected value of `neighbours` for unrelated outputs.
        entropy_correlation: Spearman's correlation of the entropies over frames.
        first_more_confident: Share of frames on which the first has the higher confidence.
        disagreement: Value from 0 to 1 for each video [V]: the Jensen-Shannon divergence in bits of
            the distributions over equal classes, otherwise the share of the nearest videos that the
            teachers do not have in common.
    """

    first: str
    second: str
    agreement: float | None
    cka: float
    neighbours: float
    neighbours_by_chance: float
    entropy_correlation: float | None
    first_more_confident: float | None
    disagreement: NDArray[np.float64]


@dataclass(frozen=True)
class TeacherComparison:
    """All teachers of a store on the same frames and videos.

    rows: the sampled rows of the store [n]. videos: ids of the compared videos [V].
    """

    rows: NDArray[np.int64]
    videos: NDArray[np.int64]
    teachers: tuple[TeacherView, ...]
    pairs: tuple[PairComparison, ...]

    def most_disputed(self, count: int) -> list[tuple[int, float]]:
        """Return (index into `videos`, mean disagreement over pairs), the highest first."""
        mean = np.mean([pair.disagreement for pair in self.pairs], axis=0)
        order = np.argsort(-mean, kind="stable")[:count]
        return [(int(i), float(mean[i])) for i in order]


def compare_teachers(
    store: TargetStore, teachers: Sequence[str] | None = None, *, sample: int = 5000, seed: int = 0
) -> TeacherComparison:
    """Compare teachers on the same random frames and videos.

    Args:
        store: An open store.
        teachers: At least two of its teachers, by default all.
        sample: Maximum number of frames.
        seed: Seed of the sample of frames and videos.

    Raises:
        UsageError: There are fewer than two teachers, or fewer than three videos that all have.
    """
    names = [store.teacher(name).name for name in teachers or store.target_names()]
    if len(names) < 2:
        raise UsageError(
            f"{store.name}: a comparison requires at least 2 teachers, got {', '.join(names) or 0}"
        )
    usable = store.usable(names)
    if len(usable) < 3:
        raise UsageError(
            f"{store.name}: {len(usable)} videos have targets of {', '.join(names)}; a comparison "
            f"requires at least 3"
        )
    random = np.random.default_rng(seed)
    rows = np.sort(random.permutation(store.rows_of(usable))[:sample])
    videos = np.sort(random.permutation(usable)[:MAX_COMPARED])
    of_video = store.read_table("video", rows)
    views = tuple(_view(store, name, rows, videos) for name in names)
    pairs = tuple(_compare(a, b, of_video) for a, b in combinations(views, 2))
    return TeacherComparison(rows, videos, views, pairs)


def _view(
    store: TargetStore, name: str, rows: NDArray[np.int64], videos: NDArray[np.int64]
) -> TeacherView:
    record = store.teacher(name)
    entropy = store.entropy(name, rows) if record.output == "logits" else None
    (means,) = mean_targets(store, name, videos, (FRAMES_PER_VIDEO,))
    return TeacherView(
        name, record.output, record.classes, store.outputs(name, rows), entropy, means
    )


def _compare(a: TeacherView, b: TeacherView, of_video: NDArray[np.int64]) -> PairComparison:
    from scipy.stats import spearmanr

    same_classes = bool(a.classes) and a.classes == b.classes
    agreement = correlation = confident = None
    if same_classes:
        agreement = float((a.outputs.argmax(1) == b.outputs.argmax(1)).mean())
    if a.confidence is not None and b.confidence is not None:
        confident = float((a.confidence > b.confidence).mean())
        if np.ptp(a.confidence) > 0 and np.ptp(b.confidence) > 0:
            correlation = float(spearmanr(a.entropy, b.entropy).statistic)
    sample = np.linspace(0, len(of_video) - 1, min(MAX_COMPARED, len(of_video))).astype(np.int64)
    overlap, chance = neighbour_overlap(a.outputs[sample], b.outputs[sample], of_video[sample])
    if same_classes:
        disagreement = _divergence(a.means, b.means)
    else:
        disagreement = 1 - neighbour_overlap(a.means, b.means, np.arange(len(a.means)))[0]
    return PairComparison(
        a.name,
        b.name,
        agreement,
        linear_cka(a.outputs, b.outputs),
        float(overlap.mean()),
        chance,
        correlation,
        confident,
        disagreement,
    )


def linear_cka(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Return linear CKA of x [n, K] and y [n, D]: ‖yᵀx‖² / (‖xᵀx‖ ‖yᵀy‖) of centred columns."""
    a, b = (z.astype(np.float64) - z.mean(axis=0, dtype=np.float64) for z in (x, y))
    norms = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(b.T @ a) ** 2 / norms) if norms > 0 else 0.0


def neighbour_overlap(
    x: NDArray[np.float32], y: NDArray[np.float32], group: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float]:
    """Return the share [n] of nearest neighbours that x [n, K] and y [n, D] have in common.

    Neighbours are the rows of other groups with the highest cosine of centred outputs. The second
    result is the expected share for unrelated outputs.
    """
    num_others = (group[:, None] != group[None, :]).sum(axis=1)
    count = max(1, min(NUM_NEIGHBOURS, int(num_others.min())))
    neighbours = []
    for outputs in (x, y):
        z = outputs.astype(np.float64) - outputs.mean(axis=0, dtype=np.float64)
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        similarity = z @ z.T
        similarity[group[:, None] == group[None, :]] = -np.inf
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        is_neighbour = np.zeros(similarity.shape, bool)
        np.put_along_axis(is_neighbour, nearest, True, axis=1)
        neighbours.append(is_neighbour)
    chance = float(np.mean(count / np.maximum(num_others, 1)))
    return (neighbours[0] & neighbours[1]).sum(axis=1) / count, chance


def _divergence(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the Jensen-Shannon divergence in bits of the softmaxes of each row [V]."""
    p, q = softmax(x.astype(np.float64)), softmax(y.astype(np.float64))
    mean_entropy = (distribution_entropy(p) + distribution_entropy(q)) / 2
    nats = distribution_entropy((p + q) / 2) - mean_entropy
    return np.asarray(np.clip(nats / np.log(2), 0, 1))
