"""A warning if clips are longer than most of the videos, and repeat their last frame."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ..clips.read import count_frames
from ..common.errors import VideoError
from ..video.flow import pictures_needed
from ..video.pool.decode_pool import DecodePool
from .labels import Labelled, Labels

log = logging.getLogger(__name__)

SAMPLE = 20  # videos whose frames are counted if no counts are stored


def warn_of_short_videos(
    counts: Sequence[int], num_videos: int, clip_frames: int, channels: int
) -> None:
    """Warn if a clip is longer than most of the videos.

    Args:
        counts: Frames of some videos; 0 or less if unknown.
        num_videos: Number of all videos.
        clip_frames: Frames per clip.
        channels: 3 for RGB, 2 for optical flow, which requires one more frame.
    """
    span = pictures_needed(clip_frames, channels)
    known = np.array([count for count in counts if count > 0])
    short = int((known < span).sum())
    if 2 * short <= len(known):
        return
    sampled = "" if len(known) == num_videos else f" (sampled from {num_videos})"
    frames = f"{known.min()} to {known.max()} frames, median {np.median(known):.0f}"
    log.warning(
        f"--frames {clip_frames} is longer than {short} of {len(known)} videos{sampled}, which have {frames}: "
        "their clips repeat the last frame"
    )


def count_some(labels: Labels, videos: Sequence[Labelled]) -> list[int]:
    """Count the frames of some videos, evenly spread over a list; unreadable ones are skipped."""
    files = []
    for i in np.unique(
        np.linspace(0, len(videos) - 1, min(SAMPLE, len(videos))).astype(int)
    ).tolist():
        with suppress(VideoError):
            files.append(labels.file(videos[i]))
    counts = []
    if labels.copies is not None:
        for file in files:
            with suppress(VideoError):
                counts.append(count_frames(file))
        return counts
    # In a process of its own, since an original may crash or hang the library that opens it. For a
    # copy only the frame map is read.
    with DecodePool(processes=1, views=()) as pool:
        for file in files:
            with suppress(VideoError):
                counts.append(len(pool.timeline(file.path).pts))
    return counts
