"""Figure 6: the entropy of a store's teachers, and the effect of a threshold on accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ...common.errors import DistInitError
from ...common.urls import is_url
from ...store.reader import TargetStore
from ...store.stats import TeacherStats, teacher_stats
from ..ablation_results import Ablation
from ..runs import Run
from .canvas import INK, MARKERS, Figure, colour, finish, new_canvas, short


@dataclass(frozen=True)
class Point:
    """A row of an ablation over the entropy threshold.

    Attributes:
        row: Name of the row.
        nats: Threshold by teacher, None without a filter.
        mean: Mean top 1, in per cent.
        deviation: Standard deviation of top 1, in per cent.
    """

    row: str
    nats: Mapping[str, float] | None
    mean: float
    deviation: float


@dataclass(frozen=True)
class StoreStats:
    """A store that students were trained from: statistics of its teachers, and its identity.

    `teachers` is None, and `problem` has the reason, if the store cannot be read.
    """

    teachers: Sequence[TeacherStats] | None
    identity: dict[str, Any]
    problem: str | None = None


def read_stores(runs: Sequence[Run], *, open_urls: bool = False) -> dict[str, StoreStats]:
    """Open each store that a student of the runs was trained from; return them by path.

    A run may come from another person, and so may the address in it: a URL is only opened with
    `open_urls`.
    """
    stores = {}
    students = [run for run in runs if run.kind == "student" and "store" in run.config]
    for path in dict.fromkeys(str(run.config["store"]) for run in students):
        if is_url(path) and not open_urls:
            stores[path] = StoreStats(None, {}, "not read: it is a URL; --open-urls reads it")
            continue
        try:
            store = TargetStore.open(path)
            stores[path] = StoreStats(
                [teacher_stats(store, name) for name in store.teachers_of("logits")],
                store.identity(),
            )
        # ValueError: a path with a zero byte.
        except (DistInitError, OSError, ValueError) as error:
            stores[path] = StoreStats(None, {}, str(error))
    return stores


def threshold_points(ablation: Ablation, store: str) -> list[Point]:
    """Return the rows whose students were trained from a store, with and without entropy filter.

    The list is empty if fewer than two rows have a threshold: the ablation then varies something
    else.
    """
    points = []
    for row in ablation.rows:
        cells = [cell for cell in ablation.cells if cell.record.row == row and cell.problem is None]
        students = [cell.student for cell in cells if cell.student is not None]
        values = np.array([cell.metrics["top1"]["value"] for cell in cells if cell.metrics])
        if not students or len(students) < len(cells) or not len(values):
            # No run is finished, or some runs have no student.
            continue
        if any(str(student.config.get("store")) != store for student in students):
            continue
        thresholds = [dict(student.result.get("max_entropy") or {}) for student in students]
        nats = {
            teacher: float(
                np.mean([by_teacher[teacher] for by_teacher in thresholds if teacher in by_teacher])
            )
            for teacher in thresholds[0]
        } or None
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        points.append(Point(row, nats, 100 * float(values.mean()), 100 * deviation))
    return points if sum(point.nats is not None for point in points) >= 2 else []


def densities(
    teachers: Sequence[TeacherStats], points: Sequence[Point], store_name: str, number: int
) -> Figure | None:
    """Draw the density of each teacher's entropies, and above it accuracy against the threshold.

    Args:
        teachers: Statistics of the teachers.
        points: Accuracies by threshold; without them, only the density is drawn.
        store_name: Name of the store for the caption.
        number: Number of the store in the report.
    """
    teachers = [stats for stats in teachers if np.isfinite(stats.entropy).any()]
    if not teachers:
        return None
    canvas, axes = new_canvas(8, 5.6 if points else 3.2, 2 if points else 1, 1)
    for i, stats in enumerate(teachers):
        x, density = entropy_density(stats.entropy, np.log(len(stats.classes)))
        axes[-1].fill_between(x, density, color=colour(i), alpha=0.25, lw=0)
        axes[-1].plot(
            x, density, color=colour(i), lw=1.8, label=f"{stats.teacher} (ln K = {x[-1]:.2f})"
        )
    axes[-1].set_xlabel("entropy of the teacher’s softmax, nats")
    axes[-1].set_ylabel("density")
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlim(0, max(float(np.log(len(stats.classes))) for stats in teachers))
    axes[-1].legend(loc="upper left", fontsize=10)
    if points:
        _accuracy(axes[0], points, [stats.teacher for stats in teachers])
        axes[0].sharex(axes[-1])
        axes[0].tick_params(labelbottom=False)
    num_frames = sum(len(stats.rows) for stats in teachers[:1])
    caption = (
        f"Below: distribution of the entropy of cached frames ({num_frames:,} frames of {store_name}); low is "
        "confident. Above: top 1 of students trained only on clips below a threshold, mean ± deviation over seeds; the "
        "dashed line is without a threshold. A threshold helps where points are above the line by more than their bars."
        if points
        else f"Distribution of the entropy of cached frames ({num_frames:,} frames of {store_name}): low is confident, "
        "ln K on the right is a guess among K classes. A threshold keeps the frames to its left. No run "
        "varies the threshold."
    )
    name = f"figure-6-entropy{f'-{number}' if number > 1 else ''}"
    return finish(canvas, name, "Figure 6: the entropy of the teachers", caption, [store_name])


def _accuracy(ax: Axes, points: Sequence[Point], teachers: Sequence[str]) -> None:
    for i, teacher in enumerate(teachers):
        pairs = [
            (point.nats[teacher], point)
            for point in points
            if point.nats is not None and teacher in point.nats
        ]
        pairs.sort(key=lambda item: item[0])
        if not pairs:
            continue
        x, y = [nats for nats, _ in pairs], [point.mean for _, point in pairs]
        bars = [point.deviation for _, point in pairs]
        ax.errorbar(
            x,
            y,
            yerr=bars,
            fmt=MARKERS[i % len(MARKERS)] + "-",
            color=colour(i),
            capsize=3,
            lw=1.6,
            label=teacher,
        )
        for nats, point in pairs:
            ax.annotate(
                short(point.row, 24),
                (nats, point.mean),
                (4, 6),
                textcoords="offset points",
                fontsize=9.5,
            )
    for point in points:
        if point.nats is None:
            ax.axhline(
                point.mean,
                color=INK,
                ls="--",
                lw=1.1,
                label=f"{short(point.row, 30)} (no threshold)",
            )
    ax.set_ylabel("top 1, %")
    ax.legend(loc="best", fontsize=10)


def entropy_density(
    values: np.ndarray, highest: float, points: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the density of a teacher's entropies.

    Args:
        values: Entropies in nats [n]; those that are not finite are left out.
        highest: The largest possible entropy, ln K.
        points: Number of points at which the density is computed.

    Returns:
        x [points] from 0 to `highest`, and the density [points], whose integral is 1. Mass beyond
        an end is folded back, so that none is below 0 or above ln K.
    """
    # This import takes a second.
    from scipy.stats import gaussian_kde

    finite = np.clip(values[np.isfinite(values)].astype(np.float64), 0, highest)
    # With a histogram, the cost does not depend on the number of frames.
    counts, edges = np.histogram(finite, 4 * points, (0.0, highest))
    centres = (edges[:-1] + edges[1:]) / 2
    folded = np.concatenate([centres, -centres, 2 * highest - centres])
    kernels = gaussian_kde(folded, weights=np.tile(counts, 3))
    # Silverman's rule is applied to the values themselves, since folded ones are spread wider.
    spread = finite.std()
    middle_half = np.subtract(*np.quantile(finite, (0.75, 0.25))) / 1.34
    width = 0.9 * min(spread, middle_half or spread) * len(finite) ** -0.2
    folded_spread = np.sqrt(kernels.covariance.item()) / kernels.factor
    kernels.set_bandwidth(max(width, highest / points) / folded_spread)
    x = np.linspace(0, highest, points)
    density = kernels(x)
    return x, density / (density.sum() * (x[1] - x[0]))
