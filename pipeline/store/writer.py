"""The one process that changes a store: it creates, plans, moves finished shards and commits."""

from __future__ import annotations

import glob
import json
import os
import shlex
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from ..common.errors import StoreError, StoreMismatchError
from ..common.files import fsync_path, sweep_store
from ..common.locks import locked
from ..common.processes import process_exists
from ..common.urls import check_local
from . import layout as fmt
from .digests import digest_rows, read_rows, split_ranges
from .encoding import DEFAULT, Codec, check_encoding
from .index import (
    StoreIndex,
    add_frame_commit,
    add_hash_commit,
    add_teacher_commit,
    load_index,
)
from .planning import FrameRange, Segment, assign, auto_shard_rows
from .staging import ShardResult, StagedFile
from .storage import LocalFiles, inside
from .store_options import Encoding, Output
from .validation import is_teacher_name

Tables = dict[str, list[tuple[int, int, str]]]
"""Array path → (first row, end, digest) of rows that a plan adds."""


class StoreWriter:
    """An open, locked store. Use as a context manager; the lock dies with the process.

    `origin` are attributes that name the videos that the store is made of (`part`, `merged_from`,
    `exported_from`). `damaged`: see `load_index`; nothing is added to such a store.

    Raises:
        UsageError: `path` is a URL.
        StoreError: It is of another program, corrupt or being written by another process.
        StoreMismatchError: The store was made with another sampling, shard size or origin.
    """

    def __init__(
        self,
        path: Path,
        *,
        sampling: Mapping[str, Any],
        shard_rows: int | None = None,
        origin: Mapping[str, Any] | None = None,
        damaged: bool = False,
    ) -> None:
        check_local(path)
        self.root = Path(os.path.abspath(path))
        if not (self.root / "zarr.json").exists():
            _create(self.root, sampling, shard_rows, origin or {})
        busy = StoreError(f"{self.root}: another process is writing this store")
        with ExitStack() as stack:
            stack.enter_context(locked(self.root, busy))
            self.attributes = fmt.check_root(self.root)
            if self.attributes["sampling"] != dict(sampling):
                raise StoreMismatchError(
                    f"{self.root}: its frames were sampled with {_short(self.attributes['sampling'])}, "
                    f"this command asks for {_short(sampling)}"
                )
            if shard_rows and self.attributes["shard_rows"] not in (None, shard_rows):
                raise StoreMismatchError(
                    f"{self.root}: its shards have {self.attributes['shard_rows']} rows, --shard-rows is {shard_rows}"
                )
            for key, value in (origin or {}).items():
                same_attributes(str(self.root), key, self.attributes.get(key), value)
            self.index: StoreIndex = self._load_index(damaged)
            staging = inside(self.root, fmt.STAGING)
            shutil.rmtree(staging, ignore_errors=True)  # what a killed run left behind
            sweep_store(self.root)
            zarr.open_group(staging, mode="w")
            if not damaged:
                self._grow()
            self._lock = stack.pop_all()

    def _load_index(self, damaged: bool) -> StoreIndex:
        try:
            return load_index(self.root, damaged=damaged)
        except StoreError as error:
            repair = f"distinit targets verify --repair {shlex.quote(str(self.root))}"
            raise StoreError(
                f"{error}; `{repair}` drops what is damaged and logs the command that fills it again"
            ) from error

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        shutil.rmtree(self.root / fmt.STAGING, ignore_errors=True)
        interrupted = kind is not None and not issubclass(kind, Exception)
        for _ in range(3 if interrupted else 0):
            # zarr's thread may finish what it writes, and make the folder again.
            time.sleep(0.1)
            shutil.rmtree(self.root / fmt.STAGING, ignore_errors=True)
        self._lock.close()

    @property
    def shard_rows(self) -> int:
        """Rows of a shard; 0 until the first segments are planned."""
        return int(self.attributes["shard_rows"] or 0)

    # -- planning

    def add_videos(
        self, columns: Mapping[str, Sequence[Any] | NDArray[Any]], corpora: list[dict[str, str]]
    ) -> None:
        """Append rows to the video table, then the plan.

        columns: values by name of `layout.video_specs`.
        """
        start = self.index.n_videos
        stop = start + len(columns["path"])
        tables = self._append(fmt.video_specs(), columns, start, stop)
        self.index.n_videos, self.index.corpora = stop, corpora
        self._plan_node("videos", tables)

    def identify(self, videos: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> None:
        """Replace the identity of the files of `videos`, of which no frame is stored.

        The plan with the new digests comes first. A kill before the rows are written leaves them as
        they were, under the former digests, and the next attempt writes them again.
        """
        ids = np.asarray(videos, np.int64)
        blocks: list[tuple[zarr.Array, int, NDArray[Any]]] = []
        tables: Tables = {}
        for spec in fmt.video_specs():
            if spec.name not in columns:
                continue
            folder = inside(self.root, spec.path, below=True)
            new, array = fmt.as_numpy(spec, columns[spec.name]), zarr.open_array(folder, mode="r+")
            ranges = self.index.ranges.get(spec.path, {})
            for start, stop in split_ranges(0, self.index.n_videos, spec.chunk):
                chosen = (ids >= start) & (ids < stop)
                if not chosen.any():
                    continue
                values = read_rows(LocalFiles(self.root), spec.path, start, stop, self.index.ranges)
                values[ids[chosen] - start] = new[chosen]
                blocks.append((array, start, values))
                tables[spec.path] = [
                    *tables.get(spec.path, []),
                    *((first, end, digest_rows(values[first - start : end - start]))
                      for first, end in ranges if start <= first and end <= stop),
                ]  # fmt: skip
        self._plan_node("identities", tables)
        for array, start, values in blocks:
            array[start : start + len(values)] = values
        _sync_tree(self.root / "videos")

    def add_segments(self, ranges: Iterable[FrameRange]) -> list[Segment]:
        """Give ranges their shards and append them to the segment table, in one act."""
        ranges = list(ranges)
        if not ranges:
            return []
        self.set_shard_rows_for(sum(frames.bound for frames in ranges))
        placed = assign(
            ranges,
            first_id=len(self.index.video),
            first_shard=self.index.n_shards,
            shard_rows=self.shard_rows,
        )
        columns = {
            name: [getattr(frames, name) for frames in ranges]
            for name in ("video", "first", "end", "bound", "replaces")
        }
        shards = [segment.shard for segment in placed]
        self.add_placed({**columns, "shard": shards}, shards[-1] + 1)
        return placed

    def add_placed(self, columns: Mapping[str, Sequence[Any] | NDArray[Any]], shards: int) -> None:
        """Append segments that have their shards: `columns` by name of `layout.segment_specs`."""
        start = len(self.index.video)
        stop = start + len(columns["video"])
        tables = self._append(fmt.segment_specs(), columns, start, stop)
        self._plan_node("segments", tables, segments=stop, shards=shards)
        self.index = load_index(self.root)
        self._grow()

    def set_shard_rows_for(self, rows: int) -> int:
        """Fix the shard size for about `rows` rows if it is still open; returns it."""
        if not self.shard_rows:
            self._set_root(shard_rows=auto_shard_rows(rows))
        return self.shard_rows

    def numerics(self) -> dict[str, dict[str, Any]]:
        """Return what the first rows of each teacher of the store were computed with."""
        nodes = fmt.read_nodes(LocalFiles(self.root), "teachers", list(self.index.teachers))
        return {name: node["run"] for name, node in nodes.items()}

    def check_teacher(
        self,
        name: str,
        attributes: Mapping[str, Any],
        *,
        encoding: Encoding | None = None,
        output: Output = "logits",
        width: int | None = None,
        allow_different_numerics: bool = False,
    ) -> None:
        """StoreMismatchError if the store has a teacher of this name that is another.

        `attributes` holds `identity` (what the teacher is) and `run` (batch size, precision, torch,
        device kind: what makes equal rows equal bits). `allow_different_numerics` lets another
        `run` continue the store; every commit records its own. `encoding` None is that of the
        store, of a new teacher the default. `width`: the number of features; of logits no matter.
        """
        if name not in self.index.teachers:
            return
        stored = fmt.read_nodes(LocalFiles(self.root), "teachers", [name])[name]
        for key in ("identity",) if allow_different_numerics else ("identity", "run"):
            there, here = stored[key], attributes[key]
            if key == "run":
                there, here = ({"engine": "torch", **run} for run in (there, here))
            same_attributes(f"{self.root}: teacher {name!r}", key, there, here)
        where = f"{self.root}: teacher {name!r}"
        same_attributes(where, "output", stored.get("output", "logits"), output)
        if output == "features":
            same_attributes(where, "width", stored.get("width"), width)
        if encoding is not None:
            same_attributes(where, "encoding", stored["encoding"], encoding)

    def add_teacher(
        self,
        name: str,
        classes: Sequence[str],
        attributes: Mapping[str, Any],
        *,
        encoding: Encoding | None = None,
        output: Output = "logits",
        width: int | None = None,
        codec: Codec | None = None,
        allow_different_numerics: bool = False,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a teacher, or check with `check_teacher` the one of this name and change nothing.

        Args:
            name: Of the teacher in the store.
            classes: The names of its classes; none of features.
            attributes: As in `check_teacher`.
            encoding: As in `check_teacher`.
            output: What its rows hold.
            width: The number of features; of logits it is that of the classes.
            codec: With the basis of pca:D; takes the place of encoding, output and width.
            allow_different_numerics: As in `check_teacher`.
            fingerprint: The content of the teacher's node of that name.
        """
        if codec is not None:
            encoding, output, width = codec.encoding, codec.output, codec.width
        self.check_teacher(
            name, attributes, encoding=encoding, output=output, width=width,
            allow_different_numerics=allow_different_numerics,
        )  # fmt: skip
        if name in self.index.teachers:
            return
        if not is_teacher_name(name):
            raise StoreError(f"{self.root}: {name!r} is no name of a teacher")
        node = inside(self.root, f"teachers/{name}")
        encoding = check_encoding(encoding or DEFAULT, f"{self.root}: teacher {name!r}", output)
        if codec is None:
            num_features = len(classes) if width is None else width
            codec = Codec(output, encoding, num_features)
        self._require(fmt.requirements(output, encoding, attributes))
        staged = self.root / fmt.STAGING / f"teacher-{uuid.uuid4().hex[:8]}"
        fmt.make_group(staged, {**attributes, **fmt.codec_attributes(codec)})
        if fingerprint is not None:
            fmt.make_group(staged / fmt.FINGERPRINT, fingerprint)
        rows = max(self.index.n_shards, 1) * self.shard_rows
        for spec in fmt.teacher_specs(name, codec.width, encoding, output):
            fmt.create_array(staged, replace(spec, path=spec.name), rows, self.shard_rows)
        fmt.create_tables(staged, codec, classes)
        _sync_tree(staged)
        if (self.root / "commits/teachers" / name).exists():
            raise StoreError(
                f"{self.root}: holds commits of teacher {name!r}, but no plan names it"
            )
        # Of a run that was killed before the plan that names it.
        shutil.rmtree(node, ignore_errors=True)
        os.rename(staged, node)
        fsync_path(node.parent)
        self._plan_node("teachers", {}, teachers=[*self.index.teachers, name])
        self.index = load_index(self.root)

    def _require(self, names: Sequence[str]) -> None:
        """List what a reader must know at the root, before anything that needs it exists.

        A store of version 1 becomes one of version 2: its root is replaced and nothing else, so
        that version 0.1 refuses it by name. Nothing changes where the names are listed already.
        """
        listed = self.attributes.get("requires", [])
        if missing := [name for name in names if name not in listed]:
            self._set_root(version=fmt.VERSION, requires=[*listed, *missing])
            self.index.version = fmt.VERSION
            self._grow()

    def upgrade(self) -> None:
        """Make a store of version 1 one of version 2, which also holds hashes of frames."""
        if self.index.version < fmt.VERSION:
            self._set_root(version=fmt.VERSION, requires=[])
            self.index.version = fmt.VERSION
            self._grow()

    def drop_hashes(self, shard: int) -> None:
        """Drop the commit of a shard's hashes, of which some failed, so that it is made again."""
        path = inside(self.root, f"commits/hashes/{shard:06d}")
        (path / "zarr.json").unlink(missing_ok=True)
        shutil.rmtree(path)
        fsync_path(path.parent)
        node = self.index.hashes.pop(shard)
        for segment in node["failed"]:
            del self.index.unhashed[int(segment)]

    def _set_root(self, **changes: Any) -> None:
        self.attributes = {**self.attributes, **changes}
        fmt.write_node(self.root, ".", self.attributes)

    def add_fingerprint(self, name: str, record: Mapping[str, Any]) -> None:
        """Give a teacher without a fingerprint one, in a separate node: nothing else changes."""
        fmt.write_node(self.root, f"teachers/{name}/{fmt.FINGERPRINT}", record)

    # -- committing

    def commit(
        self,
        result: ShardResult,
        run: Mapping[str, Any],
        engines: Mapping[str, str] | None = None,
    ) -> None:
        """Move a shard's files into place and make it exist: frames first, then each teacher.

        What is committed already is left alone, so that a superseded attempt changes nothing. A
        kill between two nodes leaves a shard whose missing teachers the next run computes over its
        frames.

        Args:
            result: The shard.
            run: The numerics, without the engine.
            engines: Teacher → the engine that ran it; default torch.
        """
        shard = result.shard
        frames = result.frames
        if frames is not None and shard not in self.index.frame_commits:
            self._publish(frames.files)
            node = {
                "shard": shard, "segment": frames.segment, "first_row": frames.first_row,
                "rows": frames.rows, "frames": frames.frames, "failed": _keys(frames.failed),
                "notes": _keys(frames.notes), "overflow": _keys(frames.overflow), "counted": frames.counted,
                "files": _files(frames.files), "run": dict(run), "time": _now(),
            }  # fmt: skip
            fmt.write_node(self.root, f"commits/frames/{shard:06d}", node)
            add_frame_commit(self.index, shard, node)
        if result.hashes is not None and shard not in self.index.hashes:
            self._publish(result.hashes.files)
            node = {
                "shard": shard, "rows": result.hashes.rows, "failed": _keys(result.hashes.failed),
                "files": _files(result.hashes.files), "time": _now(),
            }  # fmt: skip
            self._write_in_group("commits/hashes", f"{shard:06d}", node)
            add_hash_commit(self.index, shard, node)
        for name, part in result.teachers.items():
            if shard in self.index.teachers[name].shards:
                continue
            self._publish(part.files)
            if part.sums is not None:
                self._write_in_group(
                    f"teachers/{name}/{fmt.STATISTICS}", f"{shard:06d}", part.sums.record()
                )
            node = {
                "shard": shard, "teacher": name, "rows": part.rows, "failed": _keys(part.failed),
                "error": part.error, "files": _files(part.files),
                "run": with_engine(run, engines, name), "time": _now(),
            }  # fmt: skip
            self._write_in_group(f"commits/teachers/{name}", f"{shard:06d}", node)
            add_teacher_commit(self.index, name, shard, node)
        shutil.rmtree(result.staging, ignore_errors=True)

    # -- details

    def _write_in_group(self, group: str, name: str, node: Mapping[str, Any]) -> None:
        """Write a node, after its group where that does not exist yet."""
        if not (self.root / group).exists():
            fmt.write_node(self.root, group, {})
        fmt.write_node(self.root, f"{group}/{name}", node)

    def _publish(self, files: Iterable[StagedFile]) -> None:
        for file in files:
            final = inside(self.root, file.final)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file.staged, final)
            fsync_path(final.parent)

    def _append(
        self,
        specs: list[fmt.ArraySpec],
        columns: Mapping[str, Sequence[Any] | NDArray[Any]],
        start: int,
        stop: int,
    ) -> Tables:
        """Write rows [start, stop) of the tables; return their digests for the plan."""
        tables: Tables = {}
        for spec in specs:
            inside(self.root, spec.path, below=True)
            if start and (num_rows := LocalFiles(self.root).table(spec.path).shape[0]) < start:
                raise StoreError(
                    f"{self.root}/{spec.path}: has {num_rows} rows, {start} are planned"
                )
            fmt.resize_array(self.root, spec, stop)
            array = zarr.open_array(self.root / spec.path, mode="r+")
            # Rows that no plan node names may be left here by a run that was killed: written
            # over.
            values = fmt.as_numpy(spec, columns[spec.name])
            array[start:stop] = values
            _sync_tree(self.root / spec.path)
            tables[spec.path] = [
                (first, end, digest_rows(values[first - start : end - start]))
                for first, end in split_ranges(start, stop, spec.chunk)
            ]
        return tables

    def _plan_node(self, kind: str, tables: Tables, **extra: Any) -> None:
        node = {
            "kind": kind,
            "videos": self.index.n_videos,
            "corpora": self.index.corpora,
            "time": _now(),
        }
        fmt.write_node(
            self.root, f"plans/{self.index.n_plans:06d}", {**node, **extra, "tables": tables}
        )
        self.index.n_plans += 1
        for path, entries in tables.items():
            ranges = self.index.ranges.setdefault(path, {})
            for first, end, digest in entries:
                ranges.setdefault((first, end), set()).add(digest)

    def _grow(self) -> None:
        """Bring every row array to the planned size.

        It is idempotent, so a kill between two resizes is repaired.
        """
        rows = self.index.n_shards * self.shard_rows
        if not rows:
            return
        hashes = fmt.hash_specs() if self.index.version >= 2 else []
        for spec in (*fmt.frame_specs(), *hashes):
            if not (inside(self.root, spec.path) / "zarr.json").exists():
                fmt.create_array(self.root, spec, rows, self.shard_rows)
            fmt.resize_array(self.root, spec, rows)
        for name, teacher in self.index.teachers.items():
            for spec in fmt.teacher_specs(name, 1, teacher.encoding, teacher.output):
                fmt.resize_array(self.root, spec, rows)


def _create(
    root: Path, sampling: Mapping[str, Any], shard_rows: int | None, origin: Mapping[str, Any]
) -> None:
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        fmt.check_root(root)  # names what it is instead
    if shard_rows is not None and (shard_rows < fmt.TABLE_CHUNK or shard_rows % fmt.TABLE_CHUNK):
        raise StoreError(f"--shard-rows must be a multiple of {fmt.TABLE_CHUNK}, got {shard_rows}")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Of processes that were killed while they made one.
    for left in root.parent.glob(f".{glob.escape(root.name)}.new-*"):
        maker = left.name.rpartition("-")[2]
        if maker.isdigit() and not process_exists(int(maker)) and fmt.is_ours(left):
            shutil.rmtree(left, ignore_errors=True)
    # A name of its own: threads of zarr may write on where one has failed, after the folder was
    # removed.
    new = root.parent / f".{root.name}.new-{uuid.uuid4().hex[:8]}-{os.getpid()}"
    attributes: dict[str, Any] = {
        "format": fmt.FORMAT,
        "version": fmt.VERSION,
        "store_id": uuid.uuid4().hex,
        "created": _now(),
        "created_by": f"distinit {version('distinit')}",
        "sampling": dict(sampling),
        "shard_rows": shard_rows,
        "node_digests": True,
        "requires": [],
        **origin,
    }
    try:
        fmt.make_group(new, attributes)
        for group in fmt.GROUPS:
            fmt.make_group(new / group, {})
        for spec in fmt.video_specs() + fmt.segment_specs():
            fmt.create_array(new, spec, 0, 0)
        _sync_tree(new)
        try:
            os.rename(new, root)
        except OSError as error:  # a link, a mount point, or another process was first
            raise StoreError(
                f"--out {root}: a store cannot be made there ({error.strerror}); give a folder that does not exist yet"
            ) from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    fsync_path(root.parent)


def with_engine(
    run: Mapping[str, Any], engines: Mapping[str, str] | None, name: str
) -> dict[str, Any]:
    """Return the numerics of one teacher; the engine is torch where none is recorded."""
    engine = (engines or {}).get(name, "torch")
    return dict(run) if engine == "torch" else {**run, "engine": engine}


def same_attributes(
    where: str,
    what: str,
    stored: Any,
    given: Any,
    place: str = "in the store",
    other: str = "in this command",
) -> None:
    """Raise StoreMismatchError naming the first key in which two JSON-able values differ.

    The message has the values of both sides.
    """
    stored, given = (json.loads(json.dumps(value)) for value in (stored, given))
    if stored == given:
        return
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in [*stored, *given]:
            if stored.get(key) != given.get(key):
                same_attributes(
                    where, f"{what}.{key}", stored.get(key), given.get(key), place, other
                )
    raise StoreMismatchError(
        f"{where}: {what} is {_short(stored)} {place}, {_short(given)} {other}"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else text[:117] + "..."


def _keys(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(k): v for k, v in values.items()}


def _files(files: Iterable[StagedFile]) -> dict[str, dict[str, Any]]:
    return {f.final: {"size": f.size, "blake2b": f.blake2b} for f in files}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(Path(parent))
