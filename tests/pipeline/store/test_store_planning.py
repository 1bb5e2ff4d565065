"""Plan segments into shards, and cut long videos into ordered ranges without gaps."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distinit.pipeline.store.planning import FrameRange, assign, auto_shard_rows, cut


@given(st.lists(st.integers(0, 512), max_size=60))
def test_shards_hold_whole_segments_in_order(bounds: list[int]) -> None:
    ranges = [FrameRange(i, 0, -1, b) for i, b in enumerate(bounds)]
    segments = assign(ranges, first_id=7, first_shard=3, shard_rows=512)
    assert [s.id for s in segments] == list(range(7, 7 + len(bounds)))
    shards = [s.shard for s in segments]
    assert shards == sorted(shards)
    for shard in set(shards):
        assert sum(s.frames.bound for s in segments if s.shard == shard) <= 512
    for a, b in itertools.pairwise(segments):
        # A new shard begins only where the next segment did not fit.
        if b.shard != a.shard:
            used = sum(s.frames.bound for s in segments if s.shard == a.shard)
            assert b.shard == a.shard + 1
            assert used + b.frames.bound > 512


@given(st.integers(1, 4000), st.integers(1, 9), st.integers(1, 700), st.integers(0, 99))
def test_cuts_cover_every_cached_frame_once(
    num_frames: int, every: int, gop: int, seed: int
) -> None:
    frames = np.arange(0, num_frames, every, dtype=np.int64)
    keys = np.arange(seed % gop, num_frames, gop, dtype=np.int64)
    ranges = cut(5, frames, keys, num_frames, 256)
    assert ranges[0].first == 0
    assert ranges[-1].end == -1
    for a, b in itertools.pairwise(ranges):
        assert a.end == b.first > a.first
    rows = [
        ((frames >= r.first) & (frames < (r.end if r.end >= 0 else num_frames))).sum()
        for r in ranges
    ]
    assert rows == [r.bound for r in ranges]
    assert sum(rows) == len(frames)
    assert max(rows) <= 256
    # With such short groups of pictures every range has a key frame to cut at.
    if gop * 2 <= 256 * every:
        assert all(r.first == 0 or r.first in keys for r in ranges)


def test_small_stores_get_small_shards_and_large_ones_16384() -> None:
    assert auto_shard_rows(0) == auto_shard_rows(4000) == 512
    assert auto_shard_rows(100_000) == 4096
    assert auto_shard_rows(10**8) == 16384
