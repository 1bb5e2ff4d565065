"""Softmax and entropy in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

F = TypeVar("F", bound=np.floating[Any])


def softmax(logits: NDArray[F]) -> NDArray[F]:
    """Return probabilities, ``logits[..., K] -> p[..., K]``, in the type of the logits."""
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True), logits.dtype)


def best_classes(p: NDArray[F], classes: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Return the `count` most probable classes with their probabilities, ``p[K]``, best first."""
    return [(classes[k], float(p[k])) for k in np.argsort(-p, kind="stable")[:count]]


def log_softmax(logits: NDArray[F]) -> NDArray[F]:
    """Return the logarithm of `softmax`, computed without the logarithm of a vanishing p."""
    z = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)), logits.dtype)


def entropy(logits: ArrayLike) -> NDArray[np.float32]:
    """Return the entropy in nats of the softmax at τ = 1, ``logits[..., K] -> [...]``.

    0 is certain, ln K uniform. H = log Σ exp z − Σ p z, with z shifted by its maximum, avoids the
    logarithm of a vanishing p.
    """
    z = np.asarray(logits, dtype=np.float32)
    z = z - z.max(axis=-1, keepdims=True)
    e = np.exp(z)
    total = e.sum(axis=-1)
    h = np.log(total) - (e * z).sum(axis=-1) / total
    return np.asarray(np.maximum(h, 0), dtype=np.float32)


def distribution_entropy(p: NDArray[F]) -> NDArray[F]:
    """Return the entropy in nats, ``p[..., K] -> [...]``; a probability of 0 adds nothing."""
    return np.asarray(-(p * np.log(np.maximum(p, np.finfo(p.dtype).tiny))).sum(axis=-1))
