"""Figure 6: the entropy of the teachers of a store's frames, and what a threshold on it does to
accuracy."""

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
from .accuracy_figures import spread_of
from .canvas import INK, MARKERS, Figure, colour, finish, new_canvas, short


@dataclass(frozen=True)
class Point:
    """A row of an ablation over the threshold: nats by teacher (None: no filter), mean top 1 and
    deviation, in %."""

    row: str
    nats: Mapping[str, float] | None
    mean: float
    deviation: float


@dataclass(frozen=True)
class StoreSurvey:
    """A store that students were trained from: its teachers' surveys and identity, or why it cannot
    be read."""

    surveys: Sequence[TeacherStats] | None
    identity: dict[str, Any]
    problem: str | None = None


def read_stores(runs: Sequence[Run], *, open_urls: bool = False) -> dict[str, StoreSurvey]:
    """Open each store that a student of the runs was trained from; return them by path.

    A run may come from anybody, and so may the address in it: a URL is opened where that was asked
    for, else never.
    """
    found = {}
    students = [run for run in runs if run.kind == "student" and "store" in run.config]
    for path in dict.fromkeys(str(run.config["store"]) for run in students):
        if is_url(path) and not open_urls:
            found[path] = StoreSurvey(
                None, {}, "not read: it is behind a URL; --open-urls reads it"
            )
            continue
        try:
            store = TargetStore.open(path)
            found[path] = StoreSurvey(
                [teacher_stats(store, name) for name in store.teachers_of("logits")],
                store.identity(),
            )
        except (DistInitError, OSError, ValueError) as error:  # ValueError: a path with a zero byte
            found[path] = StoreSurvey(None, {}, str(error))
    return found


def threshold_points(ablation: Ablation, store: str) -> list[Point]:
    """The rows whose students learned from the store at this path behind the entropy filter, and
    those without one.

    Empty unless at least two thresholds are there: then the filter is not what the ablation varies.
    """
    points = []
    for row in ablation.rows:
        cells = [cell for cell in ablation.cells if cell.record.row == row and cell.problem is None]
        students = [cell.student for cell in cells if cell.student is not None]
        values = np.array(
            [cell.run.metrics["top1"]["value"] for cell in cells if cell.run and cell.run.metrics]
        )
        if not students or len(students) < len(cells) or not len(values):
            continue  # nothing finished, or nothing distilled
        if any(str(student.config.get("store")) != store for student in students):
            continue
        each = [dict(student.result.get("max_entropy") or {}) for student in students]
        nats = {
            name: float(np.mean([e[name] for e in each if name in e])) for name in each[0]
        } or None
        points.append(Point(row, nats, *spread_of(values)))
    return points if sum(point.nats is not None for point in points) >= 2 else []


def densities(
    surveys: Sequence[TeacherStats], points: Sequence[Point], where: str, number: int
) -> Figure | None:
    """The density of each teacher's entropies; where an ablation varies the threshold, accuracy
    against it as well."""
    surveys = [found for found in surveys if np.isfinite(found.entropy).any()]
    if not surveys:
        return None
    canvas, axes = new_canvas(8, 5.6 if points else 3.2, 2 if points else 1, 1)
    for i, found in enumerate(surveys):
        x, density = entropy_density(found.entropy, np.log(len(found.classes)))
        axes[-1].fill_between(x, density, color=colour(i), alpha=0.25, lw=0)
        axes[-1].plot(
            x, density, color=colour(i), lw=1.8, label=f"{found.teacher} (ln K = {x[-1]:.2f})"
        )
    axes[-1].set_xlabel("entropy of the teacher’s softmax, nats")
    axes[-1].set_ylabel("density")
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlim(0, max(float(np.log(len(found.classes))) for found in surveys))
    axes[-1].legend(loc="upper left", fontsize=8.5)
    if points:
        _accuracy(axes[0], points, [found.teacher for found in surveys])
        axes[0].sharex(axes[-1])
        axes[0].tick_params(labelbottom=False)
    frames = sum(len(found.rows) for found in surveys[:1])
    caption = (
        f"Below, how often a cached frame has an entropy ({frames:,} frames of {where}): low is certain. Above, top 1 "
        "of students that learned only from clips left of a threshold, mean ± deviation over seeds; the dashed line is "
        "without a threshold. It pays where points lie above the line by more than their bars."
        if points
        else f"How often a cached frame has an entropy ({frames:,} frames of {where}): low is certain, ln K on the "
        "right is a guess among K classes. A threshold keeps what is left of it. No ablation over it is here."
    )
    name = f"figure-6-entropy{f'-{number}' if number > 1 else ''}"
    return finish(canvas, name, "Figure 6: the entropy of the teachers", caption, [where])


def _accuracy(ax: Axes, points: Sequence[Point], teachers: Sequence[str]) -> None:
    for i, teacher in enumerate(teachers):
        mine = [(p.nats[teacher], p) for p in points if p.nats is not None and teacher in p.nats]
        mine.sort(key=lambda item: item[0])
        if not mine:
            continue
        x, y = [nats for nats, _ in mine], [p.mean for _, p in mine]
        bars = [p.deviation for _, p in mine]
        ax.errorbar(
            x, y, yerr=bars, fmt=MARKERS[i] + "-", color=colour(i), capsize=3, lw=1.6, label=teacher
        )
        for nats, p in mine:
            ax.annotate(
                short(p.row, 24), (nats, p.mean), (4, 6), textcoords="offset points", fontsize=8
            )
    for p in points:
        if p.nats is None:
            ax.axhline(
                p.mean, color=INK, ls="--", lw=1.1, label=f"{short(p.row, 30)} (no threshold)"
            )
    ax.set_ylabel("top 1, %")
    ax.legend(loc="best", fontsize=8.5)


def entropy_density(
    values: np.ndarray, highest: float, points: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the density of a teacher's entropies.

    Args:
        values: Entropies in nats [n]; those that are not finite are left out.
        highest: The largest possible entropy, ln K.
        points: Number of places at which the density is computed.

    Returns:
        x [points] from 0 to `highest`, and the density [points], whose integral is 1. What would
        spill over an end is folded back, so that nothing is below 0 or above ln K.
    """
    from scipy.stats import gaussian_kde  # takes a second

    finite = np.clip(values[np.isfinite(values)].astype(np.float64), 0, highest)
    # Of a histogram, so that a million frames cost no more than a thousand.
    counts, edges = np.histogram(finite, 4 * points, (0.0, highest))
    middle = (edges[:-1] + edges[1:]) / 2
    folded = np.concatenate([middle, -middle, 2 * highest - middle])
    kernels = gaussian_kde(folded, weights=np.tile(counts, 3))
    # Silverman's rule, by the values themselves: folded ones spread wider.
    spread = finite.std()
    middle_half = np.subtract(*np.quantile(finite, (0.75, 0.25))) / 1.34
    width = 0.9 * min(spread, middle_half or spread) * len(finite) ** -0.2
    spread_of_folded = np.sqrt(kernels.covariance.item()) / kernels.factor
    kernels.set_bandwidth(max(width, highest / points) / spread_of_folded)
    x = np.linspace(0, highest, points)
    density = kernels(x)
    return x, density / (density.sum() * (x[1] - x[0]))
