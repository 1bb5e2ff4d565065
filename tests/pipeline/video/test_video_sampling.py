"""The sampled frames, against a loop that follows the definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from distinit.pipeline.video.probe import Probe
from distinit.pipeline.video.sampling import Sampling


@settings(deadline=None, max_examples=50)
@given(
    steps=st.lists(st.integers(1, 60), max_size=25),
    first=st.integers(-1000, 2**40),
    fps=st.sampled_from([0.5, 1.0, 2.0, 7.5, 12.0, 30.0, 29.97, 100.0]),
    base=st.sampled_from(
        [Fraction(1, 25), Fraction(1, 90), Fraction(1001, 30000), Fraction(1, 1000)]
    ),
)
def test_a_rate_keeps_the_last_frame_at_or_before_each_tick(
    steps: list[int], first: int, fps: float, base: Fraction
) -> None:
    pts = np.cumsum([first, *steps]).astype(np.int64)
    times = [(int(p) - int(pts[0])) * base for p in pts]
    rate, expected, k = Fraction(fps).limit_denominator(1_000_000), [], 0
    while k / rate <= times[-1]:
        expected.append(max(i for i, t in enumerate(times) if t <= k / rate))
        k += 1
    sampled = Sampling(fps=fps).select(pts, np.ones(len(pts), bool), base)
    assert sampled.tolist() == sorted(set(expected))
    assert sampled.dtype == np.int64
    probe = Probe(duration=float(times[-1]), frames=len(pts), exact=True)
    assert len(sampled) <= Sampling(fps=fps).rows_bound(probe)


def test_absurd_timestamps_do_not_overflow() -> None:
    pts = np.array([-(2**62), 0, 2**62 - 1], np.int64)
    assert Sampling(fps=29.97).select(pts, np.ones(3, bool), Fraction(1, 90000)).tolist()[0] == 0


def test_every_and_key_frames() -> None:
    pts, key = np.arange(10, dtype=np.int64), np.arange(10) % 4 == 1
    assert Sampling().select(pts, key, Fraction(1, 25)).tolist() == [0, 4, 8]
    assert Sampling(keyframes=True).select(pts, key, Fraction(1, 25)).tolist() == [1, 5, 9]
    assert Sampling(every=3).rows_bound(Probe(frames=10, exact=True)) == 4
    assert Sampling(every=2).model_validate(Sampling(fps=2).model_dump()) == Sampling(fps=2)
    for every, words in (
        (1, "every frame"),
        (2, "every 2nd frame"),
        (11, "every 11th frame"),
        (23, "every 23rd frame"),
    ):
        assert Sampling(every=every).describe() == words


@pytest.mark.parametrize(
    "options", [{"every": 2, "fps": 1}, {"every": 0}, {"fps": -1}, {"every": 1, "keyframes": True}]
)
def test_exactly_one_is_chosen(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampling.model_validate(options)
