"""Pick rules and valid starts against a brute-force reading of the rules, equation 1 against
NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.numerics import entropy
from distinit.pipeline.targets.picks import PickRule, pick, start_set
from distinit.pipeline.targets.teacher_targets import mean_outputs, soft_targets


@st.composite
def videos(draw: st.DrawFn) -> tuple[np.ndarray, int, int, PickRule]:
    frames = draw(st.integers(1, 60))
    cached = draw(st.sets(st.integers(0, frames - 1), min_size=1))
    length = draw(st.integers(1, 40))
    rule = draw(
        st.sampled_from(["center", "random", "random:2", "random:3", "uniform:1", "uniform:4"])
    )
    return np.array(sorted(cached), np.int64), frames, length, PickRule.parse(rule)


def brute_starts(cached: np.ndarray, frames: int, length: int, rule: PickRule) -> list[int]:
    good = []
    for start in range(max(frames - length, 0) + 1):
        inside = [c for c in cached if start <= c < start + length]
        middle = start + (length // 2 if frames >= length else frames // 2)
        if (middle in inside) if rule.kind == "center" else (len(inside) >= rule.n):
            good.append(start)
    return good


@given(videos())
def test_starts_are_those_whose_window_holds_the_picks(
    case: tuple[np.ndarray, int, int, PickRule],
) -> None:
    cached, frames, length, rule = case
    expected = brute_starts(cached, frames, length, rule)
    starts = start_set(rule, cached, frames, length)
    assert [starts.nth(k) for k in range(starts.count)] == expected


@given(videos(), st.integers(0, 2**32 - 1))
def test_picks_are_distinct_cached_frames_inside_the_window(
    case: tuple[np.ndarray, int, int, PickRule], seed: int
) -> None:
    cached, frames, length, rule = case
    for start in brute_starts(cached, frames, length, rule):
        rng = np.random.default_rng(seed)
        at = pick(rule, cached, start, length, rng, frames=frames)
        chosen = cached[at]
        assert len(chosen) == rule.n
        assert (np.diff(chosen) > 0).all()
        assert ((chosen >= start) & (chosen < start + length)).all()
        if rule.kind == "random":  # of one, too, where `pick` takes a shorter way
            there = np.flatnonzero((cached >= start) & (cached < start + length))
            expected = there[
                np.sort(np.random.default_rng(seed).choice(len(there), rule.n, replace=False))
            ]
            assert at.tolist() == expected.tolist()
        if rule.kind == "center":
            assert chosen[0] == start + min(length, frames) // 2


def test_random_picks_reach_every_cached_frame_equally() -> None:
    cached = np.arange(0, 32, 2)
    rule = PickRule.parse("random:2")
    counts = np.zeros(len(cached), int)
    for seed in range(4000):
        counts[pick(rule, cached, 4, 12, np.random.default_rng(seed))] += 1
    inside = counts[2:8]  # frames 4 … 14
    assert counts.sum() == inside.sum() == 8000
    assert abs(inside - 8000 / 6).max() < 5 * np.sqrt(8000 / 6)


def test_uniform_picks_are_the_middles_of_equal_parts() -> None:
    at = pick(PickRule.parse("uniform:2"), np.arange(8), 0, 8, np.random.default_rng(0))
    assert at.tolist() == [2, 6]


@pytest.mark.parametrize(
    "text", ["", "middle", "random:0", "random:-1", "random:x", "center:2", "uniform"]
)
def test_unknown_rules_name_those_allowed(text: str) -> None:
    with pytest.raises(UsageError, match="center, random, random:N, uniform:N"):
        PickRule.parse(text)


@given(st.integers(1, 6), st.integers(2, 30), st.floats(0.25, 8), st.integers(0, 1000))
def test_equation_1_averages_logits_before_one_softmax(
    n: int, k: int, tau: float, seed: int
) -> None:
    z = np.random.default_rng(seed).normal(0, 4, (n, k)).astype(np.float32)
    exponent = z.astype(np.float64).sum(0) / (tau * n)
    expected = np.exp(exponent) / np.exp(exponent).sum()
    np.testing.assert_allclose(soft_targets(mean_outputs(z), tau), expected, rtol=2e-5, atol=1e-7)


@given(st.integers(2, 500), st.floats(0.01, 60), st.integers(0, 1000))
def test_entropy_is_minus_sum_p_log_p_in_nats(k: int, spread: float, seed: int) -> None:
    z = np.random.default_rng(seed).normal(0, spread, k).astype(np.float32)
    p = np.exp(z.astype(np.float64) - z.max())
    p /= p.sum()
    expected = -(p * np.log(np.maximum(p, 1e-300))).sum()
    assert entropy(z) == pytest.approx(expected, abs=2e-5 * max(1, spread))


def test_entropy_of_certainty_and_of_ignorance() -> None:
    assert entropy(np.array([0, 1000, 0], np.float32)) == 0
    assert entropy(np.zeros((2, 1000), np.float32)) == pytest.approx([np.log(1000)] * 2, rel=1e-6)
