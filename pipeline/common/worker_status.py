"""Which file each loader process is reading, and which files are refused, in shared memory.

A decoder that crashes or hangs in C cannot report it: the process that waits for it looks here and
names the file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

from .errors import VideoError

_HEAD = struct.Struct("<II")  # number of this read (0: no file is being read), bytes of the path
_ROW = 4096
_MAX_PATH = _ROW - _HEAD.size


class WorkerStatus:
    """A row per worker, written by the worker; goes to it as an argument, however it is started."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._memory: Any = context.RawArray("c", workers * _ROW)
        self._reads = 0

    def reading(self, worker: int) -> tuple[str, int] | None:
        """Return the file that a worker is reading and the number of this read; None for none."""
        row = self._row(worker)
        number, length = _HEAD.unpack_from(row)
        if number == 0 or length > _MAX_PATH:
            return None
        return os.fsdecode(bytes(row[_HEAD.size : _HEAD.size + length])), number

    def note(self, worker: int, path: str | None) -> None:
        """Record in the row of `worker` which file it reads from now on, None for none."""
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
    """Refuse these files (path → reason), here and in loader processes started meanwhile."""
    before = _Process.refused
    _Process.refused = {**before, **files}
    try:
        yield
    finally:
        _Process.refused = before


@contextmanager
def at(path: str) -> Iterator[None]:
    """Record that this file is read meanwhile.

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
