"""Read a target store: its videos, their cached frames, and the outputs of teachers.

Only committed rows are read. Reading never writes to the store. A store object can be passed to
loader workers: it is picklable, and forked or spawned processes open their own files.

Shapes: V videos, N cached frames of a video, n rows, K classes of a teacher.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..common.errors import StoreError, UsageError
from ..corpus.sources import unescape_path
from ..video.sampling import Sampling
from . import layout as fmt
from .digests import read_rows, split_ranges
from .encoding import (
    Codec,
    Sums,
    arrays_of,
    mean_and_scale,
    total_error,
    value_type,
)
from .index import OK, PENDING, STATUS, StoreIndex, load_index
from .shards import ShardedRows
from .storage import LocalFiles, StoreFiles, store_files
from .store_options import Encoding, Output, pca_components


@dataclass(frozen=True)
class TeacherRecord:
    """A teacher in a store and the identity under which it was extracted.

    classes: class names [K], empty for features. codec: encoding and width of its rows. mirror_of:
    the teacher whose frames it holds mirrored, None if its frames are not mirrored. grid: cells per
    side of the feature map, 0 where it was pooled as a whole. plain_mean: whether the mean of all
    cells equals the feature of the whole frame.
    """

    name: str
    classes: tuple[str, ...]
    identity: dict[str, Any]
    run: dict[str, Any]
    codec: Codec
    mirror_of: str | None = None
    grid: int = 0
    plain_mean: bool = False

    @property
    def output(self) -> Output:
        """Kind of output in its rows."""
        return self.codec.output

    @property
    def encoding(self) -> Encoding:
        """Encoding of its rows."""
        return self.codec.encoding

    @property
    def width(self) -> int:
        """Number of classes or features; with a grid, of one cell."""
        return self.codec.width // max(self.grid, 1) ** 2

    @property
    def view(self) -> str:
        """View of a frame that its rows hold, as `--views` names it."""
        grid = f"grid:{self.grid}" if self.grid else "center" if self.mirror_of is None else ""
        return ",".join(filter(None, (grid, "flip" if self.mirror_of is not None else "")))

    @property
    def basis_digests(self) -> dict[str, Any]:
        """Digests of the basis and mean of pca:D; empty for other encodings."""
        return dict(fmt.codec_attributes(self.codec).get("pca", {}))


@dataclass(frozen=True)
class VideoRecord:
    """One row of the video table and its status. Paths are relative to the corpus."""

    id: int
    corpus: str
    path: str
    size: int
    digest: str
    duration: float
    fps: float
    time_base: Fraction | None
    frames: int
    rows: int
    status: str
    reason: str | None
    note: str | None
    clock: str


class TargetStore:
    """A target store opened for reading; see `TargetStore.open`. `damaged`: see `load_index`."""

    def __init__(self, files: StoreFiles, *, damaged: bool = False) -> None:
        self.files = files
        self.attributes = fmt.check_root(files)
        self.index: StoreIndex = load_index(files, damaged=damaged)
        self.sampling = Sampling.model_validate(self.attributes["sampling"])
        self.teachers: dict[str, TeacherRecord] = {}
        for name, node in fmt.read_nodes(files, "teachers", self.index.teachers).items():
            try:
                codec, classes = read_teacher(files, name, node, self.index.teachers)
            except StoreError:
                # `verify` reports the fault.
                if damaged:
                    continue
                raise
            if (
                codec.output == "logits"
                and not damaged
                and (mismatch := classes_mismatch(classes, node["identity"]))
            ):
                raise StoreError(f"{files.name}/teachers/{name}/class: {mismatch}")
            grid = node.get("grid", {"cells": 0, "plain_mean": False})
            self.teachers[name] = TeacherRecord(
                name,
                classes,
                node["identity"],
                node["run"],
                codec,
                node.get("mirror_of"),
                grid["cells"],
                grid["plain_mean"],
            )
        self._columns: dict[str, NDArray[Any]] = {}
        self._rows: dict[str, ShardedRows] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        cache: str | os.PathLike[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> TargetStore:
        """Open the store in a folder, or at any URL that fsspec supports (`https://…`, `s3://…`).

        Args:
            path: The folder or URL.
            cache: Folder that caches data read from a URL (default: $DISTINIT_CACHE, else
                `distinit` in the user's cache folder).
            storage_options: Options of the fsspec file system of the URL.

        Raises:
            StoreError: The store is missing, unreadable or corrupt, was written by another program,
                or has a format version that is not supported.
        """
        return cls(store_files(path, cache=cache, storage_options=storage_options))

    @property
    def name(self) -> str:
        """The folder or URL of the store, for messages."""
        return self.files.name

    @property
    def path(self) -> Path:
        """The store's folder; StoreError for a remote store, which has none."""
        if not isinstance(self.files, LocalFiles):
            raise StoreError(f"{self.name}: this needs a store in a local folder, not behind a URL")
        return self.files.root

    def __repr__(self) -> str:
        teachers = ", ".join(f"{t.name}[{t.width}]" for t in self.teachers.values())
        return f"TargetStore({self.name!r}, {self.n_videos} videos, {self.n_rows} rows, teachers: {teachers})"

    # -- contents

    def identity(self) -> dict[str, Any]:
        """Return the identity of the store that a checkpoint records.

        It consists of the store's id, format version, sampling and the identities of its teachers.
        """
        return {
            "store_id": self.attributes["store_id"],
            "format_version": self.attributes["version"],
            "sampling": self.attributes["sampling"],
            "teachers": {t.name: t.identity for t in self.teachers.values()},
        }

    @property
    def n_videos(self) -> int:
        """Number of listed videos, of any status."""
        return self.index.n_videos

    @property
    def n_rows(self) -> int:
        """Number of cached frames."""
        return int(self.row_counts.sum())

    @property
    def corpora(self) -> dict[str, str]:
        """Corpus name → the folder from which it was extracted."""
        return {c["name"]: unescape_path(c["root"]) for c in self.index.corpora}

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        """Cached frames of each video [V]."""
        segments, _ = self._by_video
        weights = self.index.rows[segments]
        counts = np.bincount(self.index.video[segments], weights=weights, minlength=self.n_videos)
        return counts.astype(np.int64)

    @cached_property
    def frame_counts(self) -> NDArray[np.int64]:
        """Frames in each video's file [V], 0 where unknown."""
        segments, _ = self._by_video
        counts = np.zeros(self.n_videos, np.int64)
        np.maximum.at(counts, self.index.video[segments], self.index.frames[segments])
        return np.maximum(counts, 0)

    @cached_property
    def _by_video(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return live segments with rows, sorted by video and first frame.

        Also return the position of each video's first segment, [V + 1].
        """
        order = self._live_by_video[0]
        order = order[self.index.state[order] == OK]
        return order, self._starts(order)

    @cached_property
    def _live_by_video(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return live segments of any state, sorted by video and first frame.

        Also return the position of each video's first segment, [V + 1].
        """
        order = self.index.order()
        return order, self._starts(order)

    def _starts(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.index.video[order], np.arange(self.n_videos + 1))

    @cached_property
    def video_state(self) -> NDArray[np.int8]:
        """Status of each video's frames [V]: codes of `store.index`."""
        return self.index.video_state()

    def teacher(self, name: str) -> TeacherRecord:
        """Return the teacher of this name; UsageError lists the store's teachers."""
        if name not in self.teachers:
            raise UsageError(
                f"teacher {name!r} is not in {self.name}; it has: {', '.join(self.teachers) or 'none'}"
            )
        return self.teachers[name]

    def mirror(self, teacher: str) -> str | None:
        """Return the name of the teacher that holds the mirrored frames of this one, if any."""
        return next((n for n, record in self.teachers.items() if record.mirror_of == teacher), None)

    def with_mirrors(self, teachers: Sequence[str]) -> tuple[str, ...]:
        """Return these teachers followed by those that hold their mirrored frames."""
        return (*teachers, *filter(None, map(self.mirror, teachers)))

    def target_names(self, names: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the teachers to learn from: those named, by default all.

        Teachers of mirrored frames are not among them: mirrored clips of the original teacher use
        their rows.

        Raises:
            UsageError: The store has no teacher of a name, or one of mirrored frames.
        """
        for name in names or ():
            if (original := self.teacher(name).mirror_of) is not None:
                raise UsageError(
                    f"teacher {name!r} of {self.name} holds mirrored frames, which mirrored clips of "
                    f"{original!r} use: name {original!r}"
                )
        return tuple(
            names or (name for name, record in self.teachers.items() if record.mirror_of is None)
        )

    def teachers_of(self, output: Output) -> list[str]:
        """Return the names of the teachers to learn from that have this output."""
        return [name for name in self.target_names() if self.teachers[name].output == output]

    def fingerprint(self, teacher: str) -> dict[str, Any] | None:
        """Return the fingerprint of a teacher (`teachers.fingerprint`), None if it has none."""
        return fmt.read_fingerprint(self.files, self.teacher(teacher).name)

    def usable(self, teachers: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Return the ids of videos with at least one row of every teacher in `teachers`.

        The default is all teachers; with an empty list, cached frames suffice. If the store has a
        teacher's mirrored frames, they are required as well.
        """
        is_usable = (self.video_state == OK) & (self.row_counts > 0)
        names = list(self.teachers) if teachers is None else list(teachers)
        for name in self.with_mirrors([self.teacher(name).name for name in names]):
            is_usable &= self.index.teacher_state(name) == OK
        return np.flatnonzero(is_usable)

    def pending(self, teachers: Sequence[str]) -> NDArray[np.bool_]:
        """Return whether each video [V] has no status yet, or none for one of the teachers."""
        states = [self.video_state, *map(self.index.teacher_state, teachers)]
        return np.any([state == PENDING for state in states], axis=0)

    def video(self, i: int) -> VideoRecord:
        """Return the record of video `i`."""
        if not 0 <= i < self.n_videos:
            raise IndexError(f"video {i} of {self.n_videos}")
        order, start = self._live_by_video
        live = sorted(order[start[i] : start[i + 1]].tolist())
        segments = self.segments(i).tolist()
        den = int(self.column("time_base_den")[i])
        state = int(self.video_state[i])
        corpus, path = self.place(i)
        return VideoRecord(
            id=i,
            corpus=corpus,
            path=path,
            size=int(self.column("size")[i]),
            digest=self.digest(i),
            duration=float(self.column("duration")[i]),
            fps=float(self.column("fps")[i]),
            time_base=Fraction(int(self.column("time_base_num")[i]), den) if den else None,
            frames=int(self.frame_counts[i]),
            rows=int(self.row_counts[i]),
            status=STATUS[state],
            reason=next((self.index.reason[s] for s in live if s in self.index.reason), None),
            note=next((self.index.note[s] for s in live if s in self.index.note), None),
            clock="counted" if any(s in self.index.counted for s in segments) else "pts",
        )

    def place(self, i: int) -> tuple[str, str]:
        """Return the corpus of video `i` and its path in the corpus."""
        corpus = self.index.corpora[int(self.column("corpus")[i])]["name"]
        return corpus, unescape_path(self._path_at(i))

    def digest(self, i: int) -> str:
        """Return the digest of the head and tail of video `i` (`video.container.digest`).

        It is empty if the video could not be read.
        """
        raw = bytes(np.asarray(self.column("digest")[i], np.uint8))
        return raw.hex() if any(raw) else ""

    def column(self, name: str) -> NDArray[Any]:
        """Return a numeric column of the video table [V], which is read once."""
        if name not in self._columns:
            values = read_rows(self.files, f"videos/{name}", 0, self.n_videos, self.index.ranges)
            if name == "corpus" and ((values < 0) | (values >= len(self.index.corpora))).any():
                raise StoreError(f"{self.name}/videos/corpus: names a corpus that no plan has")
            self._columns[name] = values
        return self._columns[name]

    @cached_property
    def _paths(self) -> tuple[bytes, NDArray[np.int64]]:
        """Return all paths in one buffer, and the end of each.

        10⁶ Python strings would take ten times the memory.
        """
        blocks: list[bytes] = []
        lengths: list[NDArray[np.int64]] = []
        for first, end in split_ranges(0, self.n_videos, fmt.VIDEO_CHUNK):
            texts = read_rows(self.files, "videos/path", first, end, self.index.ranges)
            paths = [str(text).encode() for text in texts.tolist()]
            blocks.append(b"".join(paths))
            lengths.append(np.fromiter(map(len, paths), np.int64, len(paths)))
        ends = np.cumsum(np.concatenate(lengths)) if lengths else np.empty(0, np.int64)
        return b"".join(blocks), ends

    def _path_at(self, i: int) -> str:
        buffer, ends = self._paths
        return buffer[int(ends[i - 1]) if i else 0 : int(ends[i])].decode()

    def video_path(self, i: int, video_roots: Mapping[str, str] | None = None) -> str:
        """Return the path of video `i` in the folder of its corpus.

        video_roots: current folders by corpus.
        """
        corpus = self.index.corpora[int(self.column("corpus")[i])]
        root = (video_roots or {}).get(corpus["name"], unescape_path(corpus["root"]))
        return os.path.join(root, unescape_path(self._path_at(i)))

    # -- rows

    def segments(self, video: int) -> NDArray[np.int64]:
        """Return the ids of the segments with rows of a video, in order of their frames."""
        segments, start = self._by_video
        return segments[start[video] : start[video + 1]]

    def frames(self, video: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return a video's cached frames, ascending: index [N], pts [N], row in the store [N]."""
        segments = self.segments(video)
        ranges = list(
            zip(self.index.row[segments].tolist(), self.index.rows[segments].tolist(), strict=True)
        )
        owner, index, pts = (
            _joined([self._table(name).read_range(first, count) for first, count in ranges])
            for name in ("video", "index", "pts")
        )
        if (owner != video).any():
            raise StoreError(
                f"{self.name}: rows of video {video} belong to another; see `distinit targets verify`"
            )
        return (
            index,
            pts,
            _joined([np.arange(first, first + count, dtype=np.int64) for first, count in ranges]),
        )

    def rows_of(self, videos: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows [N] of all cached frames of these videos, sorted by video and frame.

        They are the rows that `frames` returns, but no file is read, so this is fast for a whole
        store.
        """
        segments, start = self._by_video
        counts = start[videos + 1] - start[videos]
        return self.rows_of_segments(segments[runs(start[videos], counts)])

    def read_table(self, name: str, rows: ArrayLike) -> NDArray[np.int64]:
        """Return values [n] of the frame table `video`, `index` or `pts`."""
        return self._table(name).read(rows).astype(np.int64)

    def hashes(
        self, rows: ArrayLike
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float16]]:
        """Return the perceptual hashes P [n] and R [n] of rows, and R's root mean square [n].

        Only the rows of `hashed_rows` have hashes.
        """
        p, r, rms = (self._table(name).read(rows) for name in fmt.HASH_TABLES)
        return p, r, rms

    def hashed_rows(self) -> NDArray[np.int64]:
        """Return the rows whose frames have perceptual hashes, ascending."""
        return self._rows_in(set(self.index.hashes), self.index.unhashed)

    def outputs(self, teacher: str, rows: ArrayLike) -> NDArray[np.float32]:
        """Return a teacher's logits or features, [n, K] float32, from any encoding.

        For a teacher with cells, it is their mean.
        """
        record = self.teacher(teacher)
        return self.cells(teacher, rows).mean((1, 2)) if record.grid else self.values(teacher, rows)

    def values(self, teacher: str, rows: ArrayLike) -> NDArray[np.float32]:
        """Return decoded rows of a teacher, [n, K] float32; with a grid, [n, G · G · K]."""
        codec = self.teacher(teacher).codec
        return codec.read(lambda name: self.read_stored(teacher, name, rows))

    def cells(self, teacher: str, rows: ArrayLike) -> NDArray[np.float32]:
        """Return the G × G cells of rows, [n, G, G, K] float32, for a teacher with cells."""
        record = self.teacher(teacher)
        return self.values(teacher, rows).reshape(-1, record.grid, record.grid, record.width)

    def logits(self, teacher: str, rows: ArrayLike) -> NDArray[np.float32]:
        """Return the logits of rows, [n, K] float32; UsageError for a teacher with features."""
        self._require_logits(teacher, "logits")
        return self.outputs(teacher, rows)

    def entropy(self, teacher: str, rows: ArrayLike) -> NDArray[np.float32]:
        """Return the entropies of rows in nats at τ = 1, [n] float32.

        They were computed from the teacher's float32 logits.

        Raises:
            UsageError: The teacher has features.
        """
        self._require_logits(teacher, "entropies")
        return self.read_stored(teacher, "entropy", rows).astype(np.float32)

    def _require_logits(self, teacher: str, what: str) -> None:
        if self.teacher(teacher).output != "logits":
            logits = self.teachers_of("logits")
            raise UsageError(
                f"teacher {teacher!r} of {self.name} has features, no {what}; teachers with "
                f"logits: {', '.join(logits) or 'none'}"
            )

    def statistics(self, teacher: str) -> tuple[NDArray[np.float32], float]:
        """Return the mean [K] of a teacher's stored rows, and one scale for all dimensions.

        The scale is the square root of the mean of (x − mean)² over rows and dimensions, as in
        PHI-S; each cell counts as a row. They are computed from the sums that were stored with the
        shards. For a shard without sums, and for logits, all rows are read.
        """
        record = self.teacher(teacher)
        shards = sorted(self.index.teachers[teacher].shards)
        sums = [s.of_cells(record.grid**2) for s in self.sums(teacher, shards)]
        return mean_and_scale(sums, record.width)

    def sums(self, teacher: str, shards: Sequence[int]) -> Iterator[Sums]:
        """Yield the sums over a teacher's rows in each of these shards.

        Raises:
            StoreError: The stored sums of a shard have another number of rows or values.
        """
        record, commits = self.teacher(teacher), self.index.teachers[teacher].commits
        group, names = f"teachers/{teacher}/{fmt.STATISTICS}", [f"{s:06d}" for s in shards]
        nodes = fmt.read_nodes(self.files, group, names) if record.output == "features" else {}
        rows = self.committed_rows(teacher) if len(nodes) < len(names) else None
        for shard, name in zip(shards, names, strict=True):
            node = nodes.get(name)
            if node is None and rows is not None:
                base = shard * self.index.shard_rows
                first, end = np.searchsorted(rows, (base, base + self.index.shard_rows)).tolist()
                arrays = arrays_of(record.encoding, record.output)
                yield Sums.of(
                    record.codec, {a: self.read_stored(teacher, a, rows[first:end]) for a in arrays}
                )
            elif node is not None:
                width = record.codec.width
                if node["rows"] != commits[shard]["rows"] or len(node["sum"]) != width:
                    raise StoreError(
                        f"{self.name}/{group}/{name}: has the sums of {node['rows']} rows of "
                        f"{len(node['sum'])} values, expected {commits[shard]['rows']} of {width}"
                    )
                yield Sums(node["rows"], np.array(node["sum"], np.float64), node["square"])

    def read_stored(self, teacher: str, name: str, rows: ArrayLike) -> NDArray[Any]:
        """Return rows of a teacher's array as stored (`encoding.arrays_of`, `entropy`)."""
        return self._array(f"teachers/{self.teacher(teacher).name}/{name}").read(rows)

    def encoding_error(self, teacher: str) -> dict[str, Any]:
        """Return the error of the stored rows compared with the teacher's outputs.

        It is the mean, and an upper bound of the 99th percentile, of the KL divergence of the
        softmax in nats for logits, and of 1 − cosine for features.
        """
        record = self.teacher(teacher)
        commits = self.index.teachers[record.name].commits.values()
        return total_error([(c["rows"], c["error"]) for c in commits], record.output)

    def committed_rows(self, teacher: str) -> NDArray[np.int64]:
        """Return all rows of a teacher, ascending."""
        commits = self.index.teachers[self.teacher(teacher).name]
        return self._rows_in(commits.shards, commits.failed)

    def _rows_in(self, shards: Collection[int], failed: Collection[int]) -> NDArray[np.int64]:
        """Return the rows in these shards, ascending, without those of failed segments."""
        segments, _ = self._by_video
        in_shards = np.isin(self.index.shard[segments], list(shards))
        ok = in_shards & ~np.isin(segments, list(failed))
        return np.sort(self.rows_of_segments(segments[ok]))

    def rows_of_segments(self, segments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows [N] of segments with rows, one segment after the other."""
        return runs(self.index.row[segments], self.index.rows[segments])

    def _table(self, name: str) -> ShardedRows:
        return self._array(f"frames/{name}")

    def _array(self, path: str) -> ShardedRows:
        if path not in self._rows:
            rows = self.files.rows(path, self.index.file_record)
            self._check_rows(path, rows)
            self._rows[path] = rows
        return self._rows[path]

    def _check_rows(self, path: str, rows: ShardedRows) -> None:
        """Raise StoreError if an array contradicts the shard size, its encoding or its classes."""
        where = f"{self.name}/{path}/zarr.json"
        if rows.shard_rows != self.index.shard_rows:
            raise StoreError(
                f"{where}: has {rows.shard_rows} rows per shard, the store {self.index.shard_rows}"
            )
        if path.endswith(("/logits", "/features")):
            check_values(where, self.teachers[path.split("/")[1]].codec, rows)


def check_values(where: str, codec: Codec, rows: ShardedRows) -> None:
    """Raise StoreError if the array of a teacher's values contradicts how its node stores them."""
    width = pca_components(codec.encoding) or codec.width
    if rows.dtype.name != value_type(codec.encoding) or rows.shape[1] != width:
        raise StoreError(
            f"{where}: has rows of {rows.shape[1]} values in {rows.dtype.name}, the teacher has "
            f"rows of {width} in {codec.encoding}"
        )


def read_teacher(
    files: StoreFiles, name: str, node: Mapping[str, Any], teachers: Container[str]
) -> tuple[Codec, tuple[str, ...]]:
    """Return a teacher's codec and the names of its classes [K], which are empty for features.

    Args:
        files: The store.
        name: The teacher's name.
        node: The node of its group.
        teachers: Names of all teachers of the store.

    Raises:
        StoreError: The codec or the view of its rows is not valid.
    """
    codec = fmt.read_codec(files, name, node)
    fmt.check_view(f"{files.name}/teachers/{name}/zarr.json", name, node, teachers)
    if codec.output != "logits":
        return codec, ()
    path = f"teachers/{name}/class"
    names = read_rows(files, path, 0, files.table(path).shape[0], {})
    return codec, tuple(map(str, names))


def classes_mismatch(classes: Sequence[str], identity: Mapping[str, Any]) -> str | None:
    """Describe how class names contradict a teacher's identity, None if they agree."""
    expected = identity.get("classes_sha256")
    if expected is None or hashlib.sha256("\n".join(classes).encode()).hexdigest() == expected:
        return None
    return "the class names differ from those of the teacher's identity (classes_sha256)"


def runs(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenated runs `first[i]` … `first[i] + count[i] - 1` for all i."""
    return np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))


def _joined(parts: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Concatenate arrays of integers, of which there may be none."""
    if len(parts) == 1:
        return parts[0].astype(np.int64, copy=False)
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def check_video_roots(store: TargetStore, video_roots: Mapping[str, str]) -> None:
    """Raise UsageError if `--videos` names a corpus or folder that does not exist."""
    for name, folder in video_roots.items():
        if name not in store.corpora:
            raise UsageError(
                f"--videos {name}=…: the store has the corpora {', '.join(store.corpora)}"
            )
        if not os.path.isdir(folder):
            raise UsageError(f"--videos {name}={folder}: no such folder")
