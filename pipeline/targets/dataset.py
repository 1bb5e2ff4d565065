"""Clips with their targets, for the loop of stage two or anyone's own DataLoader.

Shapes: T frames, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..clips.clip_options import ClipView, Crop
from ..clips.read import check_fits, read_clip
from ..clips.seeding import Key
from ..common.errors import StoreMismatchError, TrainingError, UsageError, VideoError
from ..corpus.sources import escape_path
from ..prepared.folders import VideoFile, prepared_corpora
from ..store.reader import TargetStore, check_video_roots
from ..video.flow import pictures_needed
from .class_head import read_heads
from .picks import PickRule
from .sampler import ClipSample, TargetSampler

# Videos tried for one sample. A corpus that has moved ends a run at its first batch.
MAX_UNREADABLE_IN_A_ROW = 20


class StudentClips(Dataset[Any]):
    """Clips with targets: dataset[(epoch, sample)] → an example, a pure function of seed and key.

    An example holds:

    - "clip": uint8 [3, T, H, W], or with channels=2 its optical flow, float32 [2, T, H, W], from a
      sampler with ahead=1; zeros where no head counts it (it was not decoded)
    - "targets": teacher → mean picked outputs float32 [K]
    - "weight": teacher → float32 scalar, 1 or 0
    - "dropped": teacher → bool, where the sampler drops teachers
    - "video": id in the store; "name": its path; "start": first frame
    - "rejected": draws that the filter rejected; "unreadable": [(path, reason)] per file

    Another clip is drawn in place of a video that cannot be read or is not the one that the
    teachers saw; the caller counts them. With a `fixed` sampler (held-out videos) the example is
    None.

    Args:
        sampler: Draws clips and targets.
        view: Size, crop and flip of the clips.
        video_roots: corpus → folder where it is located now, or of copies (channels=2: or of flow)
            by `distinit prepare`, which are read in place of the originals: the same draws, targets
            and frames.
        channels: 3 for RGB, 2 for optical flow.

    Raises:
        UsageError: A folder has none of the corpus, or its flow is of another size.
        TrainingError: From reading an example, after 20 failures for one sample.

    Example:
        `StudentClips(sampler, ClipView(size=112))[0, 5]["targets"]`
    """

    def __init__(
        self,
        sampler: TargetSampler,
        view: ClipView,
        video_roots: Mapping[str, str] | None = None,
        *,
        channels: int = 3,
    ) -> None:
        if sampler.ahead != pictures_needed(0, channels):
            raise ValueError(
                f"clips of {channels} channels need a sampler with ahead={pictures_needed(0, channels)}"
            )
        if sampler.has_cells and sampler.view != view:
            raise ValueError("clips of a teacher with cells need a sampler with their view")
        self.channels = channels
        self.sampler = sampler
        self.view = view
        self.video_roots = dict(video_roots or {})
        self.copies = prepared_corpora(self.video_roots)
        for name, corpus in self.copies.items():
            check_fits(corpus.options, view, channels, folder=f"{name}={self.video_roots[name]}")
        self._failed: dict[int, str] = {}
        self._seen = np.zeros(0, bool)

    def __getitem__(self, key: Key) -> dict[str, Any] | None:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any] | None]:
        """Return the examples of a batch, as a DataLoader asks for them."""
        # All draws and targets come first. Right after decoding, which clears the processor's
        # caches, they would take three times as long.
        plans = [self._plan(key) for key in keys]
        return [self._get(key, plan) for key, plan in zip(keys, plans, strict=True)]

    def _plan(self, key: Key, attempt: int = 0) -> _Plan:
        draw = self.sampler.draw(*key, attempt)
        file = self.file(draw.video)
        digest = self.sampler.store.digest(draw.video) or None
        zoom = (
            self.sampler.zoom(*key, draw.attempt)
            if self.view.scale[0] < self.view.scale[1]
            else 0.0
        )
        crop = None if self.sampler.fixed else Crop(draw.top, draw.left, draw.flip, zoom)
        example = {
            "targets": {name: torch.from_numpy(mean) for name, mean in draw.targets.items()},
            "weight": {name: torch.tensor(weight) for name, weight in draw.weight.items()},
            "video": draw.video,
            "name": escape_path(file.path),
            "start": draw.start,
        }
        if dropped := self.sampler.dropped(*key):
            example["dropped"] = {name: torch.tensor(drop) for name, drop in dropped.items()}
        return _Plan(draw, file, digest, crop, _expected(draw), example)

    def _get(self, key: Key, plan: _Plan) -> dict[str, Any] | None:
        rejected = plan.draw.rejected
        unreadable: list[tuple[str, str]] = []
        while True:
            clip = self._read(plan)
            if isinstance(clip, torch.Tensor):
                return {
                    "clip": clip,
                    **plan.example,
                    "rejected": rejected,
                    "unreadable": unreadable,
                }
            unreadable.append((plan.example["name"], clip))
            if self.sampler.fixed:
                return None
            if len(unreadable) >= MAX_UNREADABLE_IN_A_ROW:
                raise TrainingError(
                    f"{len(unreadable)} videos in a row could not be read, the last: "
                    f"{unreadable[-1][0]}: {unreadable[-1][1]}; give its current folder with --videos CORPUS=DIR"
                )
            plan = self._plan(key, plan.draw.attempt + 1)
            rejected += plan.draw.rejected

    def missing(self, tries: int = 100) -> list[str]:
        """Return a sentence for each corpus of whose first `tries` videos some do not exist.

        Raises:
            UsageError: None of them exists: the corpus has moved.
        """
        store, sentences = self.sampler.store, list[str]()
        corpus = store.column("corpus")[self.sampler.videos]
        for number, name in enumerate(store.corpora):
            videos = self.sampler.videos[corpus == number][:tries]
            paths = [self.file(int(video)).path for video in videos]
            gone = [escape_path(path) for path in paths if not os.path.exists(path)]
            if gone and len(gone) == len(paths):
                raise UsageError(
                    f"none of the first {len(gone)} videos of corpus {name!r} exists, as {gone[0]}; "
                    f"give its current folder with --videos {name}=DIR"
                )
            if gone:
                some = f"{len(gone)} of the first {len(paths)} videos of corpus {name!r}"
                sentences.append(f"{some} do not exist, as {gone[0]}")
        return sentences

    def name(self, video: int) -> str:
        """Return the path of a video or of its copy, as text that can be printed."""
        return escape_path(self.file(video).path)

    def file(self, video: int) -> VideoFile:
        """Return where the frames of a video are read."""
        store = self.sampler.store
        if self.copies:
            corpus = store.index.corpora[int(store.column("corpus")[video])]["name"]
            if (copies := self.copies.get(corpus)) is not None:
                return VideoFile(copies.path(store.video_path(video, {corpus: ""})), copies.kind)
        return VideoFile(store.video_path(video, self.video_roots))

    def _read(self, plan: _Plan) -> torch.Tensor | str:
        """Return the clip, uint8 [3, T, H, W] or float32 [2, T, H, W], or why it cannot be read.

        A failure is remembered. Draws depend on the key alone, so that this changes no result.
        """
        draw = plan.draw
        if not draw.counts:
            shape = (
                self.channels,
                len(draw.indices) - self.sampler.ahead,
                self.view.size,
                self.view.size,
            )
            return torch.zeros(shape, dtype=torch.float32 if self.sampler.ahead else torch.uint8)
        if draw.video in self._failed:
            return self._failed[draw.video]
        if len(self._seen) == 0:
            self._seen = np.zeros(self.sampler.store.n_videos, bool)
        try:
            clip = self._clip(plan)
        except (VideoError, StoreMismatchError) as error:
            self._failed[draw.video] = str(error)
            return str(error)
        self._seen[draw.video] = True
        return clip

    def _clip(self, plan: _Plan) -> torch.Tensor:
        draw, file, digest = plan.draw, plan.file, plan.digest
        # Checked once. The map of a copy holds the digest of its source.
        if file.kind == "video" and self._seen[draw.video]:
            digest = None
        return read_clip(
            file,
            draw.indices,
            self.view,
            channels=self.channels,
            crop=plan.crop,
            expect=plan.expect,
            digest=digest,
        )


class _Plan(NamedTuple):
    """A draw before its clip is read.

    It holds where the frames are and how they are cut, what is expected of them, and the example
    without its clip.
    """

    draw: ClipSample
    file: VideoFile
    digest: str | None
    crop: Crop | None
    expect: tuple[Any, Any] | None
    example: dict[str, Any]


def _expected(draw: ClipSample) -> tuple[Any, Any] | None:
    """Return (indices, pts) of the picked frames: the clip must show what the teachers saw."""
    # A frame picked beyond the clip (no rule does so today) is not decoded and cannot be compared.
    first, last = draw.start, draw.indices[-1]
    if first <= draw.picked[0] and draw.picked[-1] <= last:
        return draw.picked, draw.picked_pts
    inside = (draw.picked >= first) & (draw.picked <= last)
    return (draw.picked[inside], draw.picked_pts[inside]) if inside.any() else None


def student_clips(
    store: TargetStore | str | os.PathLike[str],
    *,
    teachers: Sequence[str] | None = None,
    frames: int = 8,
    size: int = 112,
    channels: int = 3,
    scale: tuple[float, float] = (1.0, 1.0),
    picks: str = "random",
    max_entropy: Mapping[str, float] | None = None,
    filter_mode: Literal["skip", "zero-weight"] = "skip",
    seed: int = 0,
    epoch_clips: int | None = None,
    video_roots: Mapping[str, str] | None = None,
    heads: Mapping[str, str | os.PathLike[str]] | None = None,
) -> StudentClips:
    """Return clips of the store's videos with their targets: dataset[(epoch, sample)] → a dict.

    An example holds "clip" uint8 [3, T, H, W], or with channels=2 optical flow in pixels, float32
    [2, T, H, W]; "targets" teacher → mean picked outputs float32 [K]; "weight" teacher → 1 or 0.
    `normalize_clip` makes a student's input of a batch. Every example is a pure function of (seed,
    epoch, sample): any number of loader workers gives the same.

    Args:
        store: An open store, its folder or its URL.
        teachers: Names; default all in the store.
        frames: T.
        size: H = W in pixels.
        channels: 3 for RGB, 2 for optical flow.
        scale: Range of a random factor on the size that frames are resized to before the crop.
        picks: center, random, random:N or uniform:N cached frames of the clip.
        max_entropy: teacher → nats; a clip above it in every teacher is rejected.
        filter_mode: Draw a rejected clip again, or give it weight zero.
        seed: Seed of all draws.
        epoch_clips: Samples per epoch, default one per video.
        video_roots: corpus → folder where it is located now, or of copies or flow by `distinit
            prepare`.
        heads: teacher → safetensors file that makes logits of its features, see `ClassHead.read`.

    Raises:
        StoreError: There is no store, or it is damaged.
        UsageError: A value is not allowed, the store lacks a teacher, or there is nothing to draw
            from.
        TrainingError: From reading an example, where no video can be read.

    Example:
        `student_clips("targets.zarr", frames=8, picks="random:2")[0, 0]["targets"]`
    """
    opened = store if isinstance(store, TargetStore) else TargetStore.open(store)
    check_video_roots(opened, video_roots or {})
    names = opened.target_names(teachers)
    records = {name: opened.teacher(name) for name in names}
    for name in max_entropy or {}:
        if name not in records:
            raise UsageError(f"max_entropy names {name!r}; the teachers are: {', '.join(records)}")
        if records[name].output == "features" and name not in (heads or {}):
            raise UsageError(f"max_entropy: teacher {name!r} gives features, which have no entropy")
    videos = opened.usable(names)
    view = ClipView(size=size, scale=scale)
    sampler = TargetSampler(
        opened,
        teachers=names,
        picks=PickRule.parse(picks),
        clip_frames=frames,
        videos=videos,
        seed=seed,
        epoch_clips=epoch_clips or max(1, len(videos)),
        view=view,
        max_entropy=max_entropy or {},
        filter_mode=filter_mode,
        ahead=pictures_needed(0, channels),
        heads=read_heads(
            {name: os.fspath(path) for name, path in (heads or {}).items()},
            {name: record.width for name, record in records.items()},
            {name: record.output for name, record in records.items()},
        ),
    )
    sampler.check_windows()
    return StudentClips(sampler, view, video_roots, channels=channels)
