"""Two small charts as inline SVG: lines over time, and histograms. For a page that shows dozens of
them.

SVG written here needs no network, prints sharp and weighs a few kilobytes. The colours are Okabe
and Ito's, told apart by colour-blind readers; lines differ in dash as well, so that a grey print
can be read.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
MAX_POINTS = 400  # of a line; more cannot be told apart at this width


@dataclass(frozen=True)
class Line:
    """One named curve: x[n] ascending, y[n]; points that are not finite are left out."""

    name: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Bars:
    """A histogram: counts[n] between edges[n + 1], ascending."""

    edges: np.ndarray
    counts: np.ndarray


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    width: int = 640,
    height: int = 300,
    y_range: tuple[float, float] | None = None,
    legend: bool = True,
) -> str:
    """An <svg> with axes, gridlines and, unless told otherwise, a legend; an empty string where
    there is nothing to draw.

    y_range: what the y axis spans at least, by default what the lines span.
    """
    drawn = [(i, thin(line)) for i, line in enumerate(lines)]
    drawn = [(i, line) for i, line in drawn if len(line.x)]
    if not drawn:
        return ""
    xs = np.concatenate([line.x for _, line in drawn])
    ys = np.concatenate([line.y for _, line in drawn])
    bounds = np.concatenate([ys, y_range or []])
    frame = _Frame(
        left=56, top=10, right=width - 14, bottom=height - 42,
        x_ticks=ticks(float(xs.min()), float(xs.max())),
        y_ticks=ticks(float(bounds.min()), float(bounds.max()), 6 if height >= 250 else 3),
    )  # fmt: skip
    parts = [frame.axes(x_label, y_label)]
    for row, (i, line) in enumerate(drawn):
        style = _stroke(i)
        points = " ".join(
            f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True)
        )
        if len(line.x) == 1:
            parts.append(
                f'<circle cx="{frame.x(line.x[0]):.1f}" cy="{frame.y(line.y[0]):.1f}" r="3" {_fill(i)}/>'
            )
        parts.append(f'<polyline fill="none" {style} points="{points}"/>')
        if not legend:
            continue
        y = height + 14 + 18 * row
        parts.append(
            f'<line x1="{frame.left}" x2="{frame.left + 28}" y1="{y - 4}" y2="{y - 4}" {style}/>'
        )
        parts.append(f'<text x="{frame.left + 36}" y="{y}">{html.escape(line.name)}</text>')
    return _svg(width, height + 18 * len(drawn) * legend + 4, f"{y_label} by {x_label}", parts)


def bar_chart(
    bars: Bars, *, x_label: str, y_label: str, width: int = 640, height: int = 240
) -> str:
    """An <svg> of a histogram; an empty string where all counts are 0."""
    if not bars.counts.any():
        return ""
    frame = _Frame(
        left=64, top=10, right=width - 14, bottom=height - 42,
        x_ticks=ticks(float(bars.edges[0]), float(bars.edges[-1])), y_ticks=ticks(0.0, float(bars.counts.max()), 4),
    )  # fmt: skip
    parts = [frame.axes(x_label, y_label)]
    for low, high, count in zip(bars.edges[:-1], bars.edges[1:], bars.counts, strict=True):
        x, y = frame.x(low), frame.y(count)
        size = f'width="{frame.x(high) - x - 1:.1f}" height="{frame.bottom - y:.1f}"'
        parts.append(f'<rect x="{x + 0.5:.1f}" y="{y:.1f}" {size} {_fill(0)}/>')
    return _svg(width, height, f"{y_label} by {x_label}", parts)


def ticks(low: float, high: float, wanted: int = 6) -> np.ndarray:
    """Round numbers, at most about `wanted`, from at or below `low` to at or above `high`."""
    if not high > low:
        pad = abs(low) * 0.05 or 0.5
        low, high = low - pad, high + pad
    rough = (high - low) / wanted
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999999)
    return np.arange(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1) * step


@dataclass(frozen=True)
class _Frame:
    """The plotted rectangle in pixels and the ticks that span it."""

    left: float
    top: float
    right: float
    bottom: float
    x_ticks: np.ndarray
    y_ticks: np.ndarray

    def x(self, value: float) -> float:
        return self.left + (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0]) * (
            self.right - self.left
        )

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0]) * (
            self.bottom - self.top
        )

    def axes(self, x_label: str, y_label: str, *, y_axis: bool = True) -> str:
        parts = []
        for tick, label in zip(self.x_ticks, tick_labels(self.x_ticks), strict=True):
            x = f"{self.x(tick):.1f}"
            parts.append(
                f'<line x1="{x}" x2="{x}" y1="{self.top}" y2="{self.bottom}" class="grid"/>'
            )
            parts.append(
                f'<text x="{x}" y="{self.bottom + 16}" text-anchor="middle">{label}</text>'
            )
        for tick, label in (
            zip(self.y_ticks, tick_labels(self.y_ticks), strict=True) if y_axis else ()
        ):
            y = f"{self.y(tick):.1f}"
            parts.append(
                f'<line x1="{self.left}" x2="{self.right}" y1="{y}" y2="{y}" class="grid"/>'
            )
            parts.append(
                f'<text x="{self.left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{label}</text>'
            )
        middle = (self.left + self.right) / 2
        parts.append(
            f'<text x="{middle}" y="{self.bottom + 34}" text-anchor="middle">{html.escape(x_label)}</text>'
        )
        if y_axis:
            at = f"14 {(self.top + self.bottom) / 2:.1f}"
            x, y = at.split()
            parts.append(
                f'<text x="{x}" y="{y}" transform="rotate(-90 {at})" text-anchor="middle">{html.escape(y_label)}</text>'
            )
        return "".join(parts)


def tick_labels(values: np.ndarray) -> list[str]:
    """All with as many decimals as the step between them needs; thousands set apart."""
    step = float(values[1] - values[0])
    decimals = next((d for d in range(12) if abs(round(step, d) - step) < step * 1e-6), 12)
    texts = (f"{abs(value):,.{decimals}f}".replace(",", "\u202f") for value in values)
    return [
        ("−" if value < -step / 2 else "") + text for value, text in zip(values, texts, strict=True)
    ]


def thin(line: Line) -> Line:
    """At most MAX_POINTS points, each the mean of its neighbours, so that noise does not hide the
    trend."""
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = np.asarray(line.x, dtype=np.float64)[keep], np.asarray(line.y, dtype=np.float64)[keep]
    if len(x) > MAX_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(v, MAX_POINTS)]) for v in (x, y))
    return Line(line.name, x, y)


def _stroke(i: int, *, dashed: bool = True) -> str:
    dash = DASHES[i % len(DASHES)] if dashed else ""
    return f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _fill(i: int) -> str:
    return f'fill="{COLOURS[i % len(COLOURS)]}"'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{html.escape(title)}">' + "".join(parts) + "</svg>"
    )
