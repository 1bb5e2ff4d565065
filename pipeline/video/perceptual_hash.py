"""Two 64-bit hashes of a cached frame, by which a store is attached to other copies of its videos.

P describes the picture and R the changes in it: all pictures of one fixed camera have nearly the
same P. docs/store-format.md defines both, with test vectors.

Shapes: n frames.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .geometry import View

SIDE = 32
HASH_VIEW = View(resize=(SIDE, SIDE), interpolation="area")
"""The picture of a frame that is hashed, after rotation, cropping and pixel aspect ratio."""
LOW = 8  # frequencies kept in each direction
DIGITS = 6
"""Decimals to which coefficients are rounded, so that those of flat and symmetric pictures do not
depend on the order of additions."""

_k, _x = np.mgrid[0 : LOW + 1, 0:SIDE]
_COSINES = np.cos(math.pi * (2 * _x + 1) * _k / (2 * SIDE)) * math.sqrt(2 / SIDE)
_COSINES[0] /= math.sqrt(2)


def grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the BT.601 luma [n, 32, 32] of RGB pictures uint8 [n, 32, 32, 3].

    (19595 R + 38470 G + 7471 B + 32768) >> 16. All sums are whole numbers below 2²⁴, so that
    float32, which is several times faster, is exact.
    """
    weighted = images.astype(np.float32) @ np.array([19595, 38470, 7471], np.float32)
    return np.asarray((weighted + 32768) / 65536, np.float32).astype(np.uint8)


def hash_p(pictures: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return hash P [n] of grey pictures [n, 32, 32]: which coefficients exceed their median."""
    coefficients = _coefficients(pictures.astype(np.float64))
    return _pack(coefficients > np.median(coefficients, axis=1, keepdims=True))


def hash_r(pictures: NDArray[np.uint8]) -> tuple[NDArray[np.uint64], NDArray[np.float16]]:
    """Return hash R [n] of the cached frames of one segment [n, 32, 32], and their deviations [n].

    A deviation is the root mean square of a picture's difference from the mean picture.
    """
    if not len(pictures):
        return np.empty(0, np.uint64), np.empty(0, np.float16)
    difference = pictures - pictures.sum(axis=0, dtype=np.int64) / len(pictures)
    coefficients = _coefficients(difference)
    rms = np.sqrt((difference**2).mean(axis=(1, 2)))
    return _pack(coefficients > 0), rms.astype(np.float16)


def _coefficients(pictures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 64 lowest coefficients of the orthonormal DCT-II [n, 64], row by row.

    Coefficient (8, 0) replaces coefficient (0, 0), the mean brightness.
    """
    coefficients = _COSINES @ pictures @ _COSINES[:LOW].T
    low = coefficients[:, :LOW].reshape(len(coefficients), LOW * LOW)
    low[:, 0] = coefficients[:, LOW, 0]
    return np.asarray(low.round(DIGITS))


def _pack(bits: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return bits [n, 64] as numbers [n], the first bit as the most significant one."""
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).ravel()
