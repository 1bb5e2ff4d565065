"""A word before clips are longer than the videos that they are cut from: the rest of each is its
last frame again."""

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

SAMPLE = 20  # videos whose frames are counted, where nobody has counted them before


def warn_of_short_videos(counts: Sequence[int], listed: int, length: int, channels: int) -> None:
    """A warning where a clip is longer than most videos of known `counts`, out of `listed`."""
    need = pictures_needed(length, channels)
    known = np.array([count for count in counts if count > 0])
    short = int((known < need).sum())
    if 2 * short <= len(known):
        return
    of = (
        f"{len(known)} videos"
        if len(known) == listed
        else f"{len(known)} of {listed} videos that were looked at"
    )
    frames = f"{known.min()} to {known.max()} frames, median {np.median(known):.0f}"
    log.warning(
        f"--frames {length} is longer than {'all' if short == len(known) else short} of {of} ({frames}): their clips "
        f"are filled with their last frame"
    )


def count_some(labels: Labels, videos: Sequence[Labelled]) -> list[int]:
    """Frames of some of the videos, evenly spread over the list; without those that cannot be
    read."""
    files = []
    for i in np.unique(
        np.linspace(0, len(videos) - 1, min(SAMPLE, len(videos))).astype(int)
    ).tolist():
        with suppress(VideoError):
            files.append(labels.file(videos[i]))
    found = []
    for file in files if labels.copies is not None else ():  # a copy's map is read, no container
        with suppress(VideoError):
            found.append(count_frames(file))
    if (
        labels.copies is None
    ):  # in a process of its own: a file may crash or hang the library that opens it
        with DecodePool(processes=1, views=()) as pool:
            for file in files:
                with suppress(VideoError):
                    found.append(len(pool.timeline(file.path).pts))
    return found
