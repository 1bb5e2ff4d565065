"""Probe images that every machine draws alike, and how far two teachers are apart on them."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from distinit.pipeline.teachers.fingerprint import NUM_PROBES, Difference, Fingerprint
from distinit.pipeline.teachers.probes import look_like_probabilities, probe_images

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(NUM_PROBES, 50)).astype(np.float32)


def test_probe_images_are_the_same_everywhere() -> None:
    images = probe_images(224, 224)
    assert (images.shape, images.dtype) == ((NUM_PROBES, 224, 224, 3), np.uint8)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "9f4a7f676846ebdf"
    assert all(image.std() > 20 for image in images)
    for size in ((1, 1), (2, 7), (331, 299)):
        assert probe_images(*size).shape == (NUM_PROBES, *size, 3)


def test_a_record_keeps_every_bit() -> None:
    logits = LOGITS.copy()
    logits[0, :3] = np.nan, np.inf, -np.inf
    made = Fingerprint(logits, "2.0", "cpu")
    record = json.loads(json.dumps(made.record(), allow_nan=False))
    np.testing.assert_array_equal(Fingerprint.parse(record, "x").values, logits)
    assert made.differs(Fingerprint.parse(record, "x")) is None
    assert made.differs(replace(made, values=LOGITS)) is not None


def test_a_constant_of_each_class_hides_nothing() -> None:
    constant = RNG.normal(size=50).astype(np.float32) * 20
    off = Difference.of(LOGITS + constant, 1.05 * LOGITS + constant)
    assert off.rms > 0.02
    assert Difference.of(LOGITS, LOGITS) == Difference(0, 0)
    assert Difference.of(0 * LOGITS, 0 * LOGITS) == Difference(0, 0)
    assert math.isinf(Difference.of(LOGITS, np.where(LOGITS > 2, np.nan, LOGITS)).rms)


@pytest.mark.parametrize(
    ("torch", "device", "largest"),
    [("2.0", "cpu", 1e-3), ("2.1", "cpu", 0.3), ("2.0", "cuda", 0.3)],
)
def test_another_processor_or_torch_may_be_further_off(
    torch: str, device: str, largest: float
) -> None:
    made, other = Fingerprint(LOGITS, "2.0", "cpu"), Fingerprint(LOGITS, torch, device)
    assert made.tolerance(other)[1] == largest
    rough = LOGITS.astype(np.float16).astype(np.float32)
    assert (
        made.tolerance(replace(other, values=rough))[1] == largest
    )  # only one of the two is rounded
    assert (
        replace(made, values=rough).tolerance(replace(other, values=rough))[1] > largest
        or largest == 0.3
    )


def test_what_looks_like_probabilities() -> None:
    softmax = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    for probabilities in (softmax, 100 * softmax, 1 / (1 + np.exp(-LOGITS))):
        assert look_like_probabilities(probabilities)
    for logits in (
        LOGITS,
        np.log(softmax),
        np.maximum(LOGITS, 0),
        0 * LOGITS,
        LOGITS[:, :1] ** 2,
        softmax * np.nan,
    ):
        assert not look_like_probabilities(logits)
