"""Rectangles of a displayed frame, and the shares of an interval in equal parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Region(NamedTuple):
    """A rectangle of a picture, in shares of its height and width."""

    top: float
    left: float
    bottom: float
    right: float

    @classmethod
    def of_pixels(
        cls, top: float, left: float, size: tuple[float, float], picture: tuple[float, float]
    ) -> Region:
        """Return the rectangle of `size` (height, width) pixels at (top, left) of a picture."""
        height, width = picture
        return cls(top / height, left / width, (top + size[0]) / height, (left + size[1]) / width)

    def mirrored(self) -> Region:
        """Return the same rectangle of the picture mirrored left to right."""
        return Region(self.top, 1 - self.right, self.bottom, 1 - self.left)

    def inside(self, outer: Region) -> Region:
        """Return this rectangle in shares of another of the same picture."""
        height, width = outer.bottom - outer.top, outer.right - outer.left
        return Region(
            (self.top - outer.top) / height,
            (self.left - outer.left) / width,
            (self.bottom - outer.top) / height,
            (self.right - outer.left) / width,
        )


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
