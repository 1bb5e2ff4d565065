"""The planning half of extraction: which files are new, what is in them, which shards they fill.

Everything here happens in the client. The video table grows by slabs, so that a killed planning run keeps
what it has probed; segments are planned in one act.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ..pipeline.corpus.sources import VideoList, escape_path, unescape_path
from ..pipeline.errors import StoreMismatchError, VideoError
from ..pipeline.targets import format as fmt
from ..pipeline.targets.index import FAILED, MOVED, OK
from ..pipeline.targets.plan import Stretch, cut
from ..pipeline.targets.store import TargetStore
from ..pipeline.targets.writer import StoreWriter
from ..pipeline.video.pool import DecodePool
from ..pipeline.video.probe import Probe
from ..pipeline.video.sampling import Sampling
from .extract_work import SegmentTask, ShardTask
from .screen import Screen

SLAB = 10_000  # videos probed between two writes of the video table


class StorePlan:
    """The store's tables as planning and tasks need them: who is listed, where each file lies now."""

    def __init__(self, writer: StoreWriter, videos: VideoList | None) -> None:
        self.writer = writer
        self.roots = {c["name"]: unescape_path(c["root"]) for c in writer.index.corpora}
        if videos is not None:
            # A corpus is known by its name: what the command line says of its place holds for this run.
            self.roots.update({c.name: c.root for c in videos.corpora})
        self.corpora: list[dict[str, str]] = list(writer.index.corpora)
        self._columns: dict[str, NDArray[Any]] = {}

    def column(self, name: str) -> NDArray[Any]:
        """A column of the video table [V], read once a state of the table."""
        n = self.writer.index.n_videos
        if name not in self._columns or len(self._columns[name]) != n:
            self._columns[name] = np.asarray(zarr.open_array(self.writer.root / "videos" / name, mode="r")[:n])
        return self._columns[name]

    def forget(self) -> None:
        """Read the columns again: rows were written in place."""
        self._columns.clear()

    def path(self, video: int) -> str:
        """Where a video lies in this run."""
        name = self.corpora[int(self.column("corpus")[video])]["name"]
        return f"{self.roots[name]}/{unescape_path(str(self.column('path')[video]))}"

    def digest(self, video: int) -> str:
        """Its digest when it was listed, '' if it could not be read then."""
        raw = bytes(self.column("digest")[video])
        return raw.hex() if any(raw) else ""


def add_new_videos(plan: StorePlan, videos: VideoList, pool: DecodePool, screen: Screen) -> int:
    """Probe the files that the store does not list yet and list them; returns how many.

    StoreMismatchError if a file that the teachers have seen has another size now.
    """
    names = {c["name"]: i for i, c in enumerate(plan.corpora)}
    for c in videos.corpora:
        if c.name not in names:
            names[c.name] = len(plan.corpora)
            plan.corpora.append({"name": c.name, "root": escape_path(c.root)})
    known = _known(plan)
    new: list[tuple[int, int]] = []
    for i in range(len(videos)):
        corpus = names[videos.corpora[int(videos.corpus[i])].name]
        if (corpus, escape_path(videos.paths[i])) not in known:
            new.append((i, corpus))
    if not new:
        return 0
    with screen.progress("probing", total=len(new), unit="videos") as bar:
        for at in range(0, len(new), SLAB):
            slab = new[at : at + SLAB]
            probes = []
            for probe in pool.probe([videos.absolute(i) for i, _ in slab]):
                probes.append(probe)
                bar.advance(1)
            columns = video_columns(probes, _sampling(plan))
            columns["corpus"] = [c for _, c in slab]
            columns["path"] = [escape_path(videos.paths[i]) for i, _ in slab]
            plan.writer.add_videos(columns, plan.corpora)
    return len(new)


def check_unchanged(plan: StorePlan, videos: VideoList) -> None:
    """StoreMismatchError for the first listed file whose size differs from the one the teachers saw."""
    state = plan.writer.index.video_state()
    size, known = plan.column("size"), _known(plan)
    names = {c["name"]: i for i, c in enumerate(plan.corpora)}
    for i in range(len(videos)):
        key = (names.get(videos.corpora[int(videos.corpus[i])].name, -1), escape_path(videos.paths[i]))
        video = known.get(key)
        if video is None or state[video] != OK:
            continue
        try:
            now = os.stat(videos.absolute(i)).st_size
        except OSError:
            continue  # gone now, but its targets stand: nothing to extract
        if now != size[video]:
            raise StoreMismatchError(
                f"{videos.absolute(i)}: {now} bytes, but the teachers saw a file of {int(size[video])} bytes"
            )


def plan_segments(plan: StorePlan, pool: DecodePool, screen: Screen) -> int:
    """Give every listed video without a segment its place in shards; returns how many segments."""
    writer = plan.writer
    planned = np.zeros(writer.index.n_videos, bool)
    planned[writer.index.video] = True
    todo = np.flatnonzero(~planned)
    if len(todo) == 0:
        return 0
    rows = writer.set_shard_rows_for(int(plan.column("rows_bound")[todo].sum()))
    stretches: list[Stretch] = []
    for v in todo.tolist():
        stretches += _stretches(plan, pool, v, int(plan.column("rows_bound")[v]), rows, -1)
    return len(writer.add_segments(stretches))


def plan_overflow(plan: StorePlan, pool: DecodePool) -> int:
    """Plan again, from an exact count, the segments that held more rows than their bound."""
    index = plan.writer.index
    moved = np.flatnonzero((index.state == MOVED) & index.live)
    stretches: list[Stretch] = []
    for s in moved.tolist():
        if index.first[s] == 0 and index.end[s] == -1:
            stretches += _exact(plan, pool, int(index.video[s]), s)
        else:  # one stretch of several: the others stand, so it keeps its frames and gets more room
            bound = min(2 * int(index.overflow[s]), plan.writer.shard_rows)
            stretches.append(Stretch(int(index.video[s]), int(index.first[s]), int(index.end[s]), bound, s))
    return len(plan.writer.add_segments(stretches))


def plan_retries(plan: StorePlan, teachers: Sequence[str], pool: DecodePool, screen: Screen) -> int:
    """Plan the failed videos again, in new shards; files that changed since are identified anew."""
    index = plan.writer.index
    live = index.live
    failed = np.zeros(len(index.video), bool)
    failed[np.flatnonzero((index.state == FAILED) & live)] = True
    for name in teachers:
        for s in index.teachers[name].failed if name in index.teachers else ():
            failed[s] |= live[s]
    ids = np.flatnonzero(failed)
    if len(ids) == 0:
        return 0
    videos = np.unique(index.video[ids])
    with screen.progress("probing", total=len(videos), unit="videos") as bar:
        for v, probe in zip(videos.tolist(), pool.probe([plan.path(v) for v in videos.tolist()]), strict=True):
            for name, values in video_columns([probe], _sampling(plan)).items():
                array = zarr.open_array(plan.writer.root / "videos" / name, mode="r+")
                spec = next(s for s in fmt.video_specs() if s.path == f"videos/{name}")
                array[v : v + 1] = fmt.as_numpy(spec, values)
            bar.advance(1)
    plan.forget()
    stretches: list[Stretch] = []
    for s in ids.tolist():
        v = int(index.video[s])
        if index.first[s] == 0 and index.end[s] == -1:
            stretches += _stretches(plan, pool, v, int(plan.column("rows_bound")[v]), plan.writer.shard_rows, s)
        else:
            stretches.append(Stretch(v, int(index.first[s]), int(index.end[s]), int(index.bound[s]), s))
    return len(plan.writer.add_segments(stretches))


def open_tasks(plan: StorePlan, teachers: Sequence[str]) -> list[int]:
    """Shards that lack their frames or the rows of one of these teachers, in order."""
    index = plan.writer.index
    return [
        shard
        for shard in range(index.n_shards)
        if shard not in index.frame_commits or any(shard not in index.teachers[t].shards for t in teachers)
    ]


def tasks(plan: StorePlan, shards: Sequence[int], teachers: Sequence[str]) -> Iterator[ShardTask]:
    """The work of each shard; over committed frames, that of the teachers it lacks."""
    index = plan.writer.index
    store = TargetStore.open(plan.writer.root) if any(s in index.frame_commits for s in shards) else None
    order = np.argsort(index.shard, kind="stable")
    begin = np.searchsorted(index.shard[order], np.arange(index.n_shards + 1))
    for shard in shards:
        mine = order[begin[shard] : begin[shard + 1]]
        there = shard in index.frame_commits
        lacking = {t: index.teachers[t].encoding for t in teachers if shard not in index.teachers[t].shards}
        if there:
            mine = mine[index.state[mine] == OK]
        rows_there = int(index.rows[mine].sum()) if there else 0
        segments = tuple(_segment(plan, int(s), store if there else None) for s in mine)
        yield ShardTask(shard, segments, lacking, there, rows_there)


def _segment(plan: StorePlan, s: int, store: TargetStore | None) -> SegmentTask:
    index = plan.writer.index
    video = int(index.video[s])
    there = None
    if store is not None:
        rows = np.arange(index.row[s], index.row[s] + index.rows[s])
        there = (store.read_table("index", rows), store.read_table("pts", rows))
    end = int(index.end[s])
    return SegmentTask(
        s,
        video,
        plan.path(video),
        plan.digest(video),
        int(index.first[s]),
        None if end < 0 else end,
        int(index.bound[s]),
        there,
    )


def video_columns(probes: Sequence[Probe], sampling: Sampling) -> dict[str, list[Any]]:
    """Columns of the video table that come from probing."""
    digests = [bytes.fromhex(p.digest) if p.digest else bytes(16) for p in probes]
    return {
        "size": [p.size for p in probes],
        "digest": [list(d) for d in digests],
        "duration": [p.duration for p in probes],
        "fps": [p.fps for p in probes],
        "rows_bound": [0 if p.error else sampling.rows_bound(p) for p in probes],
        "time_base_num": [p.time_base[0] for p in probes],
        "time_base_den": [p.time_base[1] for p in probes],
        "width": [p.width for p in probes],
        "height": [p.height for p in probes],
    }


def _stretches(
    plan: StorePlan, pool: DecodePool, video: int, bound: int, shard_rows: int, replaces: int
) -> list[Stretch]:
    if bound <= shard_rows:
        return [Stretch(video, 0, -1, bound, replaces)]
    return _exact(plan, pool, video, replaces)


def _exact(plan: StorePlan, pool: DecodePool, video: int, replaces: int) -> list[Stretch]:
    """Stretches of a video from its whole timeline: for long videos and for those that beat their bound."""
    try:
        timeline = pool.timeline(plan.path(video))
    except VideoError:
        return [Stretch(video, 0, -1, 0, replaces)]  # the decode will say what is wrong with it
    wanted = _sampling(plan).select(timeline.pts, timeline.key, timeline.time_base)
    keys = np.flatnonzero(timeline.key)
    parts = cut(video, wanted, keys, len(timeline.pts), plan.writer.shard_rows)
    return [Stretch(p.video, p.first, p.end, p.bound, replaces) for p in parts]


def _known(plan: StorePlan) -> dict[tuple[int, str], int]:
    corpus, path = plan.column("corpus"), plan.column("path")
    return {(int(c), str(p)): i for i, (c, p) in enumerate(zip(corpus, path, strict=True))}


def _sampling(plan: StorePlan) -> Sampling:
    return Sampling.model_validate(plan.writer.attributes["sampling"])


