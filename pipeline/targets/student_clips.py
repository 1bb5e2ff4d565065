"""A clip data set over a target store in one call, for anyone's own training loop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal

from ..clips.clip_options import ClipView
from ..common.errors import UsageError
from ..store.reader import TargetStore, check_video_roots
from ..video.flow import pictures_needed
from .class_head import read_heads
from .dataset import StudentClips
from .picks import PickRule
from .sampler import TargetSampler


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
        seed: Of all draws.
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
        max_entropy=max_entropy,
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
