"""First-layer filters: how they change over time (Figure 3), and what they look like in space (Figure 4).

Shapes: F filters, C input channels, T time steps of a kernel, H W its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open

from ..runs import Run
from ..tables import Column, Table
from .canvas import Figure, finish, new_canvas, short

STEM = "stem.0.weight"  # torchvision's name: the first convolution of r3d and of R(2+1)D
RGB = 3
SHOWN = 64


@dataclass(frozen=True)
class Filters:
    """The first convolution of a run or a file: weights float64 [F, C, T, H, W]."""

    name: str
    weights: np.ndarray
    distilled: bool
    inflated: bool = False


def read_filters(run: Run) -> Filters | None:
    """Those of a run's exported model; None where there is none yet."""
    try:
        with safe_open(run.model, framework="np") as file:
            weights = file.get_tensor(STEM).astype(np.float64)
    except (OSError, SafetensorError, KeyError):
        return None
    return Filters(run.name, weights, run.kind == "student", run.kind == "finetune" and run.init.startswith("inflate"))


def variation_over_time(weights: np.ndarray) -> float:
    """How much filters [F, C, T, H, W] vary in time, 0 to 1: of each filter √(mean_t ‖w_t − w̄‖² / mean_t ‖w_t‖²),
    where w̄ is its mean over time; of these the mean over filters. 0 for a kernel that is repeated over time, as an
    inflated one is before it is trained; 1 where the steps average to nothing. Filters of zeros count as 0.

    >>> variation_over_time(np.ones((2, 3, 3, 7, 7)))
    0.0
    """
    around = np.square(weights - weights.mean(axis=2, keepdims=True)).sum(axis=(1, 2, 3, 4))
    whole = np.square(weights).sum(axis=(1, 2, 3, 4))
    ratio = np.divide(around, whole, out=np.zeros_like(whole), where=whole > 0)
    return float(np.sqrt(ratio).mean())


def over_time(found: Sequence[Filters]) -> Figure | None:
    """Figure 3: filters with a temporal extent, a distilled student beside an inflated network (else the next best)."""
    able = [f for f in found if f.weights.shape[2] > 1]
    if not able:
        return None
    first = next((f for f in able if f.distilled), able[0])
    rest = [f for f in able if f is not first]
    second = next((f for f in rest if f.inflated), next((f for f in rest if not f.distilled), None))
    rows = [f for f in (first, second) if f is not None and f.weights.shape[1] == RGB]
    table = Table("Variation of first-layer filters over time", [Column("run"), Column("variation", True)])
    for f in able:
        table.add(f.name, f"{variation_over_time(f.weights):.3f}")
    table.notes = [
        "Of each filter the norm of what changes over its time steps by the norm of the whole, mean over filters: 0 is "
        "a still picture repeated, as an inflated kernel is before training; 1 is change alone."
    ]
    if not rows:  # flow has no colours to show
        return None
    steps = max(f.weights.shape[2] for f in rows)
    canvas, axes = new_canvas(2.75 * steps, 2.95 * len(rows), len(rows), steps)
    for row, f in enumerate(rows):
        for step in range(steps):
            ax = axes[row * steps + step]
            ax.axis("off")
            if step < f.weights.shape[2]:
                ax.imshow(_mosaic(f.weights, step), interpolation="nearest")
                label = f"{short(f.name, 70)}: variation {variation_over_time(f.weights):.3f}\n" if step == 0 else "\n"
                ax.set_title(f"{label}t = {step}", fontsize=9)
    caption = (
        "The first convolution at each of its time steps, a square a filter, each scaled over all its steps: grey is 0."
        " A filter that looks alike at every t sees one picture; one that changes sees motion. " + _beside(rows)
    )
    title = "Figure 3: first-layer filters over time"
    return finish(canvas, "figure-3-filters", title, caption, [f.name for f in rows], table)


def _beside(rows: Sequence[Filters]) -> str:
    if len(rows) == 2 and rows[1].inflated:
        return "Above a student distilled from image teachers, below a network that began inflated."
    if len(rows) == 2:
        return "No inflated network is among the runs; below stands one with another start."
    return "No other network of this kind is among the runs."


def in_space(found: Sequence[Filters], beside: Filters | None = None) -> Figure | None:
    """Figure 4: the spatial filters of R(2+1)D's first convolution, beside those of `beside` (Kinetics) if given."""
    able = [f for f in found if f.weights.shape[2] == 1 and f.weights.shape[1] == RGB]
    if not able:
        return None
    first = next((f for f in able if f.distilled), able[0])
    other = beside or next((f for f in able if f.distilled != first.distilled), None)
    shown = [f for f in (first, other) if f is not None]
    canvas, axes = new_canvas(4.2 * len(shown), 4.5, 1, len(shown))
    for ax, f in zip(axes, shown, strict=True):
        ax.axis("off")
        ax.imshow(_mosaic(f.weights, 0), interpolation="nearest")
        ax.set_anchor("N")
        ax.set_title(f"{short(f.name, 40)}: {len(f.weights)} filters", fontsize=9)
    caption = (
        "The spatial half of the first convolution, a square a filter, each scaled by itself: grey is 0. Trained "
        "filters show edges and colour blobs; noise stands for few steps or few clips."
        + ("" if beside else " No Kinetics weights were given (--kinetics FILE) to set beside them.")
    )
    return finish(canvas, "figure-4-filters", "Figure 4: spatial filters of R(2+1)D", caption, [f.name for f in shown])


def _mosaic(weights: np.ndarray, step: int) -> np.ndarray:
    """RGB float [h, w, 3] of one time step of the first SHOWN filters; white lines between them."""
    kernels = weights[:SHOWN]
    scale = np.abs(kernels).max(axis=(1, 2, 3, 4), keepdims=True)
    pictures = (0.5 + 0.5 * kernels / np.where(scale > 0, scale, 1))[:, :, step].transpose(0, 2, 3, 1)
    count, h, w, _ = pictures.shape
    side = math.ceil(math.sqrt(count))
    image = np.ones((math.ceil(count / side) * (h + 1) + 1, side * (w + 1) + 1, RGB))
    for i, picture in enumerate(pictures):
        y, x = 1 + i // side * (h + 1), 1 + i % side * (w + 1)
        image[y : y + h, x : x + w] = picture
    return image
