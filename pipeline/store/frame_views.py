"""Views of a frame that a teacher's output can be stored of: whole, in cells, and mirrored.

Each is a separate teacher of the store, so that all that is true of teachers is true of it:
NAME, NAME.flip (of the mirrored frame), NAME.features, NAME.features.flip, NAME.features.grid4
(4 × 4 cells of the last feature map), NAME.features.grid4.flip. Free of torch.

Shapes: G cells per side, D features of a cell, n rows.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..common.errors import UsageError
from .store_options import Output

CENTER, FLIP = "center", "flip"
SMALLEST_GRID, LARGEST_GRID = 2, 8
VIEWS_ALLOWED = f"center, flip next to another, grid:G (G from {SMALLEST_GRID} to {LARGEST_GRID})"
_GRID = re.compile(rf"grid:([{SMALLEST_GRID}-{LARGEST_GRID}])")


def check_views(views: Collection[str]) -> tuple[str, ...]:
    """Return views in one order: center, grids, flip.

    Raises:
        UsageError: One is not allowed, is named twice, or nothing is mirrored.
    """
    shown = ",".join(views)
    grids = sorted(view for view in views if _GRID.fullmatch(view))
    known = [*([CENTER] if CENTER in views else []), *grids]
    if not known or len(known) + (FLIP in views) != len(views):
        raise UsageError(f"--views {shown}: allowed: {VIEWS_ALLOWED}")
    return (*known, *([FLIP] if FLIP in views else []))


@dataclass(frozen=True)
class OutputView:
    """What one teacher of a store holds: an output of a view of each frame.

    grid: cells per side, 0 where the picture is pooled as a whole.
    """

    output: Output
    grid: int = 0
    mirrored: bool = False

    @property
    def key(self) -> str:
        """Its name among a model's outputs, as `logits` or `features.grid4.flip`."""
        grid = f".grid{self.grid}" if self.grid else ""
        return f"{self.output}{grid}{'.flip' if self.mirrored else ''}"

    @property
    def views(self) -> tuple[str, ...]:
        """What `--views` has to be for it; it is the last of the outputs that this makes."""
        return (f"grid:{self.grid}" if self.grid else CENTER, *([FLIP] if self.mirrored else []))

    @classmethod
    def of(cls, key: str) -> OutputView:
        """Return the view that a `key` names."""
        output: Output = "features" if key.startswith("features") else "logits"
        grid = re.search(r"\.grid(\d)", key)
        return cls(output, int(grid[1]) if grid else 0, key.endswith(".flip"))

    def store_name(self, name: str) -> str:
        """Return the name in a store, of the teacher `name`."""
        return name + self.key.removeprefix("logits") if self.output == "logits" else (
            f"{name}.{self.key}"
        )  # fmt: skip


def output_keys(outputs: Iterable[Output], views: Collection[str]) -> tuple[str, ...]:
    """Return the keys of all outputs in all views; logits have no cells, and are of the centre."""
    grids = [int(match[1]) for view in views if (match := _GRID.fullmatch(view))]
    plain = [
        OutputView(output, grid)
        for output in outputs
        for grid in (
            ([0] if CENTER in views else []) + grids if output == "features" else [0]
        )
    ]  # fmt: skip
    return tuple(
        OutputView(view.output, view.grid, mirrored).key
        for view in plain
        for mirrored in ((False, True) if FLIP in views else (False,))
    )
