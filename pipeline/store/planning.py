"""Plan which rows go where: videos are cut into segments and segments fill shards.

The plan depends only on the listing and the probes, so a run that is killed and started again
fills the same shards with the same rows. A segment is a whole video or, if the video needs more
rows than a shard has, a range of it cut at key frames. Its `bound` is an upper bound of its number
of rows; unused rows keep the fill value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_SHARD_ROWS, MAX_SHARD_ROWS = 512, 16384
# Videos without rows take no space in a shard, but each costs time.
MAX_SHARD_SEGMENTS = 4096


@dataclass(frozen=True)
class FrameRange:
    """Frames [first, end) of a video, of which at most `bound` are cached.

    end: −1 for the end of the file. replaces: the segment that this one replaces, −1 if none.
    """

    video: int
    first: int
    end: int
    bound: int
    replaces: int = -1


@dataclass(frozen=True)
class Segment:
    """A range with its shard; `id` counts all segments of the store."""

    id: int
    shard: int
    frames: FrameRange


def auto_shard_rows(total: int) -> int:
    """Return the rows per shard for a store of about `total` rows.

    It is a power of two that gives about 32 shards or more. A shard is written at once, and a kill
    loses at most the unfinished shards: small stores need small shards, large stores use 16384 rows
    (32 MB at 1000 classes in float16).
    """
    rows = MIN_SHARD_ROWS
    while rows < MAX_SHARD_ROWS and rows * 32 < total:
        rows *= 2
    return rows


def cut(
    video: int,
    frame_indices: NDArray[np.int64],
    keys: NDArray[np.int64],
    num_frames: int,
    shard_rows: int,
) -> list[FrameRange]:
    """Cut a long video into ranges of at most `shard_rows` of the frames to cache.

    A cut is at a key frame if the range has one after its first frame, so that the next range is
    decoded without the frames before it. Otherwise it is at the frame after the last that fits.

    Args:
        video: Row of the video in the video table.
        frame_indices: Frames to cache, ascending [N].
        keys: Key frames, ascending.
        num_frames: Frames of the video.
        shard_rows: Rows per shard.
    """
    ranges: list[FrameRange] = []
    first, row = 0, 0
    while True:
        num_left = len(frame_indices) - row
        if num_left <= shard_rows:
            ranges.append(FrameRange(video, first, -1, num_left))
            return ranges
        limit = int(frame_indices[row + shard_rows])
        last_key = int(np.searchsorted(keys, limit, side="right")) - 1
        end = int(keys[last_key]) if last_key >= 0 and keys[last_key] > first else limit
        rows = int(np.searchsorted(frame_indices, end, side="left")) - row
        if rows == 0:
            end, rows = limit, shard_rows
        ranges.append(FrameRange(video, first, min(end, num_frames), rows))
        first, row = end, row + rows


def assign(
    ranges: Iterable[FrameRange], *, first_id: int, first_shard: int, shard_rows: int
) -> list[Segment]:
    """Assign ranges to shards in order; a range that does not fit opens the next shard."""
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
