"""Make a store of some videos and teachers of another.

Rows are packed into new shards, as they are stored or in another encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError
from . import layout as fmt
from .encoding import Codec, Sums, arrays_of, error_record, row_arrays, total_error
from .index import OK
from .planning import FrameRange, auto_shard_rows
from .reader import TargetStore, runs
from .staging import (
    FramesPart,
    HashPart,
    ShardResult,
    StagedFile,
    TeacherPart,
    new_staging,
    stage_array,
)
from .writer import StoreWriter

# Rows encoded at a time.
BLOCK = 1024


def write_subset(
    source: TargetStore,
    path: Path,
    videos: NDArray[np.int64],
    teachers: Sequence[str],
    *,
    shard_rows: int | None = None,
    codecs: Mapping[str, Codec] | None = None,
    advance: Callable[[int], Any] = lambda n: None,
) -> int:
    """Write videos and their rows to a new store.

    Failed videos are included with their reasons.

    Args:
        source: The store to copy from.
        path: Folder of the new store.
        videos: Ids of videos of `source`, of which none is pending.
        teachers: Names of the teachers to copy.
        shard_rows: Rows per shard; None chooses by the number of rows.
        codecs: New encodings by teacher; rows of other teachers are copied as stored.
        advance: Called with the number of rows after each shard.

    Returns:
        The number of rows.

    Raises:
        UsageError: A range of a video does not fit `shard_rows`.
        StoreError: Rows of the source cannot be read.
    """
    index = source.index
    order = index.order()
    starts = np.searchsorted(index.video[order], videos)
    stops = np.searchsorted(index.video[order], videos, side="right")
    old = np.concatenate(
        [order[a:b] for a, b in zip(starts, stops, strict=True)] or [np.empty(0, np.int64)]
    )
    new_videos = np.repeat(np.arange(len(videos)), stops - starts)
    bounds = np.where(index.state[old] == OK, index.rows[old], 0)
    ranges = [
        FrameRange(int(v), int(index.first[s]), int(index.end[s]), int(n))
        for v, s, n in zip(new_videos, old, bounds, strict=True)
    ]
    with StoreWriter(
        path,
        sampling=source.attributes["sampling"],
        shard_rows=_shard_rows(source, bounds, shard_rows),
        origin={"exported_from": source.attributes["store_id"]},
    ) as writer:
        _list_videos(source, writer, videos)
        segments = writer.add_segments(ranges)
        nodes = fmt.read_nodes(source.files, "teachers", teachers)
        new_codecs = {name: source.teacher(name).codec for name in teachers} | dict(codecs or {})
        for name in teachers:
            record = source.teacher(name)
            writer.add_teacher(
                name,
                record.classes,
                nodes[name],
                codec=new_codecs[name],
                fingerprint=source.fingerprint(name),
            )
        pairs = zip(segments, old.tolist(), strict=True)
        for shard, group in groupby(pairs, key=lambda pair: pair[0].shard):
            members = list(group)
            copy = ShardCopy(
                source, writer, shard, [new.id for new, _ in members], [s for _, s in members]
            )
            copy.frames(np.array([new.frames.video for new, _ in members]))
            copy.hashes()
            for name in teachers:
                copy.teacher(name, new_codecs[name])
            advance(len(copy.rows))
    return int(bounds.sum())


class ShardCopy:
    """Copy of one shard: segments `old` of `source` become segments `new` of the written store."""

    def __init__(
        self, source: TargetStore, writer: StoreWriter, shard: int, new: list[int], old: list[int]
    ) -> None:
        self.source, self.writer, self.shard, self.new, self.old = source, writer, shard, new, old
        index = source.index
        self.counts = np.where(index.state[old] == OK, index.rows[old], 0)
        self.rows = runs(index.row[old], self.counts)

    def frames(self, video: NDArray[np.int64]) -> None:
        """Stage and commit the frame tables; `video`: new ids of the segments' videos."""
        index = self.source.index
        first = np.where(self.counts > 0, np.cumsum(self.counts) - self.counts, 0)
        part = FramesPart(
            segment=self.new,
            first_row=first.tolist(),
            rows=self.counts.tolist(),
            frames=index.frames[self.old].tolist(),
            failed=self._renumbered(index.reason),
            notes=self._renumbered(index.note),
            counted=[new for new, s in zip(self.new, self.old, strict=True) if s in index.counted],
        )
        values = {
            "video": np.repeat(video, self.counts),
            "index": self.source.read_table("index", self.rows),
            "pts": self.source.read_table("pts", self.rows),
        }
        folder, part.files = self._stage(fmt.frame_specs(), values)
        run = _common(
            [index.frame_commits[int(s)]["run"] for s in np.unique(index.shard[self.old])]
        )
        self.writer.commit(ShardResult(self.shard, part, {}, folder), run)

    def hashes(self) -> None:
        """Stage and commit the hashes of frames, unless a source shard has none."""
        index = self.source.index
        shards = index.shard[self.old][self.counts > 0].tolist()
        if not set(shards) <= index.hashes.keys():
            return
        hashed_segments = np.array([s not in index.unhashed for s in self.old], bool)
        hashed = np.repeat(hashed_segments, self.counts)
        values: dict[str, NDArray[Any]] = {}
        if hashed.any():
            values.update(zip(fmt.HASH_TABLES, self.source.hashes(self.rows[hashed]), strict=True))
        folder, files = self._stage(fmt.hash_specs(), values, hashed)
        part = HashPart(int(hashed.sum()), self._renumbered(index.unhashed), files)
        self.writer.commit(ShardResult(self.shard, None, {}, folder, part), {})

    def teacher(self, name: str, codec: Codec | None = None) -> None:
        """Stage and commit a teacher's rows, as they are stored or in another encoding."""
        index, record = self.source.index, self.source.teacher(name)
        teacher = index.teachers[name]
        num_rows = np.where(np.isin(self.old, list(teacher.failed)), 0, self.counts).tolist()
        shards = index.shard[self.old].tolist()
        errors = [
            (n, teacher.commits[shard]["error"]) for n, shard in zip(num_rows, shards, strict=True)
        ]
        part = TeacherPart(
            sum(num_rows), total_error(errors, record.output), self._renumbered(teacher.failed)
        )
        codec = record.codec if codec is None else codec
        # A shard in which every segment failed may have no file.
        has_row = np.repeat(np.array(num_rows) > 0, self.counts)
        stored, row_errors = self._rows(name, record.codec, codec, self.rows[has_row])
        if row_errors is not None:
            part.error = error_record(row_errors, codec.output)
        specs = fmt.teacher_specs(name, codec.width, codec.encoding, codec.output)
        folder, part.files = self._stage(specs, stored, has_row)
        part.sums = Sums.of(codec, stored) if codec.output == "features" else None
        run = _common([teacher.commits[shard]["run"] for shard in sorted(set(shards))])
        self.writer.commit(ShardResult(self.shard, None, {name: part}, folder), run)

    def _stage(
        self,
        specs: Sequence[fmt.ArraySpec],
        values: Mapping[str, NDArray[Any]],
        has_row: NDArray[np.bool_] | slice = slice(None),
    ) -> tuple[str, list[StagedFile]]:
        """Stage arrays and return their folder and files; rows without `has_row` become fill."""
        folder, files = new_staging(self.writer.root, self.shard), list[StagedFile]()
        for spec in specs:
            full = np.full((len(self.rows), *spec.row), spec.fill, spec.dtype)
            full[has_row] = values[spec.name] if values else spec.fill
            files += stage_array(folder, spec, self.shard, full, self.writer.shard_rows)
        return str(folder), files

    def _rows(
        self, name: str, old: Codec, new: Codec, rows: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32] | None]:
        """Return a teacher's arrays in the new encoding, and each row's error if it differs.

        The error is measured against the values in the source. Memory beyond the arrays does not
        grow with the number of rows.
        """
        read = self.source.read_stored
        if old.encoding == new.encoding:
            arrays = row_arrays(old.encoding, old.output)
            return {array: read(name, array, rows) for array in arrays}, None
        parts: dict[str, list[NDArray[Any]]] = {}
        errors: list[NDArray[np.float32]] = []
        for start in range(0, max(len(rows), 1), BLOCK):
            values = self.source.values(name, rows[start : start + BLOCK])
            encoded = new.encode(values)
            errors.append(new.error(values, new.decode(encoded)))
            for array in arrays_of(new.encoding, new.output):
                parts.setdefault(array, []).append(encoded[array])
        stored = {array: np.concatenate(blocks) for array, blocks in parts.items()}
        if new.output == "logits":
            stored["entropy"] = read(name, "entropy", rows)
        return stored, np.concatenate(errors)

    def _renumbered(self, texts: dict[int, str]) -> dict[int, str]:
        """Return the texts of the segments of this shard, by their new ids."""
        return {new: texts[s] for new, s in zip(self.new, self.old, strict=True) if s in texts}


def _shard_rows(source: TargetStore, bounds: NDArray[np.int64], shard_rows: int | None) -> int:
    """Return the requested shard size, or one for the number of rows and the longest range."""
    longest = int(np.max(bounds, initial=0))
    if shard_rows is not None:
        if shard_rows < longest:
            raise UsageError(f"--shard-rows {shard_rows}: a segment has {longest} rows, the store {source.name} "
                             f"has shards of {source.index.shard_rows}")  # fmt: skip
        return shard_rows
    rows = auto_shard_rows(int(bounds.sum()))
    while rows < longest:
        rows *= 2
    return rows


def _list_videos(source: TargetStore, writer: StoreWriter, videos: NDArray[np.int64]) -> None:
    columns: dict[str, Any] = {s.name: source.column(s.name)[videos] for s in fmt.video_specs()}
    used = np.unique(columns["corpus"])
    columns["corpus"] = np.searchsorted(used, columns["corpus"])
    writer.add_videos(columns, [source.index.corpora[int(c)] for c in used])


def _common(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numerics of rows from several commits."""
    distinct = [run for i, run in enumerate(runs) if run not in runs[:i]]
    return distinct[0] if len(distinct) == 1 else {"mixed": distinct}
