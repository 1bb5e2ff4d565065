"""Load plans and commits of a store as arrays: which rows of which video exist, and each status.

Shapes: S segments, V videos.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
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
# Most losses of each kind that are reported.
MAX_LOSSES = 100
STATUS = {PENDING: "pending", OK: "ok", FAILED: "failed"}


@dataclass
class TeacherCommits:
    """Committed shards of one teacher, and the reasons of its failures by segment."""

    encoding: Encoding = DEFAULT
    output: Output = "logits"
    shards: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    commits: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class StoreIndex:
    """Tables of the planned segments [S] and the state of each.

    row: first row in the store. frames: frames of the file, −1 where a segment does not reach its
    end. hashes: commits of hashes of frames, by shard. unhashed: the reason for each segment of
    these shards that could not be hashed. faults: the fault, shard and teacher of damaged nodes and
    tables, if the store was loaded with `damaged`.
    """

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
    row: NDArray[np.int64]
    rows: NDArray[np.int64]
    frames: NDArray[np.int64]
    reason: dict[int, str]
    note: dict[int, str]
    overflow: dict[int, int]
    counted: set[int]
    frame_commits: dict[int, dict[str, Any]]
    teachers: dict[str, TeacherCommits]
    ranges: Ranges
    version: int = 1
    hashes: dict[int, dict[str, Any]] = field(default_factory=dict)
    unhashed: dict[int, str] = field(default_factory=dict)
    faults: list[tuple[str, int | None, str | None]] = field(default_factory=list)

    def file_record(self, path: str, shard: int) -> dict[str, Any] | None:
        """Return the size and digest that commits record for a shard file, None without a record.

        path: the path of the array.
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
        replaced = self.replaces[self.replaces >= 0]
        live[replaced] = False
        return live

    def order(self) -> NDArray[np.int64]:
        """Return the ids of live segments, sorted by video and first frame."""
        ids = np.flatnonzero(self.live)
        return ids[np.lexsort((self.first[ids], self.video[ids]))]

    def video_state(self) -> NDArray[np.int8]:
        """Return ok, failed or pending for each video [V]: the worst state of its live segments."""
        state = np.full(self.n_videos, OK, np.int8)
        ids = np.flatnonzero(self.live)
        has_segment = np.zeros(self.n_videos, bool)
        has_segment[self.video[ids]] = True
        state[~has_segment] = PENDING
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


class _NodeReader:
    """Read plans and commits of a store; with `damaged`, collect errors in `faults`."""

    def __init__(self, files: StoreFiles, *, damaged: bool) -> None:
        self.files, self.damaged = files, damaged
        self.faults: list[tuple[str, int | None, str | None]] = []

    @contextmanager
    def collect_faults(self, shard: int | None, teacher: str | None = None) -> Iterator[None]:
        """Append a StoreError of the block to `faults` if `damaged`, otherwise raise it."""
        try:
            yield
        except StoreError as error:
            if not self.damaged:
                raise
            self.faults.append((str(error), shard, teacher))

    def nodes(
        self, group: str, names: Iterable[str], teacher: str | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the existing nodes of a group by name."""
        node_faults: dict[str, str] | None = {} if self.damaged else None
        yield from fmt.read_nodes(self.files, group, names, faults=node_faults).items()
        for name, fault in (node_faults or {}).items():
            if group.startswith("commits/"):
                self.faults.append((fault, int(name), teacher))
            else:
                self.faults.append((fault, None, name))

    def plans(self) -> list[dict[str, Any]]:
        """Return the plans; StoreError if a store in a folder has lost a plan or a chunk."""
        plan_faults: dict[str, str] | None = {} if self.damaged else None
        plans = fmt.read_plans(self.files, faults=plan_faults)
        self.faults += [(fault, None, None) for fault in (plan_faults or {}).values()]
        if not isinstance(self.files, LocalFiles):
            return plans
        lost = list(islice(losses(self.files, plans), None if self.damaged else 1))
        if lost and not self.damaged:
            name = self.files.name
            raise StoreError(
                f"{name}: {lost[0]}; `distinit targets verify {name}` reports all damage"
            )
        self.faults += [(loss, None, None) for loss in lost]
        # Plans whose data is lost must not determine the sizes of arrays.
        return plans if len(lost) < MAX_LOSSES else []


def load_index(where: Path | StoreFiles, *, damaged: bool = False) -> StoreIndex:
    """Read plans and commits of a store.

    Args:
        where: The store.
        damaged: Whether the store may be damaged: `faults` of the index then lists the errors that
            otherwise are raised.

    Raises:
        StoreError: Plans and commits contradict the arrays, or a plan or a chunk of a store in a
            folder is lost (see `losses`).
    """
    files = store_files(where)
    attributes = fmt.check_root(files)
    reader = _NodeReader(files, damaged=damaged)
    plans = reader.plans()
    files.pin(attributes["store_id"], plans)
    n_videos, num_planned_shards = num_planned(plans, "videos"), num_planned(plans, "shards")
    corpora: list[dict[str, str]] = max((p.get("corpora", []) for p in plans), key=len, default=[])
    teachers: list[str] = max((p.get("teachers", []) for p in plans), key=len, default=[])
    ranges = ranges_of(plans)
    # Without the segment table no shard can be read.
    n_shards, table = 0, {spec.name: np.zeros(0, np.int64) for spec in fmt.segment_specs()}
    with reader.collect_faults(None):
        table = _segments(files, plans, n_videos, num_planned_shards, ranges)
        n_shards = num_planned_shards
    zeros = np.zeros(len(table["video"]), np.int64)
    index = StoreIndex(
        n_videos=n_videos, n_shards=n_shards, shard_rows=int(attributes.get("shard_rows") or 0),
        n_plans=len(plans), corpora=corpora, **table,
        state=np.zeros(len(zeros), np.int8), row=zeros.copy(), rows=zeros.copy(), frames=zeros - 1,
        reason={}, note={}, overflow={}, counted=set(), frame_commits={}, teachers={}, ranges=ranges,
        faults=reader.faults, version=attributes["version"], hashes={}, unhashed={},
    )  # fmt: skip
    shards = [f"{i:06d}" for i in range(n_shards)]
    root = f"{files.name}/"
    for shard, node in reader.nodes("commits/frames", shards):
        with reader.collect_faults(int(shard)):
            add_frame_commit(index, int(shard), node, root)
    hash_shards = shards if index.version >= 2 else []
    for shard, node in reader.nodes("commits/hashes", hash_shards, fmt.HASHES):
        with reader.collect_faults(int(shard), fmt.HASHES):
            add_hash_commit(index, int(shard), node, root)
    nodes = dict(reader.nodes("teachers", teachers))
    for name in teachers:
        if name not in nodes:
            if damaged:
                continue
            raise StoreError(
                f"{files.name}/teachers/{name}: a plan names this teacher, but it is missing"
            )
        node_path = f"{files.name}/teachers/{name}/zarr.json"
        index.teachers[name] = _teacher(node_path, nodes[name], attributes.get("requires", []))
        for shard, node in reader.nodes(f"commits/teachers/{name}", shards, name):
            with reader.collect_faults(int(shard), name):
                add_teacher_commit(index, name, int(shard), node, root)
    return index


def _teacher(where: str, node: Mapping[str, Any], requires: Sequence[str]) -> TeacherCommits:
    """Return a teacher without commits from the node of its group.

    Raises:
        StoreError: Output or encoding is unknown, or the store does not list it in `requires`.
    """
    output = check_output(node.get("output", "logits"), where)
    encoding = check_encoding(node.get("encoding"), where, output)
    required = set(fmt.requirements(output, encoding, node))
    if missing := required.difference(requires):
        raise StoreError(
            f"{where}: its output {output!r} in {encoding} requires {', '.join(sorted(missing))} among "
            f"the requirements of the store, got {requires}"
        )
    return TeacherCommits(encoding, output)


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
            # The usual cause is a lost chunk.
            raise StoreError(
                f"{files.name}/segments/{kind}: damaged, names a {kind} that is not planned"
            )
    return table


def losses(files: LocalFiles, plans: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the missing plans and table chunks of a store in a folder.

    A reader would not notice them: rows of a missing plan do not exist, and a missing chunk reads
    as the fill value, such as a video without a path. At most `MAX_LOSSES` of each kind are
    yielded.
    """
    folders = [p for p in (files.root / "plans").glob("*") if p.name.isascii() and p.name.isdigit()]
    numbers = sorted({int(p.name) for p in folders if (p / "zarr.json").exists()})
    last = max((int(p.name) for p in folders), default=-1)
    gaps = (range(a + 1, b) for a, b in pairwise([-1, *numbers, last + 1]))
    yield from (
        f"plans/{number:06d} is missing" for number in islice(chain.from_iterable(gaps), MAX_LOSSES)
    )
    for column, count in (
        ("videos/path", "videos"),
        ("videos/corpus", "videos"),
        ("segments/video", "segments"),
    ):
        # No row of these columns has the fill value, so every chunk must have a file.
        array = files.table(column)
        chunks = range(-(-num_planned(plans, count) // array.chunks[0]))
        keys = map(array.key, chunks)
        missing = (key for key in keys if not (files.root / column / key).exists())
        yield from (f"{column}/{key} is missing" for key in islice(missing, MAX_LOSSES))


def add_frame_commit(index: StoreIndex, shard: int, node: dict[str, Any], root: str = "") -> None:
    """Add a commit of frame tables to the index.

    Raises:
        StoreError: Its segments, rows or files do not belong to the shard.
    """
    where = f"{root}commits/frames/{shard:06d}/zarr.json"
    # For a million videos, lists would take 200 MB more than arrays.
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
        index, where, shard, list(chain.from_iterable((*texts.values(), node["counted"])))
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
    """Add a commit of hashes of frames; StoreError as in `add_frame_commit`."""
    where = f"{root}commits/hashes/{shard:06d}/zarr.json"
    node = _with_known_files(index, where, node, fmt.HASH_TABLES, shard, "frames")
    index.unhashed.update(_failed(index, where, shard, node))
    index.hashes[shard] = node


def add_teacher_commit(
    index: StoreIndex, name: str, shard: int, node: dict[str, Any], root: str = ""
) -> None:
    """Add a commit of a teacher's rows; StoreError as in `add_frame_commit`."""
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
    """Return the reasons of failed segments of a commit of rows or hashes, checked."""
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
    """Return a commit whose `files` are those of `arrays`; `other_files` has the others."""
    files, other_files = known_files(where, node["files"], arrays, shard, folder, index.version)
    return {**node, "files": files, "other_files": other_files}


def _check_planned(index: StoreIndex, where: str, shard: int, segments: ArrayLike) -> None:
    """Raise StoreError unless all segments are planned in the shard."""
    ids: NDArray[Any] = np.asarray(segments, np.int64)
    if len(ids) and (
        ids.min() < 0 or ids.max() >= len(index.video) or (index.shard[ids] != shard).any()
    ):
        raise StoreError(f"{where}: names segments that are not planned in this shard")
