"""Plans and commits of a store as arrays: which rows of which video exist, and every status.

Shapes: S segments, V videos.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..common.errors import StoreError
from . import layout as fmt
from .digests import Ranges, num_planned, ranges_of, read_rows
from .encoding import DEFAULT, ERROR_KEYS, check_encoding, check_output, row_arrays
from .storage import LocalFiles, StoreFiles, store_files
from .store_options import Encoding, Output
from .validation import SEGMENT_LISTS, known_files

PENDING, OK, FAILED, OVERFLOWED = 0, 1, 2, 3
MANY_LOST = 100
STATUS = {PENDING: "pending", OK: "ok", FAILED: "failed"}


@dataclass
class TeacherCommits:
    """Shards of one teacher that exist, and its own failures by segment."""

    encoding: Encoding = DEFAULT
    output: Output = "logits"
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
    frames: NDArray[np.int64]  # frames in the file, −1 where a segment does not reach its end
    reason: dict[int, str]
    note: dict[int, str]
    overflow: dict[int, int]
    counted: set[int]
    frame_commits: dict[int, dict[str, Any]]
    teachers: dict[str, TeacherCommits]
    ranges: Ranges
    version: int = 1
    hashes: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Commits of the hashes of frames, by shard."""
    unhashed: dict[int, str] = field(default_factory=dict)
    """Segments in such shards that could not be hashed, with the reason."""
    broken: list[tuple[str, int | None, str | None]] = field(default_factory=list)
    """Of a store opened as damaged: what is wrong with its nodes and tables, in which shard, of
    which teacher."""

    def file_record(self, path: str, shard: int) -> dict[str, Any] | None:
        """Return the size and digest that commits record for the file of a shard of `path`.

        None if they record none. path: that of an array.
        """
        _, name, *_ = path.split("/")
        if path.startswith("frames/"):
            commits = self.hashes if name in fmt.HASH_TABLES else self.frame_commits
        else:
            commits = self.teachers[name].commits
        files = commits[shard]["files"] if shard in commits else {}
        return next(
            (record for file, record in files.items() if file.startswith(f"{path}/c/{shard}")), None
        )

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
        state[self.video[ids[(self.state[ids] == PENDING) | (self.state[ids] == OVERFLOWED)]]] = (
            PENDING
        )
        state[self.video[ids[self.state[ids] == FAILED]]] = FAILED
        return state

    def teacher_state(self, name: str) -> NDArray[np.int8]:
        """Return ok, failed or pending for each video under one teacher [V].

        Failed frames fail every teacher.
        """
        state = self.video_state()
        teacher = self.teachers[name]
        ids = np.flatnonzero(self.live & (self.state == OK))
        committed = np.isin(
            self.shard[ids], np.fromiter(teacher.shards, np.int64, len(teacher.shards))
        )
        missing = self.video[ids[~committed]]
        state[missing[state[missing] == OK]] = PENDING
        for segment in teacher.failed:
            if self.live[segment]:
                state[self.video[segment]] = FAILED
        return state

    def video_reasons(self, teacher: str | None = None) -> dict[int, str]:
        """Return the reasons why videos failed, by video."""
        live = self.live
        failed = dict(self.teachers[teacher].failed) if teacher else {}
        failed.update(self.reason)
        return {int(self.video[s]): text for s, text in sorted(failed.items()) if live[s]}


def load_index(where: Path | StoreFiles, *, damaged: bool = False) -> StoreIndex:
    """Read plans and commits of a store; StoreError where they contradict the arrays.

    StoreError also for a store in a folder of which `losses` tells, unless `damaged`: for those who
    look for damage.
    """
    files = store_files(where)
    attributes = fmt.check_root(files)
    broken: list[tuple[str, int | None, str | None]] = []

    @contextmanager
    def noting(shard: int | None, teacher: str | None = None) -> Iterator[None]:
        """Enter a StoreError of the block in `broken`, if `damaged`."""
        try:
            yield
        except StoreError as error:
            if not damaged:
                raise
            broken.append((str(error), shard, teacher))

    def read(
        group: str, names: Iterable[str], teacher: str | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield nodes by name; a damaged one is an error, or an entry of `broken` if `damaged`."""
        wrong: dict[str, str] | None = {} if damaged else None
        yield from fmt.read_nodes(files, group, names, broken=wrong).items()
        for name, what in (wrong or {}).items():
            broken.append(
                (what, int(name), teacher) if group.startswith("commits/") else (what, None, name)
            )

    wrong: dict[str, str] | None = {} if damaged else None
    plans = fmt.read_plans(files, broken=wrong)
    broken += [(what, None, None) for what in (wrong or {}).values()]
    lost = (
        list(islice(losses(files, plans), 1 if not damaged else None))
        if isinstance(files, LocalFiles)
        else []
    )
    if lost and not damaged:
        raise StoreError(
            f"{files.name}: {lost[0]}; `distinit targets verify {files.name}` reports what else is damaged"
        )
    broken += [(what, None, None) for what in lost]
    if len(lost) >= MANY_LOST:  # no numbers of plans without data are made into arrays
        plans = []
    files.pin(attributes["store_id"], plans)
    n_videos, planned = num_planned(plans, "videos"), num_planned(plans, "shards")
    corpora: list[dict[str, str]] = max((p.get("corpora", []) for p in plans), key=len, default=[])
    teachers: list[str] = max((p.get("teachers", []) for p in plans), key=len, default=[])
    ranges = ranges_of(plans)
    # Without its segments nothing is known of any shard.
    n_shards, table = 0, {spec.name: np.zeros(0, np.int64) for spec in fmt.segment_specs()}
    with noting(None):
        n_shards, table = planned, _segments(files, plans, n_videos, planned, ranges)
    zeros = np.zeros(len(table["video"]), np.int64)
    index = StoreIndex(
        n_videos=n_videos, n_shards=n_shards, shard_rows=int(attributes.get("shard_rows") or 0),
        n_plans=len(plans), corpora=corpora, **table,
        state=np.zeros(len(zeros), np.int8), row=zeros.copy(), rows=zeros.copy(), frames=zeros - 1,
        reason={}, note={}, overflow={}, counted=set(), frame_commits={}, teachers={}, ranges=ranges, broken=broken,
        version=attributes["version"], hashes={}, unhashed={},
    )  # fmt: skip
    shards = [f"{i:06d}" for i in range(n_shards)]
    for name, node in read("commits/frames", shards):
        with noting(int(name)):
            add_frame_commit(index, int(name), node, f"{files.name}/")
    for name, node in read("commits/hashes", shards if index.version >= 2 else [], fmt.HASHES):
        with noting(int(name), fmt.HASHES):
            add_hash_commit(index, int(name), node, f"{files.name}/")
    nodes = dict(read("teachers", teachers))
    for name in teachers:
        if name not in nodes:
            if damaged:
                continue
            raise StoreError(
                f"{files.name}/teachers/{name}: a plan names this teacher, but it is missing"
            )
        place = f"{files.name}/teachers/{name}/zarr.json"
        output = check_output(nodes[name].get("output", "logits"), place)
        encoding = check_encoding(nodes[name].get("encoding"), place, output)
        needed = set(fmt.requirements(output, encoding, nodes[name]))
        if missing := needed.difference(attributes.get("requires", [])):
            raise StoreError(
                f"{place}: its output {output!r} in {encoding} needs {', '.join(sorted(missing))} among "
                f"the requirements of the store, got {attributes.get('requires')}"
            )
        index.teachers[name] = TeacherCommits(encoding, output)
        for shard, node in read(f"commits/teachers/{name}", shards, name):
            with noting(int(shard), name):
                add_teacher_commit(index, name, int(shard), node, f"{files.name}/")
    return index


def _segments(
    files: StoreFiles, plans: Sequence[dict[str, Any]], n_videos: int, n_shards: int, ranges: Ranges
) -> dict[str, NDArray[np.int64]]:
    """Return the segment table [S] as the plans record it."""
    n_segments = num_planned(plans, "segments")
    if n_shards > n_segments:
        raise StoreError(
            f"{files.name}/plans: record {n_shards} shards, but only {n_segments} segments"
        )
    table = {
        spec.name: read_rows(files, spec.path, 0, n_segments, ranges).astype(np.int64, copy=False)
        for spec in fmt.segment_specs()
    }
    for kind, count in (("video", n_videos), ("shard", n_shards), ("replaces", n_segments)):
        if ((table[kind] < (-1 if kind == "replaces" else 0)) | (table[kind] >= count)).any():
            # Mostly a chunk that is lost.
            raise StoreError(
                f"{files.name}/segments/{kind}: damaged, names a {kind} that is not planned"
            )
    return table


def losses(files: LocalFiles, plans: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what a store in a folder has lost of its plans and tables.

    To a reader neither is an error: rows of a missing plan do not exist, and a missing chunk is
    fill, a video without a name. At most `MANY_LOST` of each kind are yielded.
    """
    folders = [p for p in (files.root / "plans").glob("*") if p.name.isascii() and p.name.isdigit()]
    numbers = sorted({int(p.name) for p in folders if (p / "zarr.json").exists()})
    last = max((int(p.name) for p in folders), default=-1)
    gaps = (range(a + 1, b) for a, b in pairwise([-1, *numbers, last + 1]))
    yield from (
        f"plans/{number:06d} is missing" for number in islice(chain.from_iterable(gaps), MANY_LOST)
    )
    for column, count in (
        ("videos/path", "videos"),
        ("videos/corpus", "videos"),
        ("segments/video", "segments"),
    ):
        # No video and no segment has fill here.
        array = files.table(column)
        chunks = range(-(-num_planned(plans, count) // array.chunks[0]))
        keys = map(array.key, chunks)
        missing = (key for key in keys if not (files.root / column / key).exists())
        yield from (f"{column}/{key} is missing" for key in islice(missing, MANY_LOST))


def add_frame_commit(index: StoreIndex, shard: int, node: dict[str, Any], root: str = "") -> None:
    """Enter one commit of frame tables.

    Raises:
        StoreError: Its segments, rows or files are not those of the shard.
    """
    where = f"{root}commits/frames/{shard:06d}/zarr.json"
    # As arrays: of a million videos the lists would take 200 MB.
    node = {**node, **{key: np.asarray(node[key], np.int64) for key in SEGMENT_LISTS}}
    node = _with_known_files(index, where, node, fmt.FRAME_TABLES, shard, "frames")
    ids = node["segment"]
    _check_planned(index, where, shard, ids)
    if (
        max((node["first_row"] + node["rows"]).max(initial=0), node["rows"].sum())
        > index.shard_rows
    ):
        raise StoreError(f"{where}: its rows do not fit the {index.shard_rows} of a shard")
    texts = {
        key: {int(s): v for s, v in node[key].items()} for key in ("failed", "notes", "overflow")
    }
    _check_planned(
        index, where, shard, [s for of in (*texts.values(), node["counted"]) for s in of]
    )
    index.row[ids] = node["first_row"] + shard * index.shard_rows
    index.rows[ids] = node["rows"]
    index.frames[ids] = node["frames"]
    index.state[ids] = OK
    index.reason.update(texts["failed"])
    index.note.update(texts["notes"])
    index.overflow.update(texts["overflow"])
    index.state[[*texts["failed"]]] = FAILED
    index.state[[*texts["overflow"]]] = OVERFLOWED
    index.counted.update(node["counted"])
    index.frame_commits[shard] = node


def add_hash_commit(index: StoreIndex, shard: int, node: dict[str, Any], root: str = "") -> None:
    """Enter one commit of hashes of frames; StoreError as `add_frame_commit`."""
    where = f"{root}commits/hashes/{shard:06d}/zarr.json"
    node = _with_known_files(index, where, node, fmt.HASH_TABLES, shard, "frames")
    index.unhashed.update(_failed(index, where, shard, node))
    index.hashes[shard] = node


def add_teacher_commit(
    index: StoreIndex, name: str, shard: int, node: dict[str, Any], root: str = ""
) -> None:
    """Enter one commit of a teacher's rows; StoreError as `add_frame_commit`."""
    teacher = index.teachers[name]
    where = f"{root}commits/teachers/{name}/{shard:06d}/zarr.json"
    arrays = row_arrays(teacher.encoding, teacher.output)
    node = _with_known_files(index, where, node, arrays, shard, f"teachers/{name}")
    if set(ERROR_KEYS[teacher.output]) - node["error"].keys():
        raise StoreError(
            f"{where}: error: expected {' and '.join(ERROR_KEYS[teacher.output])} of "
            f"{teacher.output}, got {', '.join(node['error']) or 'nothing'}"
        )
    teacher.failed.update(_failed(index, where, shard, node))
    teacher.shards.add(shard)
    teacher.commits[shard] = node


def _failed(index: StoreIndex, where: str, shard: int, node: dict[str, Any]) -> dict[int, str]:
    """Return why segments of a commit of rows or hashes failed; StoreError as above."""
    if node["rows"] > index.shard_rows:
        raise StoreError(f"{where}: records {node['rows']} rows, its shard has {index.shard_rows}")
    failed = {int(s): reason for s, reason in node["failed"].items()}
    _check_planned(index, where, shard, list(failed))
    return failed


def _with_known_files(
    index: StoreIndex,
    where: str,
    node: dict[str, Any],
    arrays: Collection[str],
    shard: int,
    folder: str,
) -> dict[str, Any]:
    """Return a commit whose `files` are those that this version knows; the rest: `other_files`."""
    known, others = known_files(where, node["files"], arrays, shard, folder, index.version)
    return {**node, "files": known, "other_files": others}


def _check_planned(index: StoreIndex, where: str, shard: int, segments: ArrayLike) -> None:
    ids: NDArray[Any] = np.asarray(segments, np.int64)
    if len(ids) and (
        ids.min() < 0 or ids.max() >= len(index.video) or (index.shard[ids] != shard).any()
    ):
        raise StoreError(f"{where}: names segments that are not planned in this shard")
