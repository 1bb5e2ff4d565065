"""Plan which rows go where: videos are cut into segments and segments fill shards.

The plan depends on the listing and the probes alone, so a run that is killed and started again
fills the same shards with the same rows. A segment is a video or, if that needs more rows than a
shard has, a range of it cut at key frames. Its `bound` is an upper bound of its rows; unused rows
stay fill.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_SHARD_ROWS, MAX_SHARD_ROWS = 512, 16384
MAX_SHARD_SEGMENTS = 4096  # files without a row cost no rows, but work all the same


@dataclass(frozen=True)
class FrameRange:
    """Frames [first, end) of a video, of which at most `bound` are cached.

    end −1: to the end of the file.
    """

    video: int
    first: int
    end: int
    bound: int
    replaces: int = -1


@dataclass(frozen=True)
class Segment:
    """A range that has its place: `id` counts all segments of the store."""

    id: int
    shard: int
    frames: FrameRange


def auto_shard_rows(total: int) -> int:
    """Return the rows per shard for a store of about `total` rows.

    It is a power of two that gives some 32 shards or more. A shard is the unit of what a kill costs
    and of what is written at once: small stores need small ones, large stores 16384 (32 MB at 1000
    classes in float16).
    """
    rows = MIN_SHARD_ROWS
    while rows < MAX_SHARD_ROWS and rows * 32 < total:
        rows *= 2
    return rows


def cut(
    video: int, wanted: NDArray[np.int64], keys: NDArray[np.int64], frames: int, shard_rows: int
) -> list[FrameRange]:
    """Cut a long video into ranges of at most `shard_rows` of the `wanted` frame indices.

    Cuts are at key frames (`keys`, ascending indices) if a range has one after its first frame, so
    that it is decoded without the frames before it; else at the frame after the last that fits.
    """
    ranges: list[FrameRange] = []
    first, row = 0, 0
    while True:
        left = len(wanted) - row
        if left <= shard_rows:
            ranges.append(FrameRange(video, first, -1, left))
            return ranges
        limit = int(wanted[row + shard_rows])
        at = int(np.searchsorted(keys, limit, side="right")) - 1
        end = int(keys[at]) if at >= 0 and keys[at] > first else limit
        rows = int(np.searchsorted(wanted, end, side="left")) - row
        if rows == 0:
            end, rows = limit, shard_rows
        ranges.append(FrameRange(video, first, min(end, frames), rows))
        first, row = end, row + rows


def assign(
    ranges: Iterable[FrameRange], *, first_id: int, first_shard: int, shard_rows: int
) -> list[Segment]:
    """Fill shards greedily in the given order; one that does not fit opens the next shard."""
    segments: list[Segment] = []
    shard, used, count = first_shard, 0, 0
    for frames in ranges:
        if frames.bound > shard_rows:
            raise ValueError(
                f"a segment of {frames.bound} rows does not fit a shard of {shard_rows}"
            )
        if used + frames.bound > shard_rows or count >= MAX_SHARD_SEGMENTS:
            shard, used, count = shard + 1, 0, 0
        segments.append(Segment(first_id + len(segments), shard, frames))
        used, count = used + frames.bound, count + 1
    return segments
