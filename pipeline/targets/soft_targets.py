"""Temporal averaging, soft targets and entropy: equation 1 of the paper.

The paper averages the picked frames' logits first and takes one softmax of the mean; the mean of
softmaxes is another target. Entropies are in nats and always at temperature 1, whatever temperature
the student's targets use. NumPy, float32 in and out; the loss has its own tensors.

Shapes: n picked frames, K classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..common.numerics import softmax


def mean_outputs(outputs: ArrayLike) -> NDArray[np.float32]:
    """Return the mean over frames of logits or features [..., n, K], [..., K] (eq. 1 before τ)."""
    given = np.asarray(outputs, dtype=np.float32)
    if given.shape[-2] == 1:
        return given[..., 0, :]
    return given.mean(axis=-2, dtype=np.float32)


def soft_targets(mean: ArrayLike, tau: float = 1.0) -> NDArray[np.float32]:
    """Return the distribution over classes of averaged logits [..., K] (eq. 1)."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return softmax(np.asarray(mean, dtype=np.float32) / np.float32(tau))
