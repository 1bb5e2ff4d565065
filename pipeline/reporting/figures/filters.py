"""First-layer filters: their variation over time (Figure 3) and in space (Figure 4).

Shapes: F filters, C input channels, T time steps of a kernel, H W its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.run_dir import START
from ...common.sealed import open_checked
from ...common.tables import Table, columns
from ...students.student_options import STEM
from ..runs import Run
from .canvas import Figure, finish, new_canvas, short

RGB = 3
SHOWN = 64


@dataclass(frozen=True)
class Filters:
    """The first convolution of a run or a file.

    Attributes:
        name: Name of the run.
        weights: float64 [F, C, T, H, W].
        state: Description of its training for captions.
        distilled: Whether it belongs to a student before finetuning.
        inflated: Whether it belongs to an inflated network.
        start: Whether it belongs to an inflated network before its finetuning.
    """

    name: str
    weights: np.ndarray
    state: str
    distilled: bool = False
    inflated: bool = False
    start: bool = False


def read_filters(run: Run) -> list[Filters]:
    """Return the filters of a run: inflated ones before finetuning, and the exported ones."""
    inflated = run.kind == "finetune" and run.init.startswith("inflate")
    distilled = run.kind == "student"
    state = "distilled" if distilled else "inflated, after finetuning" if inflated else "finetuned"
    start = _stem(run.path / START) if inflated else None
    trained = _stem(run.model)
    filters = []
    start, trained = (
        weights if weights is not None and _drawable(weights) else None
        for weights in (start, trained)
    )
    if start is not None:
        filters.append(
            Filters(run.name, start, "inflated, before finetuning", inflated=True, start=True)
        )
    if trained is not None:
        filters.append(Filters(run.name, trained, state, distilled, inflated))
    return filters


def _drawable(weights: np.ndarray) -> bool:
    """Check whether an array has the shape and the values of filters that a page can show."""
    fits = weights.ndim == 5 and min(weights.shape) > 0 and max(weights.shape[2:]) <= 64
    return fits and bool((np.abs(weights) < 1e15).all())


def _stem(file: Path) -> np.ndarray | None:
    """Return the weights of the first convolution in a file, None if it has none.

    Raises:
        CheckpointError: The file is damaged.
    """
    if not file.exists():
        return None
    with open_checked(file, "np") as opened:
        return (
            np.asarray(opened.get_tensor(STEM), dtype=np.float64)
            if STEM in set(opened.keys())
            else None
        )


def variation_over_time(weights: np.ndarray) -> float:
    """Measure how much filters [F, C, T, H, W] vary over time, from 0 to 1.

    It is the mean over filters of √(mean_t ‖w_t − w̄‖² / mean_t ‖w_t‖²), where w̄ is the mean of a
    filter over time: 0 for a kernel that is repeated over time, like an inflated one before
    training; 1 if the time steps average to 0. Filters of zeros count as 0.

    Example:
        >>> variation_over_time(np.ones((2, 3, 3, 7, 7)))
        0.0
    """
    around = np.square(weights - weights.mean(axis=2, keepdims=True)).sum(axis=(1, 2, 3, 4))
    whole = np.square(weights).sum(axis=(1, 2, 3, 4))
    ratio = np.divide(around, whole, out=np.zeros_like(whole), where=whole > 0)
    return float(np.sqrt(ratio).mean())


def over_time(filters: Sequence[Filters]) -> Figure | None:
    """Draw Figure 3: filters with a temporal extent, at each of their time steps.

    A distilled student is shown above an inflated network before and after its finetuning, or above
    another network if there is no inflated one.
    """
    temporal = [each for each in filters if each.weights.shape[2] > 1]
    if not temporal:
        return None
    shown = [each for each in _rows(temporal) if each.weights.shape[1] == RGB]
    table = Table(
        "Variation of first-layer filters over time", columns("run", "filters", ">variation")
    )
    for each in temporal:
        table.add(each.name, each.state, f"{variation_over_time(each.weights):.3f}")
    table.notes = [
        "Norm of the part that changes over time divided by the norm of the filter, mean over filters: 0 for a "
        "repeated still picture, like an inflated kernel before training; 1 for change alone."
    ]
    # Filters of flow have no colours.
    if not shown:
        return None
    steps = max(each.weights.shape[2] for each in shown)
    canvas, axes = new_canvas(2.75 * steps, 2.95 * len(shown), len(shown), steps)
    for row, each in enumerate(shown):
        for step in range(steps):
            ax = axes[row * steps + step]
            ax.axis("off")
            if step < each.weights.shape[2]:
                ax.imshow(_mosaic(each.weights, step), interpolation="nearest")
                ax.set_title(f"\nt = {step}", fontsize=10.5)
        # The text is above all steps. As a part of the layout it would widen the first column.
        words = f"{short(each.name, 60)} ({each.state}): variation {variation_over_time(each.weights):.3f}"
        axes[row * steps].annotate(
            words,
            (0, 1),
            (0, 18),
            "axes fraction",
            "offset points",
            fontsize=10.5,
            annotation_clip=False,
        ).set_in_layout(False)
    caption = (
        "The first convolution at each of its time steps, one square per filter, scaled over all its steps: grey is 0. "
        "A filter that is equal at every t responds to a still picture; one that changes responds to motion. "
        + _describe_rows(shown)
    )
    title = "Figure 3: first-layer filters over time"
    return finish(
        canvas,
        "figure-3-filters",
        title,
        caption,
        list(dict.fromkeys(each.name for each in shown)),
        table,
    )


def _rows(temporal: Sequence[Filters]) -> list[Filters]:
    """Choose a distilled student, and the first inflated run before and after its finetuning.

    Without an inflated run, another network takes its place.
    """
    trained = [each for each in temporal if not each.inflated]
    first = next((each for each in trained if each.distilled), trained[0] if trained else None)
    inflated = next((each.name for each in temporal if each.inflated), None)
    if inflated is not None:
        others = [each for each in temporal if each.inflated and each.name == inflated]
    else:
        others = [each for each in trained if not each.distilled and each is not first][:1]
    return others if first is None else [first, *others]


def _describe_rows(rows: Sequence[Filters]) -> str:
    """Describe the rows of the figure for its caption."""
    if len(rows) == 1:
        return f"This is {_describe_row(rows[0], None)}. No other network of this kind is among the runs."
    texts = "; ".join(
        _describe_row(each, previous)
        for each, previous in zip(rows, [None, *rows[:-1]], strict=True)
    )
    missing = (
        "" if any(each.inflated for each in rows) else " No inflated network is among the runs."
    )
    return f"From top to bottom: {texts}.{missing}"


def _describe_row(filters: Filters, previous: Filters | None) -> str:
    if filters.start:
        return "an inflated network before its finetuning"
    if filters.inflated:
        if previous is not None and previous.start:
            return "the same after its finetuning"
        return "an inflated network after its finetuning (its run has no filters from before)"
    return (
        "a distilled student before any finetuning"
        if filters.distilled
        else "a network finetuned from another initialisation"
    )


def in_space(filters: Sequence[Filters], kinetics: Filters | None = None) -> Figure | None:
    """Draw Figure 4: the spatial filters of R(2+1)D's first convolution, next to `kinetics`."""
    spatial = [
        each for each in filters if each.weights.shape[2] == 1 and each.weights.shape[1] == RGB
    ]
    if not spatial:
        return None
    first = next((each for each in spatial if each.distilled), spatial[0])
    other = kinetics or next((each for each in spatial if each.distilled != first.distilled), None)
    shown = [each for each in (first, other) if each is not None]
    pictures = [_mosaic(each.weights, 0) for each in shown]
    tall = max(len(picture) / picture.shape[1] for picture in pictures)
    canvas, axes = new_canvas(4.2 * len(shown), 4.2 * tall + 0.3, 1, len(shown))
    for ax, each, picture in zip(axes, shown, pictures, strict=True):
        ax.axis("off")
        ax.imshow(picture, interpolation="nearest")
        ax.set_anchor("N")
        ax.set_title(f"{short(each.name, 40)}: {len(each.weights)} filters", fontsize=10.5)
    caption = (
        "The spatial half of the first convolution, one square per filter, each scaled separately: grey is 0. Trained "
        "filters show edges and colour blobs; noise indicates few steps or few clips."
        + (
            ""
            if kinetics
            else " --kinetics FILE adds the filters of Kinetics weights for comparison."
        )
    )
    return finish(
        canvas,
        "figure-4-filters",
        "Figure 4: spatial filters of R(2+1)D",
        caption,
        [each.name for each in shown],
    )


def _mosaic(weights: np.ndarray, step: int) -> np.ndarray:
    """Arrange one time step of the first SHOWN filters in a square, RGB float [h, w, 3]."""
    kernels = weights[:SHOWN]
    scale = np.abs(kernels).max(axis=(1, 2, 3, 4), keepdims=True)
    pictures = (0.5 + 0.5 * kernels / np.where(scale > 0, scale, 1))[:, :, step].transpose(
        0, 2, 3, 1
    )
    count, h, w, _ = pictures.shape
    side = math.ceil(math.sqrt(count))
    image = np.ones((math.ceil(count / side) * (h + 1) + 1, side * (w + 1) + 1, RGB))
    for i, picture in enumerate(pictures):
        y, x = 1 + i // side * (h + 1), 1 + i % side * (w + 1)
        image[y : y + h, x : x + w] = picture
    return image
