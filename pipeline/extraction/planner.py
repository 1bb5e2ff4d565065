"""The planning half of extraction: which files are new, what is in them, which shards they fill.

Everything here happens in the client. The video table grows by slabs, so that a killed planning run
keeps what it has probed; segments are planned in one act.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import SameFailure, StoreMismatchError, VideoError
from ..common.progress_bar import progress_bar
from ..corpus.sources import Corpus, VideoList, escape_path, unescape_path
from ..store.digests import read_rows
from ..store.index import OK, OVERFLOWED, StoreIndex
from ..store.planning import FrameRange, cut
from ..store.reader import TargetStore
from ..store.storage import LocalFiles
from ..store.writer import StoreWriter
from ..video.container import digest
from ..video.pool.decode_pool import DecodePool
from ..video.probe import Probe
from ..video.sampling import Sampling
from .extract_options import PROBED_AT_ONCE
from .shard_filler import SegmentTask, ShardTask


class StorePlan:
    """The store's tables as planning and tasks need them: listed videos and their current files."""

    def __init__(self, writer: StoreWriter) -> None:
        self.writer = writer
        self.roots = {c["name"]: unescape_path(c["root"]) for c in writer.index.corpora}
        self.corpora: list[dict[str, str]] = list(writer.index.corpora)
        self._columns: dict[str, NDArray[Any]] = {}

    def locate(self, videos: VideoList) -> VideoList:
        """Take the folders of corpora from `videos`, for this run.

        Returns the videos as the store would list them. A corpus is known by its name, and videos
        by their paths in it. A list in another folder than before, whose files stayed in place,
        gives each a new path: its videos are located by the root that the store records.
        """
        corpora, paths = list(videos.corpora), list(videos.paths)
        for number, corpus in enumerate(videos.corpora):
            recorded = self.roots.get(corpus.name, corpus.root)
            if recorded != corpus.root:
                numbers = np.flatnonzero(videos.corpus == number).tolist()
                listed = {unescape_path(path) for path in self.paths_of(corpus.name).values()}
                before = {i: os.path.relpath(videos.absolute(i), recorded) for i in numbers}
                if sum(path in listed for path in before.values()) > sum(
                    paths[i] in listed for i in numbers
                ):
                    corpora[number] = Corpus(corpus.name, recorded)
                    for i, path in before.items():
                        paths[i] = path
        self.roots.update({c.name: c.root for c in corpora})
        return replace(videos, corpora=tuple(corpora), paths=paths)

    def paths_of(self, corpus: str) -> dict[int, str]:
        """Return the escaped paths of a corpus' videos, by video."""
        number, path = [c["name"] for c in self.corpora].index(corpus), self.column("path")
        return {v: str(path[v]) for v in np.flatnonzero(self.column("corpus") == number).tolist()}

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the video table [V], read once per state of the table."""
        n = self.writer.index.n_videos
        if name not in self._columns or len(self._columns[name]) != n:
            files, ranges = LocalFiles(self.writer.root), self.writer.index.ranges
            self._columns[name] = read_rows(files, f"videos/{name}", 0, n, ranges)
        return self._columns[name]

    @property
    def sampling(self) -> Sampling:
        """Which frames the store keeps."""
        return Sampling.model_validate(self.writer.attributes["sampling"])

    def forget(self) -> None:
        """Read the columns again: rows were written in place."""
        self._columns.clear()

    def path(self, video: int) -> str:
        """Return where a video is located in this run."""
        name = self.corpora[int(self.column("corpus")[video])]["name"]
        return f"{self.roots[name]}/{unescape_path(str(self.column('path')[video]))}"

    def digest(self, video: int) -> str:
        """Return a video's digest when it was listed, '' if it could not be read then."""
        raw = bytes(self.column("digest")[video])
        return raw.hex() if any(raw) else ""


def new_videos(plan: StorePlan, videos: VideoList) -> list[int]:
    """Return those of the located videos that the store does not list yet."""
    listed = _known(plan)
    return [i for i, key in enumerate(_keys(plan, videos)) if key not in listed]


def add_new_videos(plan: StorePlan, videos: VideoList, pool: DecodePool, max_failures: int) -> int:
    """Probe the files that the store does not list yet and list them; returns how many.

    StoreMismatchError if they would join another corpus of the same name. DistInitError where the
    first `max_failures` of them, or all of fewer, cannot be read for one reason; then none of them
    is listed.
    """
    names = {c["name"]: i for i, c in enumerate(plan.corpora)}
    for c in videos.corpora:
        if c.name not in names:
            names[c.name] = len(plan.corpora)
            plan.corpora.append({"name": c.name, "root": escape_path(c.root)})
    new = [(i, names[videos.corpora[int(videos.corpus[i])].name]) for i in new_videos(plan, videos)]
    if not new:
        return 0
    for corpus in np.unique([c for _, c in new]).tolist():
        _check_moved(plan, plan.corpora[corpus])
    watch = SameFailure(max_failures)
    with progress_bar("probing", len(new), "videos") as bar:
        for at in range(0, len(new), PROBED_AT_ONCE):
            slab = new[at : at + PROBED_AT_ONCE]
            probes = []
            for (i, _), probe in zip(
                slab, pool.probe([videos.absolute(i) for i, _ in slab]), strict=True
            ):
                watch.add(i, probe.error, videos.absolute(i))
                probes.append(probe)
                bar.advance(1)
            if at + PROBED_AT_ONCE >= len(new) and not (plan.writer.index.state == OK).any():
                watch.finish()
            columns = video_columns(probes, plan.sampling)
            columns["corpus"] = [c for _, c in slab]
            columns["path"] = [escape_path(videos.paths[i]) for i, _ in slab]
            plan.writer.add_videos(columns, plan.corpora)
    return len(new)


def _check_moved(plan: StorePlan, corpus: dict[str, str]) -> None:
    """Raise StoreMismatchError if videos of a corpus do not exist in its current folder.

    What is new in that folder then belongs to another corpus. A corpus that moved as a whole has
    all of them; one that stays where it was may lose some.
    """
    name, old_root, root = corpus["name"], unescape_path(corpus["root"]), plan.roots[corpus["name"]]
    if old_root == root:
        return
    seen = {v: path for v, path in plan.paths_of(name).items() if plan.digest(v)}
    gone = sum(
        not os.path.lexists(os.path.join(root, unescape_path(path))) for path in seen.values()
    )
    if gone:
        raise StoreMismatchError(
            f"corpus {name!r} was extracted from {old_root}, and {gone} of its {len(seen)} videos are not in {root}; "
            f"give the new source another name (new={root}), or the whole moved folder"
        )


def check_unchanged(plan: StorePlan, videos: VideoList) -> None:
    """Raise StoreMismatchError for the first listed file whose size the teachers did not see."""
    state = plan.writer.index.video_state()
    size, listed = plan.column("size"), _known(plan)
    for i, key in enumerate(_keys(plan, videos)):
        video = listed.get(key)
        if video is None or state[video] != OK:
            continue
        try:
            now = os.stat(videos.absolute(i)).st_size
        except OSError:
            continue  # deleted, but its targets stay valid: nothing to extract
        if now != size[video]:
            raise StoreMismatchError(
                f"{videos.absolute(i)}: {now} bytes, but the teachers saw a file of {int(size[video])} bytes; put that "
                "file back, or leave this one out of the sources"
            )


def plan_segments(plan: StorePlan, pool: DecodePool) -> None:
    """Give every listed video without a segment its place in shards."""
    writer = plan.writer
    planned = np.zeros(writer.index.n_videos, bool)
    planned[writer.index.video] = True
    todo = np.flatnonzero(~planned)
    if len(todo) == 0:
        return
    writer.set_shard_rows_for(int(plan.column("rows_bound")[todo].sum()))
    segments: list[FrameRange] = []
    for video in todo.tolist():
        segments += segments_of(plan, pool, video)
    writer.add_segments(segments)


def plan_overflow(plan: StorePlan, pool: DecodePool) -> None:
    """Plan again, from an exact count, the segments that held more rows than their bound."""
    index = plan.writer.index
    moved = np.flatnonzero((index.state == OVERFLOWED) & index.live)
    segments: list[FrameRange] = []
    for s in moved.tolist():
        if index.first[s] == 0 and index.end[s] == -1:
            segments += _exact(plan, pool, int(index.video[s]), s)
        else:  # one range of several: the others stay, so it keeps its frames and gets more rows
            bound = min(2 * int(index.overflow[s]), plan.writer.shard_rows)
            segments.append(replace(again(index, s), bound=bound))
    plan.writer.add_segments(segments)


def open_tasks(plan: StorePlan, teachers: Sequence[str]) -> list[int]:
    """Return shards that lack their frames or the rows of one of these teachers, in order."""
    index = plan.writer.index
    return [
        shard
        for shard in range(index.n_shards)
        if shard not in index.frame_commits
        or any(shard not in index.teachers[t].shards for t in teachers)
    ]


def hashed_in_part(plan: StorePlan) -> list[int]:
    """Return the shards with a segment that was not hashed, and whose video can be read now."""
    index = plan.writer.index

    def readable(segment: int) -> bool:
        video = int(index.video[segment])
        try:
            return digest(plan.path(video)) == plan.digest(video)
        except VideoError:
            return False

    return sorted({int(index.shard[s]) for s in index.unhashed if readable(s)})


def tasks(plan: StorePlan, shards: Sequence[int], teachers: Sequence[str]) -> Iterator[ShardTask]:
    """Return the work of each shard; with committed frames, only that of the teachers it lacks."""
    index = plan.writer.index
    store = (
        TargetStore.open(plan.writer.root)
        if any(s in index.frame_commits for s in shards)
        else None
    )
    order = np.argsort(index.shard, kind="stable")
    begin = np.searchsorted(index.shard[order], np.arange(index.n_shards + 1))
    for shard in shards:
        segment_ids = order[begin[shard] : begin[shard + 1]]
        stored = shard in index.frame_commits
        lacking = {
            t: index.teachers[t].encoding for t in teachers if shard not in index.teachers[t].shards
        }
        if stored:
            segment_ids = segment_ids[index.state[segment_ids] == OK]
        num_rows_stored = int(index.rows[segment_ids].sum()) if stored else 0
        segments = tuple(_segment(plan, int(s), store if stored else None) for s in segment_ids)
        hashes = index.version >= 2 and shard not in index.hashes
        yield ShardTask(shard, segments, lacking, stored, num_rows_stored, hashes)


def _segment(plan: StorePlan, s: int, store: TargetStore | None) -> SegmentTask:
    index = plan.writer.index
    video = int(index.video[s])
    frames = None
    if store is not None:
        rows = store.rows_of_segments(np.array([s]))
        frames = (store.read_table("index", rows), store.read_table("pts", rows))
    end = int(index.end[s])
    return SegmentTask(
        s,
        video,
        plan.path(video),
        plan.digest(video),
        int(index.first[s]),
        None if end < 0 else end,
        int(index.bound[s]),
        frames,
    )


def video_columns(probes: Sequence[Probe], sampling: Sampling) -> dict[str, list[Any]]:
    """Return the columns of the video table that come from probing."""
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


def again(index: StoreIndex, segment: int) -> FrameRange:
    """Return the frames of a segment as another attempt at it."""
    video, first, end, bound = (
        int(column[segment]) for column in (index.video, index.first, index.end, index.bound)
    )
    return FrameRange(video, first, end, bound, segment)


def segments_of(
    plan: StorePlan, pool: DecodePool, video: int, replaces: int = -1
) -> list[FrameRange]:
    """Return a video as ranges of frames that fit a shard, by the bound of its probe."""
    bound = int(plan.column("rows_bound")[video])
    if bound <= plan.writer.shard_rows:
        return [FrameRange(video, 0, -1, bound, replaces)]
    return _exact(plan, pool, video, replaces)


def _exact(plan: StorePlan, pool: DecodePool, video: int, replaces: int) -> list[FrameRange]:
    """Return ranges of a video from its whole timeline.

    For long videos and for those with more frames than their bound.
    """
    try:
        timeline = pool.timeline(plan.path(video))
    except VideoError:
        # The decode will report what is wrong with it.
        return [FrameRange(video, 0, -1, 0, replaces)]
    selected = plan.sampling.select(timeline.pts, timeline.key, timeline.time_base)
    keys = np.flatnonzero(timeline.key)
    parts = cut(video, selected, keys, len(timeline.pts), plan.writer.shard_rows)
    return [replace(part, replaces=replaces) for part in parts]


def ids_of(plan: StorePlan, videos: VideoList) -> list[int]:
    """Return the store's numbers of those located videos that it lists."""
    listed = _known(plan)
    return [listed[key] for key in _keys(plan, videos) if key in listed]


def _keys(plan: StorePlan, videos: VideoList) -> list[tuple[int, str]]:
    """Return the keys in `_known` of located videos; the corpus is -1 if the store has none."""
    names = {c["name"]: i for i, c in enumerate(plan.corpora)}
    of = [names.get(corpus.name, -1) for corpus in videos.corpora]
    return [
        (of[int(c)], escape_path(path)) for c, path in zip(videos.corpus, videos.paths, strict=True)
    ]


def _known(plan: StorePlan) -> dict[tuple[int, str], int]:
    corpus, path = plan.column("corpus"), plan.column("path")
    return {(int(c), str(p)): i for i, (c, p) in enumerate(zip(corpus, path, strict=True))}
