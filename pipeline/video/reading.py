"""Clips of one video, wherever its frames lie: in the video itself or in its prepared copy.

N clips of L frames; C channels, T frames of a clip as the student sees it, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import clips
from .copymap import read_map
from .folders import check_current
from .prepared import read_copy
from .transforms import ClipView, Crop, of_channels


class VideoFile(NamedTuple):
    """A file to read clips from: a video, or the copy of one.

    original: of a copy, where the video itself may lie; compared with the copy if it is there.
    """

    path: str
    kind: Literal["video", "copy"] = "video"
    original: str | None = None


class Clips(NamedTuple):
    """clips [N, C, T, H, W] (see `read_clip`); of `distinct` frames, `repeated` are damaged and shown as the one
    before."""

    clips: Tensor
    distinct: int
    repeated: int


_READERS: dict[str, Callable[..., clips.Frames]] = {"video": clips.read_frames, "copy": read_copy}


def count_frames(file: VideoFile) -> int:
    """How many frames the video has. VideoError with the reason where it has none, or its copy is not of it."""
    if file.kind == "video":
        return clips.count_frames(file.path)
    if file.original is not None:
        check_current(file.path, file.original)
    return read_map(file.path).source.frames


def read_clip(
    file: VideoFile,
    frames: np.ndarray,
    view: ClipView,
    *,
    channels: int = 3,
    crop: Crop | None = None,
    expect: tuple[np.ndarray, np.ndarray] | None = None,
    digest: str | None = None,
) -> Tensor:
    """The clip of the video's frames int64 [L]: uint8 [3, T = L, H, W], or with channels=2 its optical flow,
    float32 [2, T = L - 1, H, W] in pixels.

    crop: where it is cut and whether mirrored, in the middle without. expect, digest: of the video, see
    `clips.read_frames`, which says what is raised.
    """
    found = _READERS[file.kind](file.path, frames, view.frame_view(), expect=expect, digest=digest)
    return of_channels(view.cut(found.images, crop), channels)


def read_clips(file: VideoFile, frames: np.ndarray, view: ClipView, *, channels: int = 3) -> Clips:
    """Several clips, frames int64 [N, L], in one pass over the file, all cut in the middle."""
    wanted, place = np.unique(frames, return_inverse=True)
    found = _READERS[file.kind](file.path, wanted, view.frame_view())
    images = view.cut(found.images, None)
    taken = images[:, torch.from_numpy(place.reshape(frames.shape))]  # [3, N, L, H, W]
    each = torch.stack([of_channels(clip, channels) for clip in taken.unbind(1)])
    return Clips(each.contiguous(), len(wanted), found.repeated)
