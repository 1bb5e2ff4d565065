"""One way to draw a figure of the report: matplotlib without a display, to SVG and PNG alike.

Colours and dashes are those of `charts`. The same data give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.hashsalt": "distinit",
}


@dataclass(frozen=True)
class Figure:
    """One drawn figure. name: of its files. caption: what to see in it. about: names of the runs
    (or stores) behind it.

    table: its numbers, where they say more than the picture.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes
    about: Sequence[str] = field(default_factory=tuple)
    table: Table | None = None


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures, for what is drawn inside; matplotlib's own settings are as before
    afterwards."""
    with matplotlib.rc_context(STYLE):
        yield


def new_canvas(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Canvas, list[Axes]]:
    """A canvas of so many inches with rows × columns axes, row by row."""
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
    """Both forms of what was drawn."""
    svg, png = io.BytesIO(), io.BytesIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    # Texts are drawn as paths and repeated in comments.
    drawn = printable(svg.getvalue().decode(), lines=True).encode()
    return Figure(name, title, caption, drawn, png.getvalue(), tuple(about), table)


def colour(i: int) -> str:
    """The i-th of a few."""
    return COLOURS[i % len(COLOURS)]


def line_style(i: int) -> tuple[int, tuple[float, ...] | None]:
    """Return the dashes of the i-th of a few lines, as matplotlib takes them."""
    return 0, DASHES[i % len(DASHES)] or None


def short(name: str, most: int = 44) -> str:
    """A name that fits next to an axis: long ones lose their middle."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
