"""Where the test clips of a video begin, and which frames a clip reads."""

from __future__ import annotations

import numpy as np


def clip_starts(n_frames: int, need: int, k: int = 10) -> np.ndarray:
    """starts[k], int64: ⌊i·(n_frames − need)/(k − 1)⌋ for i = 0 … k−1.

    `need` is the number of frames a clip spans. A video shorter than that starts every clip at 0; a
    single clip (k = 1) starts in the middle.

    >>> clip_starts(26, 8, 10).tolist()    # 18 free frames, a step of 2
    [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    """
    if n_frames < 1 or need < 1 or k < 1:
        raise ValueError(f"n_frames, need and k must be at least 1, got {n_frames}, {need}, {k}")
    free = max(n_frames - need, 0)
    if k == 1:
        return np.array([free // 2], dtype=np.int64)
    return np.arange(k, dtype=np.int64) * free // (k - 1)


def clip_frames(start: int, need: int, n_frames: int) -> np.ndarray:
    """indices[need], int64: consecutive frames from `start`, the last frame repeated past the
    end."""
    return np.minimum(np.arange(start, start + need, dtype=np.int64), n_frames - 1)
