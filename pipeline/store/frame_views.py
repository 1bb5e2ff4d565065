"""Views of a frame whose teacher outputs can be stored: whole, in cells, and mirrored.

Each view is a separate teacher of the store and is handled like any other teacher:
NAME, NAME.flip (of the mirrored frame), NAME.features, NAME.features.flip, NAME.features.grid4
(4 × 4 cells of the last feature map), NAME.features.grid4.flip. This module does not import torch.

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
    """Return the views in a fixed order: center, grids, flip.

    Raises:
        UsageError: A view is not allowed or named twice, or flip is the only one.
    """
    grids = sorted(view for view in views if _GRID.fullmatch(view))
    unmirrored = [*([CENTER] if CENTER in views else []), *grids]
    if not unmirrored or len(unmirrored) + (FLIP in views) != len(views):
        raise UsageError(f"--views {','.join(views)}: allowed: {VIEWS_ALLOWED}")
    return (*unmirrored, *([FLIP] if FLIP in views else []))


@dataclass(frozen=True)
class OutputView:
    """Output and view of the frames that one teacher of a store holds.

    grid: cells per side, 0 where the frame is pooled as a whole.
    """

    output: Output
    grid: int = 0
    mirrored: bool = False

    @property
    def key(self) -> str:
        """Name among a model's outputs, such as `logits` or `features.grid4.flip`."""
        grid = f".grid{self.grid}" if self.grid else ""
        return f"{self.output}{grid}{'.flip' if self.mirrored else ''}"

    @property
    def views(self) -> tuple[str, ...]:
        """Value of `--views` that produces this output; it is the last of those produced."""
        return (f"grid:{self.grid}" if self.grid else CENTER, *([FLIP] if self.mirrored else []))

    @classmethod
    def of(cls, key: str) -> OutputView:
        """Parse a `key`."""
        output: Output = "features" if key.startswith("features") else "logits"
        grid = re.search(r"\.grid(\d)", key)
        return cls(output, int(grid[1]) if grid else 0, key.endswith(".flip"))

    def store_name(self, name: str) -> str:
        """Return the name that this view of the teacher `name` has in a store."""
        return name + self.key.removeprefix("logits") if self.output == "logits" else (
            f"{name}.{self.key}"
        )  # fmt: skip


def output_keys(outputs: Iterable[Output], views: Collection[str]) -> tuple[str, ...]:
    """Return the keys of all outputs in all views; logits have no cells, only the whole frame."""
    grids = [int(match[1]) for view in views if (match := _GRID.fullmatch(view))]
    unmirrored = [
        OutputView(output, grid)
        for output in outputs
        for grid in (
            ([0] if CENTER in views else []) + grids if output == "features" else [0]
        )
    ]  # fmt: skip
    return tuple(
        OutputView(view.output, view.grid, mirrored).key
        for view in unmirrored
        for mirrored in ((False, True) if FLIP in views else (False,))
    )
