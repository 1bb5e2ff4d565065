"""The messages between a decode pool and its workers: JSON over a socket, frames in shared memory.

The format is JSON, not pickle: a decoder that hostile media has taken over must not run code in the
parent.

The shared memory has `SLOTS` slots of `rows` rows, and a row holds one picture of each view:

    slot 0 [view 0 [rows, h0, w0, 3] | view 1 [rows, h1, w1, 3]] | slot 1 …
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..geometry import View

INTERNAL = "internal error: "
"""The beginning of the reason if a fault of this package prevented the reading of a video."""
SLOTS = 4
FORK = b"f"
"""The request for a worker, with its descriptors."""
NOT_FORKED = -1
"""The answer to `FORK` if the system forks no more processes."""
_SLOT_BYTES = 2**22


@dataclass(frozen=True)
class Layout:
    """Rows per slot, and the (height, width) of each view."""

    rows: int
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def for_views(cls, views: tuple[View, ...]) -> Layout:
        """Return slots of about 4 MB with 1 to 64 rows.

        Raises:
            ValueError: The size of a view depends on the video.
        """
        shapes = []
        for view in views:
            shape = view.fixed_shape
            if shape is None:
                raise ValueError(
                    f"a pool requires views of one size: set crop or a pair as resize, got {view!r}"
                )
            shapes.append(shape)
        row_bytes = sum(h * w * 3 for h, w in shapes)
        return cls(min(64, max(1, _SLOT_BYTES // max(1, row_bytes))), tuple(shapes))

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of one slot."""
        return self.rows * sum(h * w * 3 for h, w in self.shapes)

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all slots."""
        return max(mmap.PAGESIZE, SLOTS * self.slot_bytes)

    def arrays(self, memory: mmap.mmap, slot: int) -> tuple[np.ndarray, ...]:
        """Return the pictures of one slot, uint8 [rows, h, w, 3] per view."""
        offset, arrays = slot * self.slot_bytes, []
        for height, width in self.shapes:
            shape = (self.rows, height, width, 3)
            arrays.append(np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape))
            offset += math.prod(shape)
        return tuple(arrays)


def shared_file(size: int) -> int:
    """Return a descriptor of unnamed shared memory, or of an unlinked file without memfd."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("distinit-frames", os.MFD_CLOEXEC)
    else:
        descriptor, name = tempfile.mkstemp()
        os.unlink(name)
    os.ftruncate(descriptor, size)
    return descriptor


def send(connection: Connection, message: dict[str, Any]) -> None:
    """Send one message; lone surrogates of file names are sent as escapes."""
    connection.send_bytes(json.dumps(message).encode("ascii"))


def receive(connection: Connection) -> dict[str, Any]:
    """Return the next message; raise EOFError if the other side has ended."""
    return dict(json.loads(connection.recv_bytes()))


class Inbox:
    """Parts of messages from `send`, for a reader that must not wait for a whole message."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, data: bytes) -> None:
        """Add received bytes."""
        self._bytes += data

    def next(self) -> dict[str, Any] | None:
        """Return the next message, None while it is incomplete."""
        head = 4
        if len(self._bytes) < head:
            return None
        (size,) = struct.unpack_from("!i", self._bytes)
        # A message of 2 GiB or more.
        if size == -1:
            head = 12
            if len(self._bytes) < head:
                return None
            (size,) = struct.unpack_from("!Q", self._bytes, 4)
        if len(self._bytes) < head + size:
            return None
        message = dict(json.loads(self._bytes[head : head + size]))
        del self._bytes[: head + size]
        return message
