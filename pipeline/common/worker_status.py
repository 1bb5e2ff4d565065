"""Which file each loader process is reading, in memory that the main process sees.

A decoder that crashes or hangs in C cannot say so itself: the process that waits for it looks here,
names the file, and has it refused from then on.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any

from .errors import VideoError

_HEAD = struct.Struct("<dI")  # when it began (monotonic, 0: not reading), bytes of the path
_ROW = 4096
_LONGEST = _ROW - _HEAD.size


class WorkerStatus:
    """A row for each of `workers` processes; goes to them as an argument, however they are
    started."""

    def __init__(self, context: BaseContext, workers: int) -> None:
        self._memory: Any = context.RawArray("c", workers * _ROW)

    def reading(self, worker: int) -> tuple[str, float] | None:
        """The file that a worker is reading and for how many seconds; None while it reads none."""
        row = memoryview(self._memory).cast("B")[worker * _ROW : (worker + 1) * _ROW]
        began, length = _HEAD.unpack_from(row)
        if began == 0 or length > _LONGEST:
            return None
        return os.fsdecode(bytes(row[_HEAD.size : _HEAD.size + length])), time.monotonic() - began

    def note(self, worker: int, path: str | None) -> None:
        """In worker `worker`: what it reads from now on, None for nothing."""
        row = memoryview(self._memory).cast("B")[worker * _ROW : (worker + 1) * _ROW]
        _HEAD.pack_into(row, 0, 0.0, 0)
        if path is not None:
            name = os.fsencode(path)[:_LONGEST]
            row[_HEAD.size : _HEAD.size + len(name)] = name
            _HEAD.pack_into(row, 0, time.monotonic(), len(name))


class _Own:
    """What this process is, if it is a loader process."""

    worker_status: WorkerStatus | None = None
    worker = 0
    refused: Mapping[str, str] = {}


def begin(worker_status: WorkerStatus, worker: int, refused: Mapping[str, str]) -> None:
    """This process is loader process `worker` from now on. refused: path → why it is not to be
    opened."""
    _Own.worker_status, _Own.worker, _Own.refused = worker_status, worker, refused


@contextmanager
def at(path: str) -> Iterator[None]:
    """While this file is read. VideoError if it is refused."""
    if path in _Own.refused:
        raise VideoError(_Own.refused[path])
    if _Own.worker_status is None:
        yield
        return
    _Own.worker_status.note(_Own.worker, path)
    try:
        yield
    finally:
        _Own.worker_status.note(_Own.worker, None)
