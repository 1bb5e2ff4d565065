"""Record in shared memory which file each loader process reads, and which files are refused.

A decoder that crashes or hangs in C cannot report it. The process that waits for it finds the file
here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

from .errors import VideoError

# Number of the read (0: no file is being read), and bytes of the path.
_HEAD = struct.Struct("<II")
_ROW = 4096
_MAX_PATH = _ROW - _HEAD.size


class WorkerStatus:
    """A row per worker, which the worker writes; it is passed to each worker as an argument."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._memory: Any = context.RawArray("c", workers * _ROW)
        self._reads = 0

    def reading(self, worker: int) -> tuple[str, int] | None:
        """Return the file that a worker is reading and the number of the read, None for no file."""
        row = self._row(worker)
        number, length = _HEAD.unpack_from(row)
        if number == 0 or length > _MAX_PATH:
            return None
        return os.fsdecode(bytes(row[_HEAD.size : _HEAD.size + length])), number

    def note(self, worker: int, path: str | None) -> None:
        """Record in the row of `worker` which file it reads from now on, None for no file."""
        row = self._row(worker)
        _HEAD.pack_into(row, 0, 0, 0)
        if path is not None:
            name = os.fsencode(path)[:_MAX_PATH]
            row[_HEAD.size : _HEAD.size + len(name)] = name
            self._reads = self._reads % 0xFFFFFFFF + 1
            _HEAD.pack_into(row, 0, self._reads, len(name))

    def _row(self, worker: int) -> memoryview:
        return memoryview(self._memory).cast("B")[worker * _ROW : (worker + 1) * _ROW]


class _Process:
    """The state of this process."""

    status: WorkerStatus | None = None
    worker = 0
    refused: Mapping[str, str] = {}


def begin(status: WorkerStatus, worker: int, refused: Mapping[str, str]) -> None:
    """Make this process a loader process that refuses files (path → reason)."""
    _Process.status, _Process.worker, _Process.refused = status, worker, refused


def refused_files() -> Mapping[str, str]:
    """Return the files that this process refuses to read: path → reason."""
    return _Process.refused


@contextmanager
def refusing(files: Mapping[str, str]) -> Iterator[None]:
    """Refuse these files (path → reason) in the block, and in loader processes started in it."""
    previous = _Process.refused
    _Process.refused = {**previous, **files}
    try:
        yield
    finally:
        _Process.refused = previous


@contextmanager
def record_read(path: str) -> Iterator[None]:
    """Record that this file is read in the block.

    Raises:
        VideoError: The file is refused.
    """
    if path in _Process.refused:
        raise VideoError(_Process.refused[path])
    if _Process.status is None:
        yield
        return
    _Process.status.note(_Process.worker, path)
    try:
        yield
    finally:
        _Process.status.note(_Process.worker, None)
