"""Compare the frames of a store with its videos, without a teacher.

This finds frames that version 0.1 read in a different order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..common.errors import VideoError
from ..common.processes import cores
from ..common.progress_bar import progress_bar
from ..store.index import OK
from ..store.reader import TargetStore, check_video_roots
from ..store.verify import Finding
from ..store.writer import StoreWriter
from ..video.container import digest
from ..video.geometry import View
from ..video.packets import Timeline
from ..video.pool.decode_pool import DecodePool, Failed
from .planner import video_columns


def frame_check(
    store: TargetStore, video_roots: Mapping[str, str] | None = None
) -> dict[int, list[Finding]]:
    """Return findings for each video whose file lacks the frames, or the size, of the store.

    video_roots: corpus → its current folder. Most files are only read, not decoded.

    Raises:
        UsageError: The store does not have a corpus.
    """
    check_video_roots(store, video_roots or {})
    findings: dict[int, list[Finding]] = {}
    readable: list[int] = []
    videos = np.flatnonzero((store.video_state == OK) & (store.row_counts > 0)).tolist()
    for video in videos:
        path = store.video_path(video, video_roots)
        try:
            here = digest(path)
        except VideoError as error:
            findings[video] = [Finding(f"{path}: {error}")]
            continue
        if here == store.digest(video):
            readable.append(video)
        else:
            changed = f"changed, its digest is {here}, the teachers saw {store.digest(video)}"
            findings[video] = [Finding(f"{path}: {changed}")]
    view = View(resize=(16, 16))  # nothing is rendered
    with (
        DecodePool(processes=cores(), views=[view]) as pool,
        progress_bar("reading videos", len(readable), "videos") as bar,
    ):
        paths = [store.video_path(video, video_roots) for video in readable]
        for video, path, read in zip(readable, paths, pool.timelines(paths), strict=True):
            if isinstance(read, Failed):
                findings[video] = [Finding(f"{path}: {read.reason}")]
            elif off := list(_compare(store, video, path, *read)):
                findings[video] = off
            bar.advance(1)
    return findings


def _compare(
    store: TargetStore, video: int, path: str, timeline: Timeline, size: tuple[int, int]
) -> Iterator[Finding]:
    """Return one finding per shard that holds frames which the file does not have."""
    segments = store.segments(video).tolist()
    stored_size = int(store.column("width")[video]), int(store.column("height")[video])
    if size != stored_size:
        seen = f"shown at {size[0]}x{size[1]} pixels, the teachers saw {stored_size[0]}x{stored_size[1]}"
        yield from (Finding(f"{path}: {seen}", int(store.index.shard[s])) for s in segments)
        return
    record = store.video(video)
    if record.time_base not in (None, timeline.time_base):
        yield Finding(
            f"{path}: its clock ticks every {timeline.time_base} s, stored is {record.time_base} s"
        )
    chosen = store.sampling.select(timeline.pts, timeline.key, timeline.time_base)
    for s in segments:
        first, end = int(store.index.first[s]), int(store.index.end[s])
        here = chosen[(chosen >= first) & (chosen < (len(timeline) if end < 0 else end))]
        rows = np.arange(store.index.row[s], store.index.row[s] + store.index.rows[s])
        index, pts = store.read_table("index", rows), store.read_table("pts", rows)
        # A damaged frame has no row.
        in_file = np.isin(index, here)
        if not in_file.all() or not np.array_equal(timeline.pts[index], pts):
            yield Finding(
                f"{path}: other frames (index or pts) than are stored", int(store.index.shard[s])
            )
        elif len(index) < len(here) and s not in store.index.note:
            yield Finding(
                f"{path}: {len(here)} frames are sampled, {len(index)} are stored",
                int(store.index.shard[s]),
            )


def identify_again(
    store: TargetStore,
    writer: StoreWriter,
    videos: list[int],
    video_roots: Mapping[str, str] | None = None,
) -> None:
    """Write the identity of the files of `videos` again, if the teachers saw the same files."""
    paths = [store.video_path(video, video_roots) for video in videos]
    with DecodePool(processes=1, views=[View(resize=(16, 16))]) as pool:
        probes = dict(zip(videos, pool.probe(paths), strict=True))
    same = {
        v: probe
        for v, probe in probes.items()
        if probe.error is None and probe.digest == store.digest(v)
    }
    if same:
        writer.identify(list(same), video_columns(list(same.values()), store.sampling))
