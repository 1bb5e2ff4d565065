"""Try failed videos again: new attempts are appended in new shards, and stored rows stay.

A segment fails either as a whole, and then nothing of it is stored, or under one teacher only, next
to rows of other teachers. A new attempt replaces the old segment, which readers then ignore. In the
second case the new attempt therefore copies the frames and the rows of the other teachers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ..common.progress_bar import progress_bar
from ..store.index import FAILED, OK, StoreIndex
from ..store.planning import FrameRange
from ..store.reader import TargetStore
from ..store.staging import FramesPart, ShardResult, new_staging
from ..store.subset import ShardCopy
from ..video.pool.decode_pool import DecodePool
from ..video.probe import Probe
from .planner import StorePlan, retry_range, segments_of, video_columns

log = logging.getLogger(__name__)

MIXED = "the file changed, and a part of this video is stored from the former file"


def plan_retries(
    plan: StorePlan,
    teachers: Sequence[str],
    pool: DecodePool,
    run: dict[str, Any],
) -> None:
    """Plan the failed segments again, in new shards.

    A video without stored rows is identified again. A video with stored rows must still have the
    same file. A segment that failed under one of `teachers` is left until that file exists again,
    and a failed segment of a video whose file has changed fails for that reason.

    Args:
        plan: The store and its videos.
        teachers: The names of the teachers to run.
        pool: Probes the videos.
        run: The numerics of this command.
    """
    index = plan.writer.index
    without_frames, with_frames = _failed_segments(index, teachers)
    videos = np.unique(index.video[without_frames + with_frames]).tolist()
    probes: dict[int, Probe] = {}
    if videos:
        with progress_bar("probing", len(videos), "videos") as bar:
            paths = [plan.path(video) for video in videos]
            for video, probe in zip(videos, pool.probe(paths), strict=True):
                probes[video] = probe
                bar.advance(1)
    stored = set(index.video[index.live & (index.state == OK)].tolist())
    # A file that cannot be read has no digest.
    identified = {v: probe for v, probe in probes.items() if v not in stored and probe.digest}
    if identified:
        plan.writer.identify(
            list(identified), video_columns(list(identified.values()), plan.sampling)
        )
    plan.forget()
    changed = {
        video
        for video, probe in probes.items()
        if video in stored and probe.digest not in ("", plan.digest(video))
    }
    undecoded = [s for s in without_frames if index.video[s] not in changed]
    incomplete = [
        s
        for s in with_frames
        if probes[int(index.video[s])].error is None and index.video[s] not in changed
    ]
    segments: list[FrameRange] = []
    for s in undecoded:
        if index.first[s] == 0 and index.end[s] == -1:
            segments += segments_of(plan, pool, int(index.video[s]), s)
        else:
            segments.append(retry_range(index, s))
    plan.writer.add_segments(segments)
    # Segments that lack the same teachers share shards: in one shard, the rows of a teacher are
    # either all copied or all computed.
    missing = {s: _missing_teachers(index, s, teachers) for s in incomplete}
    incomplete.sort(key=lambda s: (missing[s], s))
    for _, group in groupby(incomplete, key=lambda s: missing[s]):
        plan.writer.add_segments([retry_range(index, s) for s in group])
    _fail_changed(
        plan,
        [s for s in without_frames if index.video[s] in changed and index.reason[s] != MIXED],
        run,
    )
    num_tried = len(undecoded) + len(incomplete)
    log.info(f"{num_tried} failed segments are tried again")
    if num_left := len(without_frames) + len(with_frames) - num_tried:
        log.info(
            f"{num_left} are left as they are: their files cannot be read, or are not those that the teachers saw"
        )


def copy_stored(plan: StorePlan, teachers: Sequence[str]) -> None:
    """Copy frames and rows of replaced segments into the shards that replace them.

    Rows of the teachers that are tried again are not copied. The shards are chosen by the tables of
    the store alone, so that any later run completes one that was killed.
    """
    writer_index = plan.writer.index
    shards = np.unique(writer_index.shard[writer_index.replaces >= 0]).tolist()
    if not shards:
        return
    source = TargetStore.open(plan.writer.root)
    index = source.index
    for shard in shards:
        new = np.flatnonzero(index.shard == shard)
        old = index.replaces[new]
        # Segments that failed as a whole have no frames to copy.
        if (old < 0).any() or (index.state[old] != OK).any():
            continue
        copy = ShardCopy(source, plan.writer, shard, new.tolist(), old.tolist())
        if shard not in index.frame_commits:
            copy.frames(index.video[new])
        for name, commits in index.teachers.items():
            if shard not in commits.shards and not any(
                name in _missing_teachers(index, s, teachers) for s in old.tolist()
            ):
                copy.teacher(name)


def _failed_segments(index: StoreIndex, teachers: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the live segments that failed as a whole, and those that failed under a teacher."""
    live = index.live
    without_frames = np.flatnonzero(live & (index.state == FAILED)).tolist()
    failed = {s for name in teachers if name in index.teachers for s in index.teachers[name].failed}
    return without_frames, sorted(s for s in failed if live[s] and index.state[s] == OK)


def _missing_teachers(index: StoreIndex, segment: int, teachers: Sequence[str]) -> tuple[str, ...]:
    """Return the teachers without rows to copy for a stored segment.

    Their rows are not stored, or the teacher failed and is among `teachers`, which are tried again.
    """
    return tuple(
        name
        for name, commits in index.teachers.items()
        if int(index.shard[segment]) not in commits.shards
        or (name in teachers and segment in commits.failed)
    )


def _fail_changed(plan: StorePlan, segments: Sequence[int], run: dict[str, Any]) -> None:
    """Append attempts that failed because the files of their videos have changed."""
    index = plan.writer.index
    planned = plan.writer.add_segments([retry_range(index, s) for s in segments])
    for shard, group in groupby(planned, key=lambda segment: segment.shard):
        ids = [segment.id for segment in group]
        zeros = [0] * len(ids)
        part = FramesPart(ids, zeros, zeros, [-1] * len(ids), dict.fromkeys(ids, MIXED))
        plan.writer.commit(
            ShardResult(shard, part, {}, str(new_staging(plan.writer.root, shard))), run
        )
