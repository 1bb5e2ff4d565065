"""Compare the teachers of a store: where do their outputs agree, and where do they differ?

Measures that need no common classes come from the geometry of the outputs: linear CKA (Kornblith et
al., ICML 2019) and the overlap of nearest neighbours.

Shapes: n frames, V videos, K D numbers of a row of one teacher and of another.
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

NEIGHBOURS = 10  # of a frame or a video, whose overlap is measured
COMPARED = 2000  # frames or videos among which neighbours are searched: a table of 32 MB
FRAMES_PER_VIDEO = 6  # whose outputs are averaged where videos are compared


@dataclass(frozen=True)
class TeacherView:
    """One teacher on the sampled frames, and averaged over the sampled videos.

    outputs: float32 [n, K]. entropy: nats [n], None of features. means: float32 [V, K].
    """

    name: str
    output: str
    classes: tuple[str, ...]
    outputs: NDArray[np.float32]
    entropy: NDArray[np.float32] | None
    means: NDArray[np.float32]

    @property
    def confidence(self) -> NDArray[np.float64] | None:
        """1 − entropy / ln K of each frame [n]: 1 certain, 0 uniform; None of features."""
        if self.entropy is None:
            return None
        return 1 - self.entropy.astype(np.float64) / max(float(np.log(len(self.classes))), 1e-9)


@dataclass(frozen=True)
class PairComparison:
    """Two teachers over the same frames; None where a measure does not apply.

    agreement: share of frames with the same best class, of teachers of the same classes.
    cka: linear CKA, 1 for outputs that a rotation and a factor make equal, 0 for unrelated ones.
    neighbours: mean share of a frame's nearest frames of other videos that both have;
    `neighbours_by_chance` is that of unrelated outputs.
    entropy_correlation: Spearman's, over frames.
    first_more_confident: share of frames on which the first has the higher confidence.
    disagreement: of each video [V], from 0 to 1: the Jensen-Shannon divergence in bits of the
    distributions over common classes, else the share of its nearest videos that are not common.
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
        """Return (place in `videos`, mean disagreement over pairs), the highest first."""
        mean = np.mean([pair.disagreement for pair in self.pairs], axis=0)
        order = np.argsort(-mean, kind="stable")[:count]
        return [(int(at), float(mean[at])) for at in order]


def compare_teachers(
    store: TargetStore, teachers: Sequence[str] | None = None, *, sample: int = 5000, seed: int = 0
) -> TeacherComparison:
    """Compare teachers on the same random frames and videos.

    Args:
        store: An open store.
        teachers: At least two of its teachers, default all.
        sample: Most frames used.
        seed: Which frames and videos those are.

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
    videos = np.sort(random.permutation(usable)[:COMPARED])
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

    same = bool(a.classes) and a.classes == b.classes
    agreement = correlation = confident = None
    if same:
        agreement = float((a.outputs.argmax(1) == b.outputs.argmax(1)).mean())
    if a.confidence is not None and b.confidence is not None:
        confident = float((a.confidence > b.confidence).mean())
        if np.ptp(a.confidence) > 0 and np.ptp(b.confidence) > 0:
            correlation = float(spearmanr(a.entropy, b.entropy).statistic)
    few = np.linspace(0, len(of_video) - 1, min(COMPARED, len(of_video))).astype(np.int64)
    overlap, chance = neighbour_overlap(a.outputs[few], b.outputs[few], of_video[few])
    if same:
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
    below = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
    return float(np.linalg.norm(b.T @ a) ** 2 / below) if below > 0 else 0.0


def neighbour_overlap(
    x: NDArray[np.float32], y: NDArray[np.float32], group: NDArray[np.int64]
) -> tuple[NDArray[np.float64], float]:
    """Return the share [n] of nearest neighbours that x [n, K] and y [n, D] have in common.

    Neighbours are by cosine of the centred outputs, among rows of other groups. Also returns the
    mean share of unrelated outputs.
    """
    others = (group[:, None] != group[None, :]).sum(axis=1)
    count = max(1, min(NEIGHBOURS, int(others.min())))
    near = []
    for outputs in (x, y):
        z = outputs.astype(np.float64) - outputs.mean(axis=0, dtype=np.float64)
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        likeness = z @ z.T
        likeness[group[:, None] == group[None, :]] = -np.inf
        chosen = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        flags = np.zeros(likeness.shape, bool)
        np.put_along_axis(flags, chosen, True, axis=1)
        near.append(flags)
    chance = float(np.mean(count / np.maximum(others, 1)))
    return (near[0] & near[1]).sum(axis=1) / count, chance


def _divergence(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the Jensen-Shannon divergence in bits of the softmaxes of each row [V]."""
    p, q = softmax(x.astype(np.float64)), softmax(y.astype(np.float64))
    apart = (distribution_entropy(p) + distribution_entropy(q)) / 2
    nats = distribution_entropy((p + q) / 2) - apart
    return np.asarray(np.clip(nats / np.log(2), 0, 1))
