"""Read clips of one video from the video itself, its prepared copy or its flow file.

Shapes: N clips of L frames; C channels, T frames of a clip as the student sees it, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UsageError, VideoError
from ..common.worker_status import record_read
from ..prepared.copies import read_copy
from ..prepared.flow_files import STEPS, STILL, read_flow
from ..prepared.folders import VideoFile, check_current, kind_of, read_source_record
from ..video import frames as clips
from ..video.flow import FLOW_CHANNELS
from .clip_options import ClipView, Crop
from .transforms import of_channels


class Clips(NamedTuple):
    """Clips [N, C, T, H, W] of one video, see `read_clip`.

    They show `distinct` frames, `repeated` of which are damaged and shown as the frame before.
    """

    clips: Tensor
    distinct: int
    repeated: int


_READERS: dict[str, Callable[..., clips.Frames]] = {"video": clips.read_frames, "copy": read_copy}


def check_fits(options: Mapping[str, Any], view: ClipView, channels: int, *, folder: str) -> None:
    """Raise UsageError if clips cannot be read from a folder with these options of `prepare`."""
    if kind_of(options) != "flow":
        return
    if channels != FLOW_CHANNELS:
        raise UsageError(
            f"--videos {folder}: holds optical flow, for student.channels=2; student.channels={channels} reads "
            "the videos themselves or copies of them"
        )
    if view.scale != (1.0, 1.0):
        raise UsageError(
            f"--videos {folder}: holds the flow of one size, which clips.scale={list(view.scale)} is not"
        )
    size, resize = tuple(options["size"]), view.frame_view().resize
    if size != resize:
        raise UsageError(
            f"--videos {folder}: holds the flow of frames of {size[0]}x{size[1]}, asked for clips out of frames "
            f"resized to {resize}; set clips.resize, or make another folder with distinit prepare --flow --size"
        )


def count_frames(file: VideoFile) -> int:
    """Return the number of frames of a video.

    Raises:
        VideoError: The video has no frames, or its copy was made of another one.
    """
    with record_read(file.path):
        return _count(file)


def _count(file: VideoFile) -> int:
    if file.kind == "video":
        return clips.count_frames(file.path)
    source = read_source_record(file)
    if file.original is not None:
        check_current(source, file.original)
    return source.frames


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
    """Read consecutive frames int64 [L] of a video as one clip.

    Returns uint8 [3, T = L, H, W], or with channels=2 the optical flow, float32 [2, T = L - 1, H,
    W] in pixels.

    Args:
        file: The video, its copy or its flow.
        frames: Indices int64 [L] of the source's frames.
        view: Size and resize.
        channels: 3 for RGB, 2 for optical flow.
        crop: Where the clip is cut and whether it is mirrored; None cuts the middle.
        expect: See `video.frames.read_frames`, which also lists what is raised.
        digest: See `video.frames.read_frames`.
    """
    with record_read(file.path):
        if file.kind == "flow":
            stored, bound, _ = _flow_of(file, frames, view, expect, digest)
            return _flow_clip(stored, bound, view, crop)
        read = _READERS[file.kind](
            file.path, frames, view.frame_view(crop), expect=expect, digest=digest
        )
    return of_channels(view.cut(read.images, crop), channels)


def read_clips(
    file: VideoFile,
    frames: np.ndarray,
    view: ClipView,
    *,
    channels: int = 3,
    crops: Literal[1, 3] = 1,
) -> Clips:
    """Read several clips, frames int64 [N, L], in one pass over the file.

    The result has N · crops clips, see `ClipView.cuts`.
    """
    distinct, place = np.unique(frames, return_inverse=True)
    if file.kind == "flow":
        each, damaged = [], 0
        for clip in frames:
            with record_read(file.path):
                stored, bound, repeated = _flow_of(file, clip, view)
            each += [
                _in_pixels(cut, bound) for cut in view.cuts(stored.transpose(0, 2, 3, 1), crops)
            ]
            damaged += repeated
        return Clips(torch.stack(each), frames.size, damaged)
    with record_read(file.path):
        read = _READERS[file.kind](file.path, distinct, view.frame_view())
    indices = torch.from_numpy(place.reshape(frames.shape))
    # [3, N, crops, L, H, W].
    taken = torch.stack([cut[:, indices] for cut in view.cuts(read.images, crops)], dim=2)
    made = torch.stack([of_channels(clip, channels) for clip in taken.flatten(1, 2).unbind(1)])
    return Clips(made.contiguous(), len(distinct), read.repeated)


def _flow_of(
    file: VideoFile,
    frames: np.ndarray,
    view: ClipView,
    expect: tuple[np.ndarray, np.ndarray] | None = None,
    digest: str | None = None,
) -> tuple[np.ndarray, float, int]:
    """Return what `read_flow` returns; VideoError if its frames have another size than the view."""
    stored, bound, repeated = read_flow(file.path, frames, expect=expect, digest=digest)
    size, resize = stored.shape[2:], view.frame_view().resize
    if size != resize:
        raise VideoError(
            f"its flow is that of frames of {size[0]}x{size[1]}, not {resize}: prepare it again"
        )
    return stored, bound, repeated


def _flow_clip(stored: np.ndarray, bound: float, view: ClipView, crop: Crop | None) -> Tensor:
    """Convert stored flow uint8 [T, 2, H, W] to float32 [2, T, size, size] in pixels.

    In a mirrored clip the horizontal component changes its sign.
    """
    clip = _in_pixels(view.cut(stored.transpose(0, 2, 3, 1), crop), bound)
    if crop is not None and crop.flip:
        clip[0].neg_()
    return clip


def _in_pixels(clip: Tensor, bound: float) -> Tensor:
    """Convert stored flow uint8 [2, T, H, W] to float32 pixels."""
    return clip.to(torch.float32).sub_(STILL).mul_(bound / STEPS)
