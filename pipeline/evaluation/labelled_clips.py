"""Clips of labelled videos: random ones to train on, ten fixed ones of each video to test with.

Shapes: T frames, C channels, H W pixels, N clips of a test video.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .evaluation_options import FrameOrder
from .labels import Labelled, Labels

MAX_BROKEN_IN_A_ROW = 20


class LabelledClips:
    """dataset[(epoch, sample)] -> a random training clip, a pure function of the seed and the key.

    "clip": uint8 [3, T, H, W], or with channels=2 its optical flow, float32 [2, T, H, W]; "label":
    int; "video": index into `labels.train`; "name": its path; "start": first frame; "broken":
    [(path, reason)] of the videos that could not be read for this sample and were drawn again.

    The train view of VMZ and torchvision: consecutive frames at a random start, resized, randomly
    cropped and mirrored. An epoch is a stretch of `epoch_clips` of seeded permutations of the
    videos. Raises TrainingError after 20 unreadable videos for one sample, and UsageError for a
    folder of flow that does not fit.
    """

    def __init__(
        self,
        labels: Labels,
        view: ClipView,
        *,
        length: int,
        seed: int,
        epoch_clips: int,
        channels: int = 3,
    ) -> None:
        if labels.copies is not None:
            check_fits(labels.copies.options, view, channels, folder=labels.copies.folder)
        self.channels = channels
        self.labels = labels
        self.view = view
        self.length = length
        self.seed = seed
        self.epoch_clips = epoch_clips
        # Per process: a frame count costs a demux, and neither it nor a failure changes during a
        # run.
        self._counts: dict[int, int] = {}
        self._failed: dict[int, str] = {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, sample = key
        broken: list[tuple[str, str]] = []
        for attempt in range(MAX_BROKEN_IN_A_ROW):
            draw = rng(self.seed, epoch, sample, attempt)
            video = self._video(epoch, sample, attempt, draw)
            try:
                clip, start = self._read(video, draw)
            except VideoError as error:
                self._failed[video] = str(error)
                broken.append((self.name(video), str(error)))
                continue
            return {
                "clip": clip,
                "label": self.labels.train[video].label,
                "video": video,
                "name": self.name(video),
                "start": start,
                "broken": broken,
            }
        raise TrainingError(
            f"{len(broken)} training videos in a row could not be read, the last: {broken[-1][0]}: {broken[-1][1]}"
        )

    def name(self, video: int) -> str:
        """The path of a training video as listed, as text that can be printed."""
        return escape_path(self.labels.train[video].path)

    def _video(self, epoch: int, sample: int, attempt: int, draw: np.random.Generator) -> int:
        n = len(self.labels.train)
        if attempt == 0:
            return epoch_position(self.seed, epoch, sample, epoch_clips=self.epoch_clips, n=n)
        return int(draw.integers(n))

    def _read(self, video: int, draw: np.random.Generator) -> tuple[Tensor, int]:
        """uint8 [C, T, H, W] and its first frame. VideoError with the reason."""
        if video in self._failed:
            raise VideoError(self._failed[video])
        file = self.labels.file(self.labels.train[video])
        if video not in self._counts:
            self._counts[video] = count_frames(file)
        total = self._counts[video]
        need = pictures_needed(self.length, self.channels)
        start = int(draw.integers(max(total - need, 0) + 1))
        down, across, mirror, zoom = draw.random(4)
        crop = Crop(down, across, bool(mirror < self.view.flip), zoom)
        frames = clip_frames(start, need, total)
        return read_clip(file, frames, self.view, channels=self.channels, crop=crop), start


class EvaluationClips:
    """dataset[(0, i)] -> the N = clips · crops test clips of the i-th of `videos`, read in one pass
    over the file.

    "video": index into `videos`; and either "clips" uint8 [N, 3, T, H, W] (flow: float32 [N, 2, T,
    H, W]), "starts" int64 [N], "frames" int (of the whole video) and "note" (what is damaged, else
    empty), or "error", why it cannot be read. The test view of VMZ: starts ⌊i·(n − T)/(clips − 1)⌋
    (of flow n − T − 1), resized, center crop; with three crops also both ends of the longer side,
    the crops of one clip side by side.

    order: `shuffled` gives every clip's frames in a random order, a pure function of i and the
    clip; `frozen` its middle frame T times. UsageError for either with flow, which is motion
    itself.
    """

    def __init__(
        self,
        labels: Labels,
        videos: Sequence[Labelled],
        view: ClipView,
        *,
        length: int,
        clips: int,
        crops: Literal[1, 3] = 1,
        channels: int = 3,
        order: FrameOrder = "ordered",
    ) -> None:
        if labels.copies is not None:
            check_fits(labels.copies.options, view, channels, folder=labels.copies.folder)
        if order != "ordered" and channels == FLOW_CHANNELS:
            raise UsageError(
                f"test.frames={order} is for students of RGB; optical flow has no order to lose"
            )
        self.order = order
        self.channels = channels
        self.labels = labels
        self.videos = list(videos)
        self.crops: Literal[1, 3] = crops
        self.view = view
        self.length = length
        self.clips = clips

    def __getitem__(self, key: Key) -> dict[str, Any]:
        _, i = key
        try:
            found = self._read(self.videos[i])
        except VideoError as error:
            return {"video": i, "error": str(error)}
        clips = found["clips"]
        for n in range(len(clips) if self.order != "ordered" else 0):
            clips[n] = clips[n][:, self._order(clips.shape[2], i, n // self.crops)]
        return {"video": i, **found}

    def _order(self, length: int, video: int, clip: int) -> list[int]:
        """Which frame stands in each place of a clip; the crops of a clip share it."""
        if self.order == "frozen":
            return [length // 2] * length
        return [int(t) for t in rng(0, video, clip, stream=SHUFFLES).permutation(length)]

    def _read(self, video: Labelled) -> dict[str, Any]:
        file = self.labels.file(video)
        total = count_frames(file)
        need = pictures_needed(self.length, self.channels)
        starts = clip_starts(total, need, self.clips)
        frames = np.stack([clip_frames(int(start), need, total) for start in starts])
        found = read_clips(file, frames, self.view, channels=self.channels, crops=self.crops)
        note = f"{found.repeated} of {found.distinct} frames are damaged, shown as the one before"
        return {
            "clips": found.clips,
            "starts": torch.from_numpy(starts.repeat(self.crops)),
            "frames": total,
            "note": note if found.repeated else "",
        }


def clip_starts(n_frames: int, need: int, k: int = 10) -> np.ndarray:
    """starts[k], int64: ⌊i·(n_frames − need)/(k − 1)⌋ for i = 0 … k−1.

    `need` is the number of frames a clip spans. A video shorter than that starts every clip at 0; a
    single clip (k = 1) starts in the middle.

    >>> clip_starts(26, 8, 10).tolist()    # 18 free frames, a step of 2
    [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    """
    if n_frames < 1 or need < 1 or k < 1:
        raise ValueError(f"n_frames, need and k must be at least 1, got {n_frames}, {need}, {k}")
    free = max(n_frames - need, 0)
    if k == 1:
        return np.array([free // 2], dtype=np.int64)
    return np.arange(k, dtype=np.int64) * free // (k - 1)


def clip_frames(start: int, need: int, n_frames: int) -> np.ndarray:
    """indices[need], int64: consecutive frames from `start`, the last frame repeated past the
    end."""
    return np.minimum(np.arange(start, start + need, dtype=np.int64), n_frames - 1)
