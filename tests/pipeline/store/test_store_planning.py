"""Planning: what fits where, and that long videos are cut into whole, ordered ranges."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distinit.pipeline.store.planning import FrameRange, assign, auto_shard_rows, cut


@given(st.lists(st.integers(0, 512), max_size=60))
def test_shards_hold_whole_segments_in_order(bounds: list[int]) -> None:
    ranges = [FrameRange(i, 0, -1, b) for i, b in enumerate(bounds)]
    placed = assign(ranges, first_id=7, first_shard=3, shard_rows=512)
    assert [s.id for s in placed] == list(range(7, 7 + len(bounds)))
    shards = [s.shard for s in placed]
    assert shards == sorted(shards)
    for shard in set(shards):
        assert sum(s.frames.bound for s in placed if s.shard == shard) <= 512
    for a, b in itertools.pairwise(placed):
        if b.shard != a.shard:  # greedy: a new shard only where the next segment did not fit
            used = sum(s.frames.bound for s in placed if s.shard == a.shard)
            assert b.shard == a.shard + 1
            assert used + b.frames.bound > 512


@given(st.integers(1, 4000), st.integers(1, 9), st.integers(1, 700), st.integers(0, 99))
def test_cuts_cover_every_wanted_frame_once(frames: int, every: int, gop: int, seed: int) -> None:
    wanted = np.arange(0, frames, every, dtype=np.int64)
    keys = np.arange(seed % gop, frames, gop, dtype=np.int64)
    parts = cut(5, wanted, keys, frames, 256)
    assert parts[0].first == 0
    assert parts[-1].end == -1
    for a, b in itertools.pairwise(parts):
        assert a.end == b.first > a.first
    rows = [
        ((wanted >= p.first) & (wanted < (p.end if p.end >= 0 else frames))).sum() for p in parts
    ]
    assert rows == [p.bound for p in parts]
    assert sum(rows) == len(wanted)
    assert max(rows) <= 256
    if gop * 2 <= 256 * every:  # a range always holds a key frame to cut at
        assert all(p.first == 0 or p.first in keys for p in parts)


def test_small_stores_get_small_shards_and_large_ones_16384() -> None:
    assert auto_shard_rows(0) == auto_shard_rows(4000) == 512
    assert auto_shard_rows(100_000) == 4096
    assert auto_shard_rows(10**8) == 16384
