"""Write a store: create it, plan rows, move finished shards into place and commit them.

Only one process writes a store at a time.
"""

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
"""Array path → (first row, end, digest) of the rows that a plan adds."""


class StoreWriter:
    """An open, locked store. Use as a context manager; the lock ends with the process.

    Args:
        path: Folder of the store, which is created if it does not exist.
        sampling: How frames are sampled.
        shard_rows: Rows per shard; None leaves the choice to the first plan.
        origin: Attributes that identify the store's videos (`part`, `merged_from`,
            `exported_from`).
        damaged: See `load_index`; nothing is added to such a store.

    Raises:
        UsageError: `path` is a URL.
        StoreError: The store was written by another program, is corrupt or is being written by
            another process.
        StoreMismatchError: The store has another sampling, shard size or origin.
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
            # Remove the files of a killed run.
            shutil.rmtree(staging, ignore_errors=True)
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
                f"{error}; `{repair}` drops damaged commits and logs the command that fills them again"
            ) from error

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        shutil.rmtree(self.root / fmt.STAGING, ignore_errors=True)
        interrupted = kind is not None and not issubclass(kind, Exception)
        for _ in range(3 if interrupted else 0):
            # A thread of zarr may still be writing, and create the folder again.
            time.sleep(0.1)
            shutil.rmtree(self.root / fmt.STAGING, ignore_errors=True)
        self._lock.close()

    @property
    def shard_rows(self) -> int:
        """Rows per shard; 0 until the first segments are planned."""
        return int(self.attributes["shard_rows"] or 0)

    # -- planning

    def add_videos(
        self, columns: Mapping[str, Sequence[Any] | NDArray[Any]], corpora: list[dict[str, str]]
    ) -> None:
        """Append rows to the video table, then write the plan.

        columns: values by name of `layout.video_specs`.
        """
        start = self.index.n_videos
        stop = start + len(columns["path"])
        tables = self._append(fmt.video_specs(), columns, start, stop)
        self.index.n_videos, self.index.corpora = stop, corpora
        self._plan_node("videos", tables)

    def identify(self, videos: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> None:
        """Replace the identity of the files of `videos`, which have no cached frames.

        The plan with the new digests is written first. If the process is killed before it writes
        the rows, they keep their old values and digests, and the next attempt writes them.
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
                in_range = (ids >= start) & (ids < stop)
                if not in_range.any():
                    continue
                values = read_rows(LocalFiles(self.root), spec.path, start, stop, self.index.ranges)
                values[ids[in_range] - start] = new[in_range]
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
        """Assign ranges to shards and append them to the segment table, in one plan."""
        ranges = list(ranges)
        if not ranges:
            return []
        self.set_shard_rows_for(sum(frames.bound for frames in ranges))
        segments = assign(
            ranges,
            first_id=len(self.index.video),
            first_shard=self.index.n_shards,
            shard_rows=self.shard_rows,
        )
        columns = {
            name: [getattr(frames, name) for frames in ranges]
            for name in ("video", "first", "end", "bound", "replaces")
        }
        shards = [segment.shard for segment in segments]
        self.add_placed({**columns, "shard": shards}, shards[-1] + 1)
        return segments

    def add_placed(self, columns: Mapping[str, Sequence[Any] | NDArray[Any]], shards: int) -> None:
        """Append segments with assigned shards; `columns`: by name of `layout.segment_specs`."""
        start = len(self.index.video)
        stop = start + len(columns["video"])
        tables = self._append(fmt.segment_specs(), columns, start, stop)
        self._plan_node("segments", tables, segments=stop, shards=shards)
        self.index = load_index(self.root)
        self._grow()

    def set_shard_rows_for(self, rows: int) -> int:
        """Choose the shard size for about `rows` rows unless it is set, and return it."""
        if not self.shard_rows:
            self._set_root(shard_rows=auto_shard_rows(rows))
        return self.shard_rows

    def numerics(self) -> dict[str, dict[str, Any]]:
        """Return the numerics of the first rows of each teacher."""
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
        """Check that a teacher agrees with the one of its name in the store, if there is one.

        Args:
            name: The teacher's name in the store.
            attributes: `identity` of the teacher, and `run`: the numerics (batch size, precision,
                torch, device kind), which must match for bit-equal rows.
            encoding: Encoding of its rows; None means that of the store, or the default for a new
                teacher.
            output: Kind of output in its rows.
            width: Number of features; ignored for logits.
            allow_different_numerics: Whether another `run` may continue the store; every commit
                records its own.

        Raises:
            StoreMismatchError: The store has a different teacher of this name.
        """
        if name not in self.index.teachers:
            return
        stored = fmt.read_nodes(LocalFiles(self.root), "teachers", [name])[name]
        for key in ("identity",) if allow_different_numerics else ("identity", "run"):
            old, new = stored[key], attributes[key]
            if key == "run":
                old, new = ({"engine": "torch", **run} for run in (old, new))
            same_attributes(f"{self.root}: teacher {name!r}", key, old, new)
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
        """Add a teacher; if the store has one of this name, only check it with `check_teacher`.

        Args:
            name: The teacher's name in the store.
            classes: Names of its classes; empty for features.
            attributes: As in `check_teacher`.
            encoding: As in `check_teacher`.
            output: Kind of output in its rows.
            width: Number of features; for logits it is the number of classes.
            codec: Replaces encoding, output and width; required for pca:D, whose basis it has.
            allow_different_numerics: As in `check_teacher`.
            fingerprint: Content of the teacher's node `fingerprint`.
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
            raise StoreError(f"{self.root}: {name!r} is not a valid name of a teacher")
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
        # A run that was killed before it wrote the plan may have left this node.
        shutil.rmtree(node, ignore_errors=True)
        os.rename(staged, node)
        fsync_path(node.parent)
        self._plan_node("teachers", {}, teachers=[*self.index.teachers, name])
        self.index = load_index(self.root)

    def _require(self, names: Sequence[str]) -> None:
        """List required abilities of readers in the root, before any node that requires them.

        A store of version 1 becomes one of version 2. Only its root is replaced, so that version
        0.1 refuses it with a clear message. Nothing changes if the names are already listed.
        """
        listed = self.attributes.get("requires", [])
        if missing := [name for name in names if name not in listed]:
            self._set_root(version=fmt.VERSION, requires=[*listed, *missing])
            self.index.version = fmt.VERSION
            self._grow()

    def upgrade(self) -> None:
        """Convert a store of version 1 to version 2, which can hold hashes of frames."""
        if self.index.version < fmt.VERSION:
            self._set_root(version=fmt.VERSION, requires=[])
            self.index.version = fmt.VERSION
            self._grow()

    def drop_hashes(self, shard: int) -> None:
        """Drop the commit of a shard's hashes with failed segments, so that it is made again."""
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
        """Add the fingerprint of a teacher as a separate node; nothing else changes."""
        fmt.write_node(self.root, f"teachers/{name}/{fmt.FINGERPRINT}", record)

    # -- committing

    def commit(
        self,
        result: ShardResult,
        run: Mapping[str, Any],
        engines: Mapping[str, str] | None = None,
    ) -> None:
        """Move a shard's files into place and write its commits: frames, hashes, each teacher.

        Existing commits are not changed, so that a superseded attempt has no effect. If the process
        is killed between two commits, the next run computes the missing teachers for the committed
        frames.

        Args:
            result: The shard.
            run: The numerics without the engine.
            engines: Engine by teacher; torch where none is named.
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
        """Write a node, and before it its group if that does not exist."""
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
        """Write rows [start, stop) of the tables and return their digests for the plan."""
        tables: Tables = {}
        for spec in specs:
            inside(self.root, spec.path, below=True)
            if start and (num_rows := LocalFiles(self.root).table(spec.path).shape[0]) < start:
                raise StoreError(
                    f"{self.root}/{spec.path}: has {num_rows} rows, {start} are planned"
                )
            fmt.resize_array(self.root, spec, stop)
            array = zarr.open_array(self.root / spec.path, mode="r+")
            # Rows that no plan names, from a run that was killed, are overwritten.
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
        """Resize every array over rows to the planned size.

        This is idempotent, so the next writer completes it after a kill between two resizes.
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
        # This raises an error that describes the existing folder or file.
        fmt.check_root(root)
    if shard_rows is not None and (shard_rows < fmt.TABLE_CHUNK or shard_rows % fmt.TABLE_CHUNK):
        raise StoreError(f"--shard-rows must be a multiple of {fmt.TABLE_CHUNK}, got {shard_rows}")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Remove unfinished stores of processes that were killed.
    for folder in root.parent.glob(f".{glob.escape(root.name)}.new-*"):
        process = folder.name.rpartition("-")[2]
        if process.isdigit() and not process_exists(int(process)) and fmt.is_started_store(folder):
            shutil.rmtree(folder, ignore_errors=True)
    # The name is unique, because after an error threads of zarr may write to the removed folder.
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
        # The path may be a link or a mount point, or another process may have created the store.
        except OSError as error:
            raise StoreError(
                f"--out {root}: a store cannot be created at this path ({error.strerror}); name a new folder"
            ) from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    fsync_path(root.parent)


def with_engine(
    run: Mapping[str, Any], engines: Mapping[str, str] | None, name: str
) -> dict[str, Any]:
    """Return the numerics of one teacher; they record no engine if it is torch."""
    engine = (engines or {}).get(name, "torch")
    return dict(run) if engine == "torch" else {**run, "engine": engine}


def same_attributes(
    where: str,
    what: str,
    expected: Any,
    actual: Any,
    expected_source: str = "in the store",
    actual_source: str = "in this command",
) -> None:
    """Raise StoreMismatchError naming the first key in which two JSON-able values differ.

    The message has the values of both sides and their sources.
    """
    expected, actual = (json.loads(json.dumps(value)) for value in (expected, actual))
    if expected == actual:
        return
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in [*expected, *actual]:
            if expected.get(key) != actual.get(key):
                same_attributes(
                    where,
                    f"{what}.{key}",
                    expected.get(key),
                    actual.get(key),
                    expected_source,
                    actual_source,
                )
    raise StoreMismatchError(
        f"{where}: {what} is {_short(expected)} {expected_source}, {_short(actual)} {actual_source}"
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
