"""PSNR and SSIM between the pictures of a copy and the encoded pictures, in NumPy."""

from __future__ import annotations

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Stands for the PSNR of equal pictures, which is infinite.
SAME_DB = 100.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 pictures [h, w, 3]; at most 100.

    The mean squared error is taken over all channels.
    """
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return min(SAME_DB, 10 * float(np.log10(255**2 / error))) if error else SAME_DB


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Return the structural similarity of the luma of two uint8 pictures [h, w, 3].

    Wang, Bovik, Sheikh, Simoncelli 2004, eq. 13, with the paper's Gaussian window (11, σ = 1.5),
    over all whole windows. For a side below 11 pixels the window has that size.
    """
    x, y = a.astype(np.float64) @ _LUMA, b.astype(np.float64) @ _LUMA
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    numerator = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
    return float(np.mean(numerator / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))))


def _blur(image: np.ndarray) -> np.ndarray:
    """Return the Gaussian mean of each whole window of an image [h, w]."""
    for axis in (0, 1):
        size = min(_WINDOW, image.shape[axis])
        weights = np.exp(-((np.arange(size) - (size - 1) / 2) ** 2) / (2 * _SIGMA**2))
        windows = np.lib.stride_tricks.sliding_window_view(image, size, axis=axis)
        image = windows @ (weights / weights.sum())
    return image
