"""Softmax and entropy in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def entropy(logits: ArrayLike) -> NDArray[np.float32]:
    """Entropy in nats of the softmax at τ = 1, ``logits[..., K] -> [...]``; 0 is certain, ln K
    uniform.

    H = log Σ exp z − Σ p z, with z shifted by its maximum: no logarithm of a vanishing p is taken.
    """
    z = np.asarray(logits, dtype=np.float32)
    z = z - z.max(axis=-1, keepdims=True)
    e = np.exp(z)
    total = e.sum(axis=-1)
    h = np.log(total) - (e * z).sum(axis=-1) / total
    return np.asarray(np.maximum(h, 0), dtype=np.float32)
