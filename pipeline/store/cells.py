"""Cells of a frame's feature map: which of them a region covers, and their average there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..video.region import Region


def roi_average(cells: NDArray[np.float32], region: Region) -> NDArray[np.float32]:
    """Return the average [n, D] of cells [n, G, G, D] by the area that `region` has of each.

    region: in shares of the picture that the cells cover.
    """
    down = shares(region.top, region.bottom, cells.shape[1])
    across = shares(region.left, region.right, cells.shape[2])
    weights = np.outer(down, across).astype(np.float32).ravel()
    flat = cells.reshape(len(cells), len(weights), -1)
    return np.asarray(np.matmul(weights, flat), np.float32)


def shares(first: float, end: float, count: int) -> NDArray[np.float64]:
    """Return which shares of the interval [first, end] are in `count` equal parts of [0, 1].

    What is outside [0, 1] does not count; an interval that is outside as a whole is in the nearest
    part.
    """
    edges = np.arange(count + 1) / count
    overlap = np.clip(np.minimum(end, edges[1:]) - np.maximum(first, edges[:-1]), 0, None)
    if overlap.sum() <= 0:
        overlap[0 if end <= 0 else -1] = 1.0
    return np.asarray(overlap / overlap.sum())
