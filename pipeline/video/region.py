"""Rectangles of a displayed frame. Imports no NumPy, so that options can use them."""

from __future__ import annotations

from typing import NamedTuple


class Region(NamedTuple):
    """A rectangle of a picture, in shares of its height and width."""

    top: float
    left: float
    bottom: float
    right: float

    @classmethod
    def from_pixels(
        cls, top: float, left: float, size: tuple[float, float], picture: tuple[float, float]
    ) -> Region:
        """Return the rectangle of `size` (height, width) pixels at (top, left) of a picture."""
        height, width = picture
        return cls(top / height, left / width, (top + size[0]) / height, (left + size[1]) / width)

    def mirrored(self) -> Region:
        """Return the same rectangle of the picture mirrored left to right."""
        return Region(self.top, 1 - self.right, self.bottom, 1 - self.left)

    def inside(self, outer: Region) -> Region:
        """Return this rectangle in shares of another rectangle of the same picture."""
        height, width = outer.bottom - outer.top, outer.right - outer.left
        return Region(
            (self.top - outer.top) / height,
            (self.left - outer.left) / width,
            (self.bottom - outer.top) / height,
            (self.right - outer.left) / width,
        )
