"""Two small charts, curves and a histogram, for pages that show dozens of them.

Positions are computed here; the macro `chart` of templates/macros.html.j2 draws them as inline SVG
of a few kilobytes, a hundred times faster than matplotlib, which draws the figures of reports.
Colours and dashes are those of all charts and figures. The colours are Okabe and Ito's, told apart
by colour-blind readers; lines differ in dash as well, so that a grey print can be read.
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
STROKE = 2  # width of a curve in pixels, as in the template
MAX_POINTS = 400  # of a line; more cannot be told apart at this width


@dataclass(frozen=True)
class Line:
    """One named curve: x[n] ascending, y[n]; points that are not finite are left out."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A line as it is drawn: `points` is "x,y x,y …" in pixels, `dashes` as SVG takes them."""

    name: str
    colour: str
    dashes: str
    points: str


@dataclass(frozen=True)
class Chart:
    """A chart in pixels: edges of the plot, ticks with labels, bars as x, y, width and height."""

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
        lines: Curves; each keeps its colour where another one is empty.
        highest: The y axis covers 0 to this entropy.
        legend: Whether the lines are named below the chart.
    """
    drawn = [(i, line) for i, line in enumerate(map(thin, lines)) if len(line.x)]
    if not drawn:
        return None
    xs = np.concatenate([line.x for _, line in drawn])
    ys = np.concatenate([line.y for _, line in drawn] + [np.array([0.0, highest])])
    left, top, right, bottom = 56, 10, 1186, 118
    x_ticks, y_ticks = ticks(xs.min(), xs.max()), ticks(ys.min(), ys.max(), 3)
    curves = []
    for i, line in drawn:
        x, y = _place(line.x, x_ticks, left, right), _place(line.y, y_ticks, bottom, top)
        dashes = " ".join(f"{STROKE * length:g}" for length in DASHES[i % len(DASHES)]) or "none"
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        curves.append(Curve(line.name, COLOURS[i % len(COLOURS)], dashes, points))
    return Chart(
        "seconds", "entropy, nats", 1200, 164 + 18 * len(curves) * legend, left, top, right, bottom,
        _labelled(x_ticks, left, right), _labelled(y_ticks, bottom, top), curves=curves, legend=legend,
    )  # fmt: skip


def entropy_histogram(counts: np.ndarray, edges: np.ndarray) -> Chart | None:
    """Return a histogram of counts [n] between ascending edges [n + 1] in nats; None if all are 0.

    The counts are of frames.
    """
    if not counts.any():
        return None
    left, top, right, bottom = 64, 10, 626, 198
    x_ticks, y_ticks = ticks(edges[0], edges[-1]), ticks(0.0, counts.max(), 4)
    x, y = _place(edges, x_ticks, left, right), _place(counts, y_ticks, bottom, top)
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

    Each is the mean of its neighbours, so that noise does not hide the trend.
    """
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = np.asarray(line.x, dtype=np.float64)[keep], np.asarray(line.y, dtype=np.float64)[keep]
    if len(x) > MAX_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(v, MAX_POINTS)]) for v in (x, y))
    return Line(line.name, x, y)


def _place(values: np.ndarray, ticks: np.ndarray, start: int, end: int) -> NDArray[np.float64]:
    """Return the pixels of values on an axis whose first and last tick are at `start` and `end`."""
    return np.asarray(start + (values - ticks[0]) / (ticks[-1] - ticks[0]) * (end - start))


def _labelled(ticks: np.ndarray, start: int, end: int) -> list[tuple[float, str]]:
    places = _place(ticks, ticks, start, end).round(1).tolist()
    return list(zip(places, tick_labels(ticks), strict=True))
