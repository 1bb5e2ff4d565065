"""A cache of the frame tables that were read last, bounded by their frames."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

MAX_FRAMES = 2**18  # some 9 MB

_Key = tuple[str, int, int]


class _Sized(Protocol):
    def __len__(self) -> int: ...


M = TypeVar("M", bound=_Sized)


class LruCache(Generic[M]):
    """The tables read last in this process, `MAX_FRAMES` frames in all.

    Keys are (path, size, mtime_ns).
    """

    def __init__(self) -> None:
        self._tables: OrderedDict[_Key, M] = OrderedDict()
        self._frames = 0

    def get(self, key: _Key) -> M | None:
        """Return what is kept under `key`, or None."""
        if key in self._tables:
            self._tables.move_to_end(key)
        return self._tables.get(key)

    def add(self, key: _Key, table: M) -> None:
        """Keep a table and drop the oldest ones where there are too many frames."""
        if key in self._tables:
            self._frames -= len(self._tables[key])
        self._tables[key] = table
        self._frames += len(table)
        while self._frames > MAX_FRAMES and len(self._tables) > 1:
            self._frames -= len(self._tables.popitem(last=False)[1])
