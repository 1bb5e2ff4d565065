"""Corpora with a share each: the share holds, every video comes equally often, and nothing but the
key decides."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.targets.mixture import BLOCK, Mixture, by_corpus

LARGE, SMALL = np.arange(100, 130), np.arange(7)


def drawn(mixture: Mixture, clips: int, epoch: int = 0) -> list[int]:
    return [
        int(group[at]) for group, at in (mixture.first(epoch, sample) for sample in range(clips))
    ]


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.3, 1.1), (1, 5000)])
def test_each_block_holds_the_shares_and_each_group_its_videos_equally_often(
    shares: tuple[float, float],
) -> None:
    mixture = Mixture([LARGE, SMALL], shares, seed=3, epoch_clips=5 * BLOCK)
    videos = drawn(mixture, 5 * BLOCK)
    large = np.array([video >= 100 for video in videos]).reshape(5, BLOCK).sum(axis=1)
    assert set(large) == {max(1, round(shares[0] / sum(shares) * BLOCK))}
    counts = Counter(videos)
    for group in (LARGE, SMALL):
        clips_per_video = [counts[int(video)] for video in group]
        assert max(clips_per_video) - min(clips_per_video) <= 1


def test_epochs_of_any_length_are_ranges_of_one_sequence() -> None:
    short = Mixture([LARGE, SMALL], (2, 1), seed=3, epoch_clips=30)
    long = Mixture([LARGE, SMALL], (2, 1), seed=3, epoch_clips=300)
    assert [video for epoch in range(10) for video in drawn(short, 30, epoch)] == drawn(long, 300)
    other = Mixture([LARGE, SMALL], (2, 1), seed=4, epoch_clips=300)
    assert drawn(other, 300) != drawn(long, 300)


def test_groups_are_those_of_the_corpora_that_are_named() -> None:
    corpus = np.array([0, 0, 1, 2, 1, 0])
    groups, shares = by_corpus(
        np.array([0, 1, 2, 4]), corpus, ["a", "b", "c"], {"b": 2.0, "a": 1.0}
    )
    assert [group.tolist() for group in groups] == [[0, 1], [2, 4]], (
        "in the store's order, however they are named"
    )
    assert shares == [1.0, 2.0]
    with pytest.raises(UsageError, match=r"targets\.corpora names 'x'; the store has: a, b, c"):
        by_corpus(np.array([0]), corpus, ["a", "b", "c"], {"x": 1.0})
    with pytest.raises(UsageError, match="'c' has no video to draw from"):
        by_corpus(np.array([0]), corpus, ["a", "b", "c"], {"c": 1.0})
