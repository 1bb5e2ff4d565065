"""Softmax and entropy against the formulas in float64, and against SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from distinit.pipeline.common.numerics import distribution_entropy, entropy, log_softmax, softmax


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [0.01, 1, 30, 1000])
def test_softmax_and_entropy_are_those_of_scipy(dtype: Any, scale: float) -> None:
    logits = (np.random.default_rng(0).normal(size=(5, 3, 40)) * scale).astype(dtype)
    p = softmax(logits)
    error = 1e-5 if dtype == np.float32 else 1e-12
    assert p.dtype == log_softmax(logits).dtype == dtype
    np.testing.assert_allclose(p, special.softmax(logits.astype(np.float64), -1), atol=error)
    np.testing.assert_allclose(
        log_softmax(logits),
        special.log_softmax(logits.astype(np.float64), -1),
        rtol=error,
        atol=error,
    )
    nats = stats.entropy(special.softmax(logits.astype(np.float64), -1), axis=-1)
    np.testing.assert_allclose(distribution_entropy(p), nats, atol=20 * error)
    np.testing.assert_allclose(entropy(logits), nats, atol=2e-4)


def test_a_certain_and_a_uniform_distribution() -> None:
    np.testing.assert_array_equal(distribution_entropy(np.eye(4)), np.zeros(4))
    assert distribution_entropy(np.full(4, 0.25)) == pytest.approx(np.log(4))
