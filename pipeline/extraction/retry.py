"""Try failed videos again: attempts are appended in new shards, and stored rows stay.

A segment fails with its frames, and then nothing of it is stored, or under a teacher alone, next to
rows of others. The new attempt of the second kind copies frames and the other teachers' rows: a
segment that is replaced does not exist any more.
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
from .planner import StorePlan, again, segments_of, video_columns

log = logging.getLogger(__name__)

MIXED = "the file changed, and a part of this video is stored from the former file"


def plan_retries(
    plan: StorePlan,
    teachers: Sequence[str],
    pool: DecodePool,
    run: dict[str, Any],
) -> None:
    """Plan what failed again, in new shards.

    A video of which nothing is stored is identified again. A video with stored rows must still be
    the same file: a segment that failed under one of `teachers` waits until that file exists again,
    and a failed segment of a video whose file has changed fails for that reason.
    """
    index = plan.writer.index
    without, partly = _failed(index, teachers)
    videos = np.unique(index.video[without + partly]).tolist()
    probes: dict[int, Probe] = {}
    if videos:
        with progress_bar("probing", len(videos), "videos") as bar:
            for v, probe in zip(videos, pool.probe([plan.path(v) for v in videos]), strict=True):
                probes[v] = probe
                bar.advance(1)
    stored = set(index.video[index.live & (index.state == OK)].tolist())
    # A file that cannot be read cannot be identified.
    identified = {v: probe for v, probe in probes.items() if v not in stored and probe.digest}
    if identified:
        plan.writer.identify(
            list(identified), video_columns(list(identified.values()), plan.sampling)
        )
    plan.forget()
    mixed = {
        v for v, probe in probes.items() if v in stored and probe.digest not in ("", plan.digest(v))
    }
    fresh = [s for s in without if index.video[s] not in mixed]
    ready = [
        s
        for s in partly
        if probes[int(index.video[s])].error is None and index.video[s] not in mixed
    ]
    segments: list[FrameRange] = []
    for s in fresh:
        if index.first[s] == 0 and index.end[s] == -1:
            segments += segments_of(plan, pool, int(index.video[s]), s)
        else:
            segments.append(again(index, s))
    plan.writer.add_segments(segments)
    # Segments that lack the same teachers share shards: all rows of a teacher in a shard are
    # copied, or all are computed.
    lacking = {s: _lacking(index, s, teachers) for s in ready}
    for _, group in groupby(sorted(ready, key=lambda s: (lacking[s], s)), key=lambda s: lacking[s]):
        plan.writer.add_segments([again(index, s) for s in group])
    _fail(plan, [s for s in without if index.video[s] in mixed and index.reason[s] != MIXED], run)
    tried = len(fresh) + len(ready)
    log.info(f"{tried} failed segments are tried again")
    if left := len(without) + len(partly) - tried:
        log.info(
            f"{left} are left as they are: their files cannot be read, or are not those that the teachers saw"
        )


def copy_stored(plan: StorePlan, teachers: Sequence[str]) -> None:
    """Fill shards that replace stored segments with their frames and rows.

    Rows of the teachers to try again are not copied. The work follows from the tables alone, so
    that any other run continues one that was killed.
    """
    planned = plan.writer.index
    shards = np.unique(planned.shard[planned.replaces >= 0]).tolist()
    if not shards:
        return
    source = TargetStore.open(plan.writer.root)
    index = source.index
    for shard in shards:
        new = np.flatnonzero(index.shard == shard)
        old = index.replaces[new]
        if (old < 0).any() or (index.state[old] != OK).any():
            continue  # these have no frames to copy
        copy = ShardCopy(source, plan.writer, shard, new.tolist(), old.tolist())
        if shard not in index.frame_commits:
            copy.frames(index.video[new])
        for name, of in index.teachers.items():
            if shard not in of.shards and not any(
                name in _lacking(index, s, teachers) for s in old.tolist()
            ):
                copy.teacher(name)


def _failed(index: StoreIndex, teachers: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return live segments that failed with their frames, and those that failed under a teacher."""
    live = index.live
    without = np.flatnonzero(live & (index.state == FAILED)).tolist()
    under = {s for name in teachers if name in index.teachers for s in index.teachers[name].failed}
    return without, sorted(s for s in under if live[s] and index.state[s] == OK)


def _lacking(index: StoreIndex, segment: int, teachers: Sequence[str]) -> tuple[str, ...]:
    """Return teachers without rows to copy for a stored segment: absent, or to be tried again."""
    return tuple(
        name
        for name, of in index.teachers.items()
        if int(index.shard[segment]) not in of.shards or (name in teachers and segment in of.failed)
    )


def _fail(plan: StorePlan, segments: Sequence[int], run: dict[str, Any]) -> None:
    """Append attempts that failed because their videos' files are other ones now."""
    index = plan.writer.index
    placed = plan.writer.add_segments([again(index, s) for s in segments])
    for shard, group in groupby(placed, key=lambda segment: segment.shard):
        ids = [segment.id for segment in group]
        zeros = [0] * len(ids)
        part = FramesPart(ids, zeros, zeros, [-1] * len(ids), dict.fromkeys(ids, MIXED))
        plan.writer.commit(
            ShardResult(shard, part, {}, str(new_staging(plan.writer.root, shard))), run
        )
