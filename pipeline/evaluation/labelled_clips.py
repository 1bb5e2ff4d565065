"""Clips of labelled videos: random ones for training, evenly spread ones for tests.

`warn_of_short_videos` logs a warning if clips are longer than most of the videos.

Shapes: T frames, C channels, H W pixels, N clips of a test video.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..clips.clip_options import ClipView, Crop
from ..clips.read import check_fits, count_frames, read_clip, read_clips
from ..clips.seeding import SHUFFLES, Key, epoch_position, rng
from ..common.errors import TrainingError, UsageError, VideoError
from ..corpus.sources import escape_path
from ..video.flow import FLOW_CHANNELS, pictures_needed
from ..video.pool.decode_pool import DecodePool
from .evaluation_options import FrameOrder
from .labels import Labelled, Labels

log = logging.getLogger(__name__)

MAX_UNREADABLE_IN_A_ROW = 20
# Number of videos whose frames are counted if no counts are stored.
MAX_COUNTED = 20


class LabelledClips:
    """dataset[(epoch, sample)] -> a random training clip, a pure function of the seed and the key.

    Clips have the train view of VMZ and torchvision: consecutive frames from a random start,
    resized, randomly cropped and mirrored. An epoch is a range of `epoch_clips` positions in seeded
    permutations of the videos.

    An item has "clip": uint8 [3, T, H, W], or with channels=2 optical flow, float32 [2, T, H, W];
    "label": int; "video": index into `labels.train`; "name": path of the video; "start": first
    frame; "unreadable": [(path, reason)] of the videos that were drawn for this sample before it.

    Raises:
        UsageError: A folder of prepared flow does not fit the clips.
        TrainingError: MAX_UNREADABLE_IN_A_ROW videos drawn for one sample are unreadable.
    """

    def __init__(
        self,
        labels: Labels,
        view: ClipView,
        *,
        clip_frames: int,
        seed: int,
        epoch_clips: int,
        channels: int = 3,
    ) -> None:
        if labels.copies is not None:
            check_fits(labels.copies.options, view, channels, folder=labels.copies.folder)
        self.channels = channels
        self.labels = labels
        self.view = view
        self.clip_frames = clip_frames
        self.seed = seed
        self.epoch_clips = epoch_clips
        # Cached per process, since counting frames requires a demux, and neither a count nor a
        # failure changes during a run.
        self._counts: dict[int, int] = {}
        self._failed: dict[int, str] = {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, sample = key
        unreadable: list[tuple[str, str]] = []
        for attempt in range(MAX_UNREADABLE_IN_A_ROW):
            random = rng(self.seed, epoch, sample, attempt)
            video = self._video(epoch, sample, attempt, random)
            try:
                clip, start = self._read(video, random)
            except VideoError as error:
                self._failed[video] = str(error)
                unreadable.append((self.name(video), str(error)))
                continue
            return {
                "clip": clip,
                "label": self.labels.train[video].label,
                "video": video,
                "name": self.name(video),
                "start": start,
                "unreadable": unreadable,
            }
        raise TrainingError(
            f"{len(unreadable)} training videos in a row are unreadable, the last: {': '.join(unreadable[-1])}"
        )

    def name(self, video: int) -> str:
        """Return the listed path of a training video as printable text."""
        return escape_path(self.labels.train[video].path)

    def _video(self, epoch: int, sample: int, attempt: int, random: np.random.Generator) -> int:
        n = len(self.labels.train)
        if attempt == 0:
            return epoch_position(self.seed, epoch, sample, epoch_clips=self.epoch_clips, n=n)
        return int(random.integers(n))

    def _read(self, video: int, random: np.random.Generator) -> tuple[Tensor, int]:
        """Read a random clip [C, T, H, W] of a video, and return it with its first frame."""
        if video in self._failed:
            raise VideoError(self._failed[video])
        file = self.labels.file(self.labels.train[video])
        if video not in self._counts:
            self._counts[video] = count_frames(file)
        num_frames = self._counts[video]
        span = pictures_needed(self.clip_frames, self.channels)
        start = int(random.integers(max(num_frames - span, 0) + 1))
        top, left, flip, zoom = random.random(4)
        crop = Crop(top, left, bool(flip < self.view.flip), zoom)
        frames = frame_indices(start, span, num_frames)
        return read_clip(file, frames, self.view, channels=self.channels, crop=crop), start


class EvaluationClips:
    """dataset[(0, i)] -> the N = clips · crops test clips of the i-th of `videos`.

    Clips have the test view of VMZ: starts ⌊i·(n − T)/(clips − 1)⌋ (n − T − 1 for flow), resized,
    center crop; with three crops also both ends of the longer side. The crops of one clip are
    adjacent. All clips of a video are read in one pass over the file.

    An item has "video": index into `videos`, and either "clips": uint8 [N, 3, T, H, W] (flow:
    float32 [N, 2, T, H, W]), "starts": int64 [N], "frames": number of frames of the video, and
    "note": what part cannot be decoded, else ""; or "error": why the video is unreadable.

    With order `shuffled`, the frames of each clip have a random order, a pure function of i and the
    clip; with `frozen`, a clip is its middle frame, T times.

    Raises:
        UsageError: A folder of prepared flow does not fit, or flow is tested with another order.
    """

    def __init__(
        self,
        labels: Labels,
        videos: Sequence[Labelled],
        view: ClipView,
        *,
        clip_frames: int,
        clips: int,
        crops: Literal[1, 3] = 1,
        channels: int = 3,
        order: FrameOrder = "ordered",
    ) -> None:
        if labels.copies is not None:
            check_fits(labels.copies.options, view, channels, folder=labels.copies.folder)
        if order != "ordered" and channels == FLOW_CHANNELS:
            raise UsageError(
                f"test.frames={order}: optical flow can only be tested with ordered frames"
            )
        self.order = order
        self.channels = channels
        self.labels = labels
        self.videos = list(videos)
        self.crops: Literal[1, 3] = crops
        self.view = view
        self.clip_frames = clip_frames
        self.clips = clips

    def __getitem__(self, key: Key) -> dict[str, Any]:
        _, i = key
        try:
            item = self._read(self.videos[i])
        except VideoError as error:
            return {"video": i, "error": str(error)}
        clips = item["clips"]
        for n in range(len(clips) if self.order != "ordered" else 0):
            clips[n] = clips[n][:, self._order(clips.shape[2], i, n // self.crops)]
        return {"video": i, **item}

    def _order(self, num_frames: int, video: int, clip: int) -> list[int]:
        """Return the order of the frames of a clip; its crops share it."""
        if self.order == "frozen":
            return [num_frames // 2] * num_frames
        return [int(t) for t in rng(0, video, clip, stream=SHUFFLES).permutation(num_frames)]

    def _read(self, video: Labelled) -> dict[str, Any]:
        file = self.labels.file(video)
        num_frames = count_frames(file)
        span = pictures_needed(self.clip_frames, self.channels)
        starts = clip_starts(num_frames, span, self.clips)
        frames = np.stack([frame_indices(int(start), span, num_frames) for start in starts])
        decoded = read_clips(file, frames, self.view, channels=self.channels, crops=self.crops)
        note = f"{decoded.repeated} of {decoded.distinct} frames cannot be decoded, replaced by the one before"
        return {
            "clips": decoded.clips,
            "starts": torch.from_numpy(starts.repeat(self.crops)),
            "frames": num_frames,
            "note": note if decoded.repeated else "",
        }


def clip_starts(num_frames: int, span: int, num_clips: int = 10) -> np.ndarray:
    """Spread clips evenly over a video.

    Args:
        num_frames: Frames of the video.
        span: Frames of a clip. In a video with fewer frames every clip starts at 0.
        num_clips: Number of clips, K. A single clip is placed in the middle.

    Returns:
        First frames, int64 [K]: ⌊i·(num_frames − span)/(K − 1)⌋ for i = 0 … K−1.

    Example:
        >>> clip_starts(26, 8, 10).tolist()  # 18 free frames, a step of 2
        [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    """
    if min(num_frames, span, num_clips) < 1:
        raise ValueError(
            f"num_frames, span and num_clips must be at least 1, got {num_frames}, {span}, {num_clips}"
        )
    num_free = max(num_frames - span, 0)
    if num_clips == 1:
        return np.array([num_free // 2], dtype=np.int64)
    return np.arange(num_clips, dtype=np.int64) * num_free // (num_clips - 1)


def frame_indices(start: int, span: int, num_frames: int) -> np.ndarray:
    """Return `span` frames from `start`, int64; past the end the last frame is repeated."""
    return np.minimum(np.arange(start, start + span, dtype=np.int64), num_frames - 1)


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
    lengths = np.array([count for count in counts if count > 0])
    num_short = int((lengths < span).sum())
    if 2 * num_short <= len(lengths):
        return
    sample_note = "" if len(lengths) == num_videos else f" (sampled from {num_videos})"
    frames = f"{lengths.min()} to {lengths.max()} frames, median {np.median(lengths):.0f}"
    log.warning(
        f"--frames {clip_frames} is longer than {num_short} of {len(lengths)} videos{sample_note}, "
        f"which have {frames}: their clips repeat the last frame"
    )


def count_sampled_frames(labels: Labels, videos: Sequence[Labelled]) -> list[int]:
    """Count the frames of some videos, evenly spread over a list, without unreadable ones."""
    positions = np.linspace(0, len(videos) - 1, min(MAX_COUNTED, len(videos))).astype(int)
    # Originals are opened in a process of its own, since one may crash or hang the library that
    # opens it. For copies only the frame maps are read.
    workers: AbstractContextManager[DecodePool | None] = nullcontext()
    if labels.copies is None:
        workers = DecodePool(processes=1, views=())
    counts = []
    with workers as pool:
        for position in np.unique(positions).tolist():
            with suppress(VideoError):
                file = labels.file(videos[position])
                counts.append(
                    count_frames(file) if pool is None else len(pool.timeline(file.path).pts)
                )
    return counts
