"""Plan an extraction: list and probe new files, and assign their frames to shards.

The client alone plans. Videos are probed and added to the video table in slabs, so that a killed
run keeps those that it has probed. Segments are added in one write.
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
    """The videos that a store lists, and their current files."""

    def __init__(self, writer: StoreWriter) -> None:
        self.writer = writer
        self.roots = {c["name"]: unescape_path(c["root"]) for c in writer.index.corpora}
        self.corpora: list[dict[str, str]] = list(writer.index.corpora)
        self._columns: dict[str, NDArray[Any]] = {}

    def locate(self, videos: VideoList) -> VideoList:
        """Take the folders of corpora from `videos` for this run.

        A corpus is identified by its name, and a video by its path in the corpus. If a list of
        files was moved to another folder but the files were not, each has a new path in the corpus:
        then its videos are located by the root that the store records.

        Returns:
            The videos with the roots and paths under which the store lists them.
        """
        corpora, paths = list(videos.corpora), list(videos.paths)
        for number, corpus in enumerate(videos.corpora):
            recorded = self.roots.get(corpus.name, corpus.root)
            if recorded != corpus.root:
                numbers = np.flatnonzero(videos.corpus == number).tolist()
                stored = {unescape_path(path) for path in self.paths_of(corpus.name).values()}
                old_paths = {i: os.path.relpath(videos.absolute(i), recorded) for i in numbers}
                num_by_old_path = sum(path in stored for path in old_paths.values())
                num_by_new_path = sum(paths[i] in stored for i in numbers)
                if num_by_old_path > num_by_new_path:
                    corpora[number] = Corpus(corpus.name, recorded)
                    for i, path in old_paths.items():
                        paths[i] = path
        self.roots.update({c.name: c.root for c in corpora})
        return replace(videos, corpora=tuple(corpora), paths=paths)

    def paths_of(self, corpus: str) -> dict[int, str]:
        """Return the escaped path of each video of a corpus, by the number of the video."""
        number, path = [c["name"] for c in self.corpora].index(corpus), self.column("path")
        return {v: str(path[v]) for v in np.flatnonzero(self.column("corpus") == number).tolist()}

    def column(self, name: str) -> NDArray[Any]:
        """Return a column of the video table [V]; it is cached until the table grows."""
        n = self.writer.index.n_videos
        if name not in self._columns or len(self._columns[name]) != n:
            files, ranges = LocalFiles(self.writer.root), self.writer.index.ranges
            self._columns[name] = read_rows(files, f"videos/{name}", 0, n, ranges)
        return self._columns[name]

    @property
    def sampling(self) -> Sampling:
        """The sampling of the store's frames."""
        return Sampling.model_validate(self.writer.attributes["sampling"])

    def forget(self) -> None:
        """Drop the cached columns, after rows of the table were rewritten."""
        self._columns.clear()

    def path(self, video: int) -> str:
        """Return the path of a video's file in this run."""
        name = self.corpora[int(self.column("corpus")[video])]["name"]
        return f"{self.roots[name]}/{unescape_path(str(self.column('path')[video]))}"

    def digest(self, video: int) -> str:
        """Return the digest that a video had when it was listed; '' if it could not be read."""
        raw = bytes(self.column("digest")[video])
        return raw.hex() if any(raw) else ""


def new_videos(plan: StorePlan, videos: VideoList) -> list[int]:
    """Return the indices of located videos that the store does not list yet."""
    listed = _listed_videos(plan)
    return [i for i, key in enumerate(_keys(plan, videos)) if key not in listed]


def add_new_videos(plan: StorePlan, videos: VideoList, pool: DecodePool, max_failures: int) -> int:
    """Probe and list the files that the store does not list yet; return their number.

    Raises:
        StoreMismatchError: The files would join another corpus of the same name.
        DistInitError: The first `max_failures` of them, or all of fewer, cannot be read for one
            reason. None of them is listed then.
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
        for start in range(0, len(new), PROBED_AT_ONCE):
            slab = new[start : start + PROBED_AT_ONCE]
            probes = []
            for (i, _), probe in zip(
                slab, pool.probe([videos.absolute(i) for i, _ in slab]), strict=True
            ):
                watch.add(i, probe.error, videos.absolute(i))
                probes.append(probe)
                bar.advance(1)
            if start + PROBED_AT_ONCE >= len(new) and not (plan.writer.index.state == OK).any():
                watch.finish()
            columns = video_columns(probes, plan.sampling)
            columns["corpus"] = [c for _, c in slab]
            columns["path"] = [escape_path(videos.paths[i]) for i, _ in slab]
            plan.writer.add_videos(columns, plan.corpora)
    return len(new)


def _check_moved(plan: StorePlan, corpus: dict[str, str]) -> None:
    """Raise StoreMismatchError if videos of a moved corpus do not exist in its current folder.

    New videos in that folder then belong to another corpus. A corpus that was moved as a whole has
    all of its videos. One whose folder is the same may lose some.
    """
    name, old_root, root = corpus["name"], unescape_path(corpus["root"]), plan.roots[corpus["name"]]
    if old_root == root:
        return
    paths = [path for video, path in plan.paths_of(name).items() if plan.digest(video)]
    num_missing = sum(
        not os.path.lexists(os.path.join(root, unescape_path(path))) for path in paths
    )
    if num_missing:
        raise StoreMismatchError(
            f"corpus {name!r} was extracted from {old_root}, and {num_missing} of its {len(paths)} videos are "
            f"not in {root}; give the new source another name (new={root}), or the whole moved folder"
        )


def check_unchanged(plan: StorePlan, videos: VideoList) -> None:
    """Raise StoreMismatchError for the first file whose size is not that of the stored video."""
    state = plan.writer.index.video_state()
    size, listed = plan.column("size"), _listed_videos(plan)
    for i, key in enumerate(_keys(plan, videos)):
        video = listed.get(key)
        if video is None or state[video] != OK:
            continue
        try:
            current_size = os.stat(videos.absolute(i)).st_size
        except OSError:
            # The targets of a deleted file stay valid.
            continue
        if current_size != size[video]:
            raise StoreMismatchError(
                f"{videos.absolute(i)}: {current_size} bytes, but the teachers saw a file of {int(size[video])} bytes; "
                "put that file back, or leave this one out of the sources"
            )


def plan_segments(plan: StorePlan, pool: DecodePool) -> None:
    """Assign every listed video without a segment to shards."""
    writer = plan.writer
    is_planned = np.zeros(writer.index.n_videos, bool)
    is_planned[writer.index.video] = True
    videos = np.flatnonzero(~is_planned)
    if len(videos) == 0:
        return
    writer.set_shard_rows_for(int(plan.column("rows_bound")[videos].sum()))
    segments: list[FrameRange] = []
    for video in videos.tolist():
        segments += segments_of(plan, pool, video)
    writer.add_segments(segments)


def plan_overflow(plan: StorePlan, pool: DecodePool) -> None:
    """Plan again, from an exact count, the segments that held more rows than their bound."""
    index = plan.writer.index
    overflowed = np.flatnonzero((index.state == OVERFLOWED) & index.live)
    segments: list[FrameRange] = []
    for s in overflowed.tolist():
        if index.first[s] == 0 and index.end[s] == -1:
            segments += _exact_segments(plan, pool, int(index.video[s]), s)
        else:
            # The other ranges of the video stay, so that this one keeps its frames and gets more
            # rows.
            bound = min(2 * int(index.overflow[s]), plan.writer.shard_rows)
            segments.append(replace(retry_range(index, s), bound=bound))
    plan.writer.add_segments(segments)


def open_tasks(plan: StorePlan, teachers: Sequence[str]) -> list[int]:
    """Return the shards that lack their frames or the rows of one of these teachers, in order."""
    index = plan.writer.index
    return [
        shard
        for shard in range(index.n_shards)
        if shard not in index.frame_commits
        or any(shard not in index.teachers[t].shards for t in teachers)
    ]


def hashed_in_part(plan: StorePlan) -> list[int]:
    """Return the shards that lack the hashes of a segment whose video can be read now."""
    index = plan.writer.index

    def readable(segment: int) -> bool:
        video = int(index.video[segment])
        try:
            return digest(plan.path(video)) == plan.digest(video)
        except VideoError:
            return False

    return sorted({int(index.shard[s]) for s in index.unhashed if readable(s)})


def tasks(plan: StorePlan, shards: Sequence[int], teachers: Sequence[str]) -> Iterator[ShardTask]:
    """Yield the task of each shard; if its frames are committed, for the missing teachers only."""
    index = plan.writer.index
    store = (
        TargetStore.open(plan.writer.root)
        if any(s in index.frame_commits for s in shards)
        else None
    )
    order = np.argsort(index.shard, kind="stable")
    starts = np.searchsorted(index.shard[order], np.arange(index.n_shards + 1))
    for shard in shards:
        segments = order[starts[shard] : starts[shard + 1]]
        frames_stored = shard in index.frame_commits
        encodings = {
            t: index.teachers[t].encoding for t in teachers if shard not in index.teachers[t].shards
        }
        if frames_stored:
            segments = segments[index.state[segments] == OK]
        yield ShardTask(
            shard,
            tuple(_segment_task(plan, int(s), store if frames_stored else None) for s in segments),
            encodings,
            frames_stored,
            num_rows_stored=int(index.rows[segments].sum()) if frames_stored else 0,
            hashes=index.version >= 2 and shard not in index.hashes,
        )


def _segment_task(plan: StorePlan, segment: int, store: TargetStore | None) -> SegmentTask:
    """Return the task of a segment, with its stored frames if a store is passed."""
    index = plan.writer.index
    video = int(index.video[segment])
    frames = None
    if store is not None:
        rows = store.rows_of_segments(np.array([segment]))
        frames = (store.read_table("index", rows), store.read_table("pts", rows))
    end = int(index.end[segment])
    return SegmentTask(
        segment,
        video,
        plan.path(video),
        plan.digest(video),
        int(index.first[segment]),
        None if end < 0 else end,
        int(index.bound[segment]),
        frames,
    )


def video_columns(probes: Sequence[Probe], sampling: Sampling) -> dict[str, list[Any]]:
    """Return the columns of the video table that are probed."""
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


def retry_range(index: StoreIndex, segment: int) -> FrameRange:
    """Return the frames of a segment as a new attempt that replaces it."""
    video, first, end, bound = (
        int(column[segment]) for column in (index.video, index.first, index.end, index.bound)
    )
    return FrameRange(video, first, end, bound, segment)


def segments_of(
    plan: StorePlan, pool: DecodePool, video: int, replaces: int = -1
) -> list[FrameRange]:
    """Divide a video into ranges of frames that fit into a shard, by the bound of its probe."""
    bound = int(plan.column("rows_bound")[video])
    if bound <= plan.writer.shard_rows:
        return [FrameRange(video, 0, -1, bound, replaces)]
    return _exact_segments(plan, pool, video, replaces)


def _exact_segments(
    plan: StorePlan, pool: DecodePool, video: int, replaces: int
) -> list[FrameRange]:
    """Divide a video into ranges by its whole timeline.

    This is for long videos, and for videos with more frames than their bound.
    """
    try:
        timeline = pool.timeline(plan.path(video))
    except VideoError:
        # Decoding reports the reason.
        return [FrameRange(video, 0, -1, 0, replaces)]
    selected = plan.sampling.select(timeline.pts, timeline.key, timeline.time_base)
    keys = np.flatnonzero(timeline.key)
    ranges = cut(video, selected, keys, len(timeline.pts), plan.writer.shard_rows)
    return [replace(frame_range, replaces=replaces) for frame_range in ranges]


def ids_of(plan: StorePlan, videos: VideoList) -> list[int]:
    """Return the numbers in the store of those located videos that it lists."""
    listed = _listed_videos(plan)
    return [listed[key] for key in _keys(plan, videos) if key in listed]


def _keys(plan: StorePlan, videos: VideoList) -> list[tuple[int, str]]:
    """Return the (corpus, path) of located videos; the corpus is -1 if the store has none."""
    numbers = {c["name"]: i for i, c in enumerate(plan.corpora)}
    corpora = [numbers.get(corpus.name, -1) for corpus in videos.corpora]
    return [
        (corpora[int(c)], escape_path(path))
        for c, path in zip(videos.corpus, videos.paths, strict=True)
    ]


def _listed_videos(plan: StorePlan) -> dict[tuple[int, str], int]:
    """Return the number in the store of each (corpus, escaped path)."""
    corpus, path = plan.column("corpus"), plan.column("path")
    return {(int(c), str(p)): i for i, (c, p) in enumerate(zip(corpus, path, strict=True))}
