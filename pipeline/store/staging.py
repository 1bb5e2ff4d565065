"""Stage one shard as a worker makes it: rows in memory, then files in a staging folder.

Only the client moves the files to their final paths and commits (writer.py), so a late or
superseded attempt changes nothing.

Shapes: R rows of a shard, K classes of a teacher.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.files import fsync_path
from . import layout as fmt
from .digests import digest_bytes
from .encoding import Sums, error_record
from .shards import encode_shard


@dataclass(frozen=True)
class StagedFile:
    """A shard file before its commit: its current path, final path, size and digest."""

    staged: str
    final: str
    size: int
    blake2b: str


@dataclass
class FramesPart:
    """The frame tables of one shard: a row per segment, rows counted inside the shard."""

    segment: list[int] = field(default_factory=list)
    first_row: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    overflow: dict[int, int] = field(default_factory=dict)
    counted: list[int] = field(default_factory=list)
    files: list[StagedFile] = field(default_factory=list)


@dataclass
class TeacherPart:
    """One teacher's rows of one shard.

    error: the result of `encoding.error_record` for the rows. sums: for the statistics of
    features, None for logits.
    """

    rows: int = 0
    error: dict[str, Any] = field(default_factory=lambda: error_record(np.empty(0)))
    failed: dict[int, str] = field(default_factory=dict)
    files: list[StagedFile] = field(default_factory=list)
    sums: Sums | None = None


@dataclass
class HashPart:
    """The hashes of the frames of one shard; failed: reasons by segment without hashes."""

    rows: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    files: list[StagedFile] = field(default_factory=list)


@dataclass
class ShardResult:
    """A worker's result for the client; `frames` is None if the store has the frame tables."""

    shard: int
    frames: FramesPart | None
    teachers: dict[str, TeacherPart]
    staging: str
    hashes: HashPart | None = None

    @property
    def rows(self) -> int:
        """Number of rows written to the frame tables or, without those, for a teacher."""
        if self.frames is not None:
            return sum(self.frames.rows)
        rows = [t.rows for t in self.teachers.values()]
        return max([*rows, 0 if self.hashes is None else self.hashes.rows])


def new_staging(root: Path, shard: int) -> Path:
    """Return the path of a new folder for this attempt.

    It is inside the store, so that files can be renamed to their final paths.
    """
    return root / fmt.STAGING / f"{shard:06d}-{uuid.uuid4().hex[:12]}"


def stage_array(
    folder: Path, spec: fmt.ArraySpec, shard: int, values: NDArray[Any], shard_rows: int
) -> list[StagedFile]:
    """Write the file of a shard with the rows `values` [n ≤ R, …] to `folder`, synced to disk.

    A shard of only fill has no file.
    """
    rows = np.asarray(values).astype(spec.dtype, copy=False)
    data = encode_shard(
        rows, float(spec.fill), shard_rows=shard_rows, chunk_rows=min(spec.chunk, shard_rows)
    )
    if data is None:
        return []
    final = fmt.shard_file(Path(), spec, shard)
    path = folder / final
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    fsync_path(path)
    return [StagedFile(str(path), final.as_posix(), len(data), digest_bytes(data))]
