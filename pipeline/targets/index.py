"""What a store's plans and commits say, as arrays: which rows of which video exist, and every status.

Shapes: S segments, V videos.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StoreError
from . import format as fmt
from .digests import Ranges, ranges_of, read_rows
from .encoding import DEFAULT, Encoding, check_encoding
from .files import LocalFiles, StoreFiles, open_table, store_files

PENDING, OK, FAILED, MOVED = 0, 1, 2, 3
STATUS = {PENDING: "pending", OK: "ok", FAILED: "failed"}


@dataclass
class TeacherCommits:
    """Shards of one teacher that exist, and its own failures by segment."""

    encoding: Encoding = DEFAULT
    shards: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    commits: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class StoreIndex:
    """Tables of the planned segments [S] and what became of each."""

    n_videos: int
    n_shards: int
    n_plans: int
    shard_rows: int
    corpora: list[dict[str, str]]
    video: NDArray[np.int64]
    shard: NDArray[np.int64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]
    bound: NDArray[np.int64]
    replaces: NDArray[np.int64]
    state: NDArray[np.int8]
    row: NDArray[np.int64]  # absolute first row
    rows: NDArray[np.int64]
    frames: NDArray[np.int64]  # frames in the file, −1 where a stretch did not reach its end
    reason: dict[int, str]
    note: dict[int, str]
    overflow: dict[int, int]
    counted: set[int]
    frame_commits: dict[int, dict[str, Any]]
    teachers: dict[str, TeacherCommits]
    ranges: Ranges

    def file_record(self, path: str, shard: int) -> dict[str, Any] | None:
        """Size and digest that commits give to the file of a shard of the array `path`; None if it has none."""
        _, name, *_ = path.split("/")
        commits = self.frame_commits if path.startswith("frames/") else self.teachers[name].commits
        files = commits[shard]["files"] if shard in commits else {}
        return next((record for file, record in files.items() if file.startswith(f"{path}/c/{shard}")), None)

    @property
    def live(self) -> NDArray[np.bool_]:
        """Segments that no later attempt replaces [S]."""
        live = np.ones(len(self.video), bool)
        old = self.replaces[self.replaces >= 0]
        live[old] = False
        return live

    def order(self) -> NDArray[np.int64]:
        """Live segments by video, then by first frame."""
        ids = np.flatnonzero(self.live)
        return ids[np.lexsort((self.first[ids], self.video[ids]))]

    def video_state(self) -> NDArray[np.int8]:
        """ok, failed or pending of each video's frames [V]: the worst of its live segments."""
        state = np.full(self.n_videos, OK, np.int8)
        ids = np.flatnonzero(self.live)
        has = np.zeros(self.n_videos, bool)
        has[self.video[ids]] = True
        state[~has] = PENDING
        state[self.video[ids[(self.state[ids] == PENDING) | (self.state[ids] == MOVED)]]] = PENDING
        state[self.video[ids[self.state[ids] == FAILED]]] = FAILED
        return state

    def teacher_state(self, name: str) -> NDArray[np.int8]:
        """ok, failed or pending of each video under one teacher [V]; failed frames fail every teacher."""
        state = self.video_state()
        teacher = self.teachers[name]
        ids = np.flatnonzero(self.live & (self.state == OK))
        there = np.isin(self.shard[ids], np.fromiter(teacher.shards, np.int64, len(teacher.shards)))
        missing = self.video[ids[~there]]
        state[missing[state[missing] == OK]] = PENDING
        for segment in teacher.failed:
            if self.live[segment]:
                state[self.video[segment]] = FAILED
        return state

    def video_reasons(self, teacher: str | None = None) -> dict[int, str]:
        """Why videos failed, by video."""
        live = self.live
        failed = dict(self.teachers[teacher].failed) if teacher else {}
        failed.update(self.reason)
        return {int(self.video[s]): text for s, text in sorted(failed.items()) if live[s]}


def load_index(where: Path | StoreFiles, *, damaged: bool = False) -> StoreIndex:
    """Read plans and commits of a store; StoreError where they contradict the arrays.

    StoreError also for a store in a folder of which `losses` tells, unless `damaged`: for those who look for damage.
    """
    files = store_files(where)
    attributes = fmt.check_root(files)
    plans = fmt.read_plans(files)
    if not damaged and isinstance(files, LocalFiles) and (lost := next(losses(files.root, plans), None)):
        raise StoreError(f"{files.name}: {lost}; `distinit targets verify {files.name}` says what else is damaged")
    files.pin(attributes["store_id"], plans)
    n_videos = max((p.get("videos", 0) for p in plans), default=0)
    n_segments = max((p.get("segments", 0) for p in plans), default=0)
    n_shards = max((p.get("shards", 0) for p in plans), default=0)
    corpora: list[dict[str, str]] = max((p.get("corpora", []) for p in plans), key=len, default=[])
    teachers: list[str] = max((p.get("teachers", []) for p in plans), key=len, default=[])
    ranges = ranges_of(plans)
    with ThreadPoolExecutor(2) as pool:  # One column is decoded while the digests of another are computed.
        columns = pool.map(lambda spec: read_rows(files, spec.path, 0, n_segments, ranges), fmt.segment_specs())
        names = [spec.path.split("/")[1] for spec in fmt.segment_specs()]
        table = {name: column.astype(np.int64, copy=False) for name, column in zip(names, columns, strict=True)}
    for kind, count in (("video", n_videos), ("shard", n_shards)):
        if ((table[kind] < 0) | (table[kind] >= count)).any():  # a chunk that is lost, above all
            raise StoreError(f"{files.name}/segments/{kind}: damaged, names a {kind} that is not planned")
    zeros = np.zeros(n_segments, np.int64)
    index = StoreIndex(
        n_videos=n_videos, n_shards=n_shards, shard_rows=int(attributes.get("shard_rows") or 0),
        n_plans=len(plans), corpora=corpora, **table,
        state=np.zeros(n_segments, np.int8), row=zeros.copy(), rows=zeros.copy(), frames=zeros - 1,
        reason={}, note={}, overflow={}, counted=set(), frame_commits={}, teachers={}, ranges=ranges,
    )  # fmt: skip
    shards = [f"{i:06d}" for i in range(n_shards)]
    for name, node in fmt.read_nodes(files, "commits/frames", shards).items():
        add_frame_commit(index, int(name), node)
    encodings = {
        name: check_encoding(node.get("encoding"), f"{files.name}/teachers/{name}")
        for name, node in fmt.read_nodes(files, "teachers", teachers).items()
    }
    for name in teachers:
        if name not in encodings:
            raise StoreError(f"{files.name}/teachers/{name}: a plan names this teacher, but it is missing")
        index.teachers[name] = TeacherCommits(encodings[name])
        for shard, node in fmt.read_nodes(files, f"commits/teachers/{name}", shards).items():
            add_teacher_commit(index, name, int(shard), node)
    return index


def losses(root: Path, plans: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a store in a folder has lost of its plans and of the video table. To a reader neither is an error: what a
    plan that is missing speaks of does not exist, and a chunk that is missing is fill, a video without a name.
    """
    numbers = [int(p.name) for p in (root / "plans").glob("*") if p.name.isdigit()]
    for number in range(max(numbers, default=-1) + 1):
        if not (root / f"plans/{number:06d}/zarr.json").exists():
            yield f"plans/{number:06d} is missing"
    n_videos = max((p.get("videos", 0) for p in plans), default=0)
    for column in ("videos/path", "videos/corpus"):  # no video has fill here
        array = open_table(root / column)
        for chunk in range(-(-n_videos // array.chunks[0])):
            key = array.metadata.encode_chunk_key((chunk,))
            if not (root / column / key).exists():
                yield f"{column}/{key} is missing"


def add_frame_commit(index: StoreIndex, shard: int, node: dict[str, Any]) -> None:
    """Enter one commit of frame tables; StoreError if it speaks of segments that are not planned there."""
    # As arrays: of a million videos the lists would take 200 MB.
    node = {**node, **{key: np.asarray(node[key], np.int64) for key in ("segment", "first_row", "rows", "frames")}}
    ids = node["segment"]
    if len(ids) and (ids.min() < 0 or ids.max() >= len(index.video) or (index.shard[ids] != shard).any()):
        raise StoreError(f"commits/frames/{shard:06d}: speaks of segments that are not planned in this shard")
    index.row[ids] = node["first_row"] + shard * index.shard_rows
    index.rows[ids] = node["rows"]
    index.frames[ids] = node["frames"]
    index.state[ids] = OK
    for target, key in ((index.reason, "failed"), (index.note, "notes"), (index.overflow, "overflow")):
        target.update({int(s): v for s, v in node[key].items()})
    for key, state in (("failed", FAILED), ("overflow", MOVED)):
        if node[key]:
            index.state[[int(s) for s in node[key]]] = state
    index.counted.update(node["counted"])
    index.frame_commits[shard] = node


def add_teacher_commit(index: StoreIndex, name: str, shard: int, node: dict[str, Any]) -> None:
    """Enter one commit of a teacher's rows."""
    teacher = index.teachers[name]
    teacher.shards.add(shard)
    teacher.failed.update({int(s): reason for s, reason in node["failed"].items()})
    teacher.commits[shard] = node
