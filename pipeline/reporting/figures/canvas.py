"""Draw figures of a report with matplotlib, without a display, as SVG and PNG.

Colours and dashes are those of `charts`. Equal data give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ...common.streams import printable
from ...common.tables import Table
from ..charts import COLOURS, DASHES

MARKERS = "osD^vP*Xhd"
INK, SOFT, RULE = "#1a1a1a", "#5c5c5c", "#d9d9d9"
PNG_DPI = 160
# Inches; narrower figures are next to each other if the window is wide enough.
WIDE = 10
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    # This font is part of matplotlib, so that pictures are the same on every machine.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    # A dollar sign in a name must not start a formula.
    "text.parse_math": False,
    "svg.hashsalt": "distinit",
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        name: Name of its files.
        title: Its title.
        caption: How to read it.
        svg: The figure as SVG.
        png: The figure as PNG.
        about: Names of the runs or stores that it shows.
        table: Its numbers, None if the picture shows them well.
        wide: Whether it takes the full width of the page.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes
    about: Sequence[str] = ()
    table: Table | None = None
    wide: bool = False


@contextmanager
def styled() -> Iterator[None]:
    """Use the style of all figures inside the context."""
    with matplotlib.rc_context(STYLE):
        yield


def new_canvas(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Canvas, list[Axes]]:
    """Create a canvas with a size in inches and rows × columns axes, listed row by row."""
    canvas = Canvas(figsize=(width, height), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False)
    return canvas, list(axes.ravel())


def finish(
    canvas: Canvas,
    name: str,
    title: str,
    caption: str,
    about: Sequence[str] = (),
    table: Table | None = None,
) -> Figure:
    """Save a canvas as SVG and PNG."""
    svg, png = io.BytesIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    # Texts are drawn as paths, but comments contain them as well.
    drawn = printable(svg.getvalue().decode(), lines=True).encode()
    wide = canvas.get_figwidth() > WIDE
    return Figure(name, title, caption, drawn, png.getvalue(), tuple(about), table, wide)


def colour(i: int) -> str:
    """Return the colour of the i-th line."""
    return COLOURS[i % len(COLOURS)]


def line_style(i: int) -> tuple[int, tuple[float, ...] | None]:
    """Return the `linestyle` of matplotlib for the i-th line."""
    return 0, DASHES[i % len(DASHES)] or None


def short(name: str, length: int = 44) -> str:
    """Shorten a name to fit next to an axis, by removing its middle."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length // 2) :]}"
