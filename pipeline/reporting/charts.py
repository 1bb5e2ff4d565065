"""Two small charts, curves and a histogram, for pages that show dozens of them.

This module computes positions; the macro `chart` of templates/macros.html.j2 draws them as inline
SVG of a few kilobytes. That is a hundred times faster than matplotlib, which draws the figures of
reports.

All charts and figures share the colours and dashes defined here. The colours are Okabe and Ito's,
which colour-blind readers can distinguish. Lines also differ in their dashes, so that they can be
distinguished in a grey print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
# Lengths of strokes and gaps, in widths of the line.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1, 1.5), (6, 2, 1, 2))
# Width of a curve in pixels, as in the template.
STROKE = 2
# Points per line; more cannot be distinguished at this width.
MAX_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One named curve: x[n] ascending, y[n]; points that are not finite are left out."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A drawn line: `points` is "x,y x,y …" in pixels, `dashes` is a `stroke-dasharray` of SVG."""

    name: str
    colour: str
    dashes: str
    points: str


@dataclass(frozen=True)
class Chart:
    """A chart in pixels: edges of the plot, ticks (position, label), bars (x, y, width, height)."""

    x_label: str
    y_label: str
    width: int
    height: int
    left: int
    top: int
    right: int
    bottom: int
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    curves: Sequence[Curve] = ()
    bars: Sequence[tuple[float, ...]] = ()
    bar_colour: str = COLOURS[0]
    legend: bool = False


def entropy_curves(lines: Sequence[Line], highest: float, *, legend: bool) -> Chart | None:
    """Return a chart of entropies in nats by seconds, None if no line has a point.

    Args:
        lines: Curves; the colour of each is that of its position here, also if others are empty.
        highest: The y axis covers 0 to this entropy.
        legend: Whether the lines are named below the chart.
    """
    shown = [(i, line) for i, line in enumerate(map(thin, lines)) if len(line.x)]
    if not shown:
        return None
    xs = np.concatenate([line.x for _, line in shown])
    ys = np.concatenate([line.y for _, line in shown] + [np.array([0.0, highest])])
    left, top, right, bottom = 56, 10, 1186, 118
    x_ticks, y_ticks = ticks(xs.min(), xs.max()), ticks(ys.min(), ys.max(), 3)
    curves = []
    for i, line in shown:
        x, y = _pixels(line.x, x_ticks, left, right), _pixels(line.y, y_ticks, bottom, top)
        dashes = " ".join(f"{STROKE * length:g}" for length in DASHES[i % len(DASHES)]) or "none"
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        curves.append(Curve(line.name, COLOURS[i % len(COLOURS)], dashes, points))
    return Chart(
        "seconds", "entropy, nats", 1200, 164 + 18 * len(curves) * legend, left, top, right, bottom,
        _labelled(x_ticks, left, right), _labelled(y_ticks, bottom, top), curves=curves, legend=legend,
    )  # fmt: skip


def entropy_histogram(counts: np.ndarray, edges: np.ndarray) -> Chart | None:
    """Return a histogram of entropies, None if all counts are 0.

    Args:
        counts: Number of frames per bin [n].
        edges: Ascending edges of the bins in nats [n + 1].
    """
    if not counts.any():
        return None
    left, top, right, bottom = 64, 10, 626, 198
    x_ticks, y_ticks = ticks(edges[0], edges[-1]), ticks(0.0, counts.max(), 4)
    x, y = _pixels(edges, x_ticks, left, right), _pixels(counts, y_ticks, bottom, top)
    bars = np.stack([x[:-1] + 0.5, y, np.diff(x) - 1, bottom - y], axis=1).round(1)
    return Chart(
        "entropy, nats", "frames", 640, 240, left, top, right, bottom,
        _labelled(x_ticks, left, right), _labelled(y_ticks, bottom, top), bars=bars.tolist(),
    )  # fmt: skip


def ticks(low: float, high: float, count: int = 6) -> np.ndarray:
    """Return about `count` round numbers that cover the range from `low` to `high`."""
    if not high > low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999999)
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


def tick_labels(values: np.ndarray) -> list[str]:
    """Format numbers with as many decimals as their step requires, and spaced thousands."""
    step = float(values[1] - values[0])
    decimals = next((d for d in range(12) if abs(round(step, d) - step) < step * 1e-6), 12)
    texts = (f"{abs(value):,.{decimals}f}".replace(",", "\u202f") for value in values)
    return [
        ("−" if value < -step / 2 else "") + text for value, text in zip(values, texts, strict=True)
    ]


def thin(line: Line) -> Line:
    """Return at most MAX_POINTS finite points of a line.

    Neighbouring points are averaged, so that noise does not hide the trend.
    """
    finite = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = (
        np.asarray(line.x, dtype=np.float64)[finite],
        np.asarray(line.y, dtype=np.float64)[finite],
    )
    if len(x) > MAX_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(v, MAX_POINTS)]) for v in (x, y))
    return Line(line.name, x, y)


def _pixels(values: np.ndarray, ticks: np.ndarray, start: int, end: int) -> NDArray[np.float64]:
    """Return the pixels of values on an axis whose first and last tick are at `start` and `end`."""
    return np.asarray(start + (values - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start))


def _labelled(ticks: np.ndarray, start: int, end: int) -> list[tuple[float, str]]:
    positions = _pixels(ticks, ticks, start, end).round(1).tolist()
    return list(zip(positions, tick_labels(ticks), strict=True))
