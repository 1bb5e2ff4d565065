"""Make a store of some videos and teachers of another; rows are copied as stored.

They are packed into new shards.
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

BLOCK = 1024  # rows encoded at a time


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
    """Write `videos` (ids of `source`, none pending) and their rows to a new store.

    Failed videos are included with their reasons. codecs: how teachers' rows are to be stored, by
    name; the others' as they are.

    Returns:
        The number of rows.

    Raises:
        UsageError: A range of a video does not fit `shard_rows`.
        StoreError: Rows of the source cannot be read.
    """
    index = source.index
    order = index.order()
    begin = np.searchsorted(index.video[order], videos)
    end = np.searchsorted(index.video[order], videos, side="right")
    old = np.concatenate(
        [order[a:b] for a, b in zip(begin, end, strict=True)] or [np.empty(0, np.int64)]
    )
    owner = np.repeat(np.arange(len(videos)), end - begin)
    bounds = np.where(index.state[old] == OK, index.rows[old], 0)
    ranges = [
        FrameRange(int(v), int(index.first[s]), int(index.end[s]), int(n))
        for v, s, n in zip(owner, old, bounds, strict=True)
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
        wanted = {name: source.teacher(name).codec for name in teachers} | dict(codecs or {})
        for name in teachers:
            record = source.teacher(name)
            writer.add_teacher(
                name,
                record.classes,
                nodes[name],
                codec=wanted[name],
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
                copy.teacher(name, wanted[name])
            advance(len(copy.rows))
    return int(bounds.sum())


class ShardCopy:
    """One shard of the store that `writer` writes: segments `new`, which are `old` of `source`."""

    def __init__(
        self, source: TargetStore, writer: StoreWriter, shard: int, new: list[int], old: list[int]
    ) -> None:
        self.source, self.writer, self.shard, self.new, self.old = source, writer, shard, new, old
        index = source.index
        self.counts = np.where(index.state[old] == OK, index.rows[old], 0)
        self.rows = runs(index.row[old], self.counts)

    def frames(self, video: NDArray[np.int64]) -> None:
        """Stage and commit the frame tables; `video`: new numbers of the segments' videos."""
        index = self.source.index
        first = np.where(self.counts > 0, np.cumsum(self.counts) - self.counts, 0)
        part = FramesPart(
            segment=self.new,
            first_row=first.tolist(),
            rows=self.counts.tolist(),
            frames=index.frames[self.old].tolist(),
            failed=self._of(index.reason),
            notes=self._of(index.note),
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
        """Stage and commit the hashes of frames, unless those of a segment are missing."""
        index = self.source.index
        shards = index.shard[self.old][self.counts > 0].tolist()
        if not set(shards) <= index.hashes.keys():
            return
        good = np.array([s not in index.unhashed for s in self.old], bool)
        kept = np.repeat(good, self.counts)
        values: dict[str, NDArray[Any]] = {}
        if kept.any():
            values.update(zip(fmt.HASH_TABLES, self.source.hashes(self.rows[kept]), strict=True))
        folder, files = self._stage(fmt.hash_specs(), values, kept)
        part = HashPart(int(kept.sum()), self._of(index.unhashed), files)
        self.writer.commit(ShardResult(self.shard, None, {}, folder, part), {})

    def teacher(self, name: str, codec: Codec | None = None) -> None:
        """Stage and commit a teacher's rows, as they are stored or in another form."""
        index, record = self.source.index, self.source.teacher(name)
        of = index.teachers[name]
        good = np.where(np.isin(self.old, list(of.failed)), 0, self.counts).tolist()
        shards = index.shard[self.old].tolist()
        errors = [(n, of.commits[shard]["error"]) for n, shard in zip(good, shards, strict=True)]
        part = TeacherPart(sum(good), total_error(errors, record.output), self._of(of.failed))
        codec = record.codec if codec is None else codec
        # A shard of which every segment failed may have no file.
        kept = np.repeat(np.array(good) > 0, self.counts)
        stored, row_errors = self._rows(name, record.codec, codec, self.rows[kept])
        if row_errors is not None:
            part.error = error_record(row_errors, codec.output)
        specs = fmt.teacher_specs(name, codec.width, codec.encoding, codec.output)
        folder, part.files = self._stage(specs, stored, kept)
        part.sums = Sums.of(codec, stored) if codec.output == "features" else None
        run = _common([of.commits[shard]["run"] for shard in sorted(set(shards))])
        self.writer.commit(ShardResult(self.shard, None, {name: part}, folder), run)

    def _stage(
        self,
        specs: Sequence[fmt.ArraySpec],
        values: Mapping[str, NDArray[Any]],
        kept: NDArray[np.bool_] | slice = slice(None),
    ) -> tuple[str, list[StagedFile]]:
        """Stage the `kept` rows of arrays by name, the others as fill; return folder and files."""
        folder, files = new_staging(self.writer.root, self.shard), list[StagedFile]()
        for spec in specs:
            full = np.full((len(self.rows), *spec.row), spec.fill, spec.dtype)
            full[kept] = values[spec.name] if values else spec.fill
            files += stage_array(folder, spec, self.shard, full, self.writer.shard_rows)
        return str(folder), files

    def _rows(
        self, name: str, old: Codec, new: Codec, rows: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32] | None]:
        """Return a teacher's arrays in their new form, and the error in each row if it is another.

        The error is measured against what the source has; memory beyond the arrays does not grow
        with the rows.
        """
        read = self.source.read_stored
        if old.encoding == new.encoding:
            arrays = row_arrays(old.encoding, old.output)
            return {array: read(name, array, rows) for array in arrays}, None
        parts: dict[str, list[NDArray[Any]]] = {}
        errors: list[NDArray[np.float32]] = []
        for at in range(0, max(len(rows), 1), BLOCK):
            values = self.source.values(name, rows[at : at + BLOCK])
            encoded = new.encode(values)
            errors.append(new.error(values, new.decode(encoded)))
            for array in arrays_of(new.encoding, new.output):
                parts.setdefault(array, []).append(encoded[array])
        stored = {array: np.concatenate(blocks) for array, blocks in parts.items()}
        if new.output == "logits":
            stored["entropy"] = read(name, "entropy", rows)
        return stored, np.concatenate(errors)

    def _of(self, texts: dict[int, str]) -> dict[int, str]:
        return {new: texts[s] for new, s in zip(self.new, self.old, strict=True) if s in texts}


def _shard_rows(source: TargetStore, bounds: NDArray[np.int64], asked: int | None) -> int:
    """Return the size asked for, or one by the number of rows that holds the longest range."""
    longest = int(np.max(bounds, initial=0))
    if asked is not None:
        if asked < longest:
            raise UsageError(f"--shard-rows {asked}: a segment has {longest} rows, the store {source.name} "
                             f"has shards of {source.index.shard_rows}")  # fmt: skip
        return asked
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
    """Return the run of rows that come from several commits."""
    distinct = [run for i, run in enumerate(runs) if run not in runs[:i]]
    return distinct[0] if len(distinct) == 1 else {"mixed": distinct}
