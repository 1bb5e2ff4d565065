"""Read rows straight from local shard files: one `pread` per chunk, its crc32c checked.

zarr-python needs 2 ms for a row, this 0.02 (docs/benchmarks.md); a loader asks for thousands per
second. The file stays plain Zarr v3: `sharding_indexed` with the index at the end (offset and
length of every chunk as uint64 pairs, then a crc32c), inner codecs `bytes` little-endian and
`crc32c`.

Shapes: n rows asked for, R rows of a shard.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..common.errors import StoreError, in_one_line

MISSING = 2**64 - 1
FEW = 16
OPEN_SHARDS = 128  # descriptors and indices kept per array


class ShardedRows:
    """Rows of one sharded local array; opens shards lazily and keeps the most recent ones open.

    path: the array's folder, or what messages call it where a subclass reads elsewhere. meta: the
    array's zarr.json. Picklable and fork-safe: descriptors belong to the process that opened them.
    """

    def __init__(self, path: Path | str, meta: Mapping[str, Any]) -> None:
        self.path = path
        try:
            sharding = meta["codecs"][0]
            inner = sharding["configuration"]
            names = [c["name"] for c in inner["codecs"]]
            self.shape: tuple[int, ...] = tuple(meta["shape"])
            self.shard_rows: int = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
            self.chunk_rows: int = inner["chunk_shape"][0]
            self.dtype = np.dtype(meta["data_type"]).newbyteorder("<")
            self.fill: Any = np.nan if meta["fill_value"] == "NaN" else meta["fill_value"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path}/zarr.json: not a sharded array of a store ({in_one_line(error)})"
            ) from error
        if sharding["name"] != "sharding_indexed" or names != ["bytes", "crc32c"]:
            raise StoreError(f"{path}: codecs {names}, version 1 has bytes and crc32c in a shard")
        self._open: OrderedDict[int, tuple[int, NDArray[np.uint64]]] = OrderedDict()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            self.close()

    def close(self) -> None:
        """Close the shards this process has open."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def read(self, rows: ArrayLike) -> NDArray[Any]:
        """Return the rows [n, …] in the order asked for.

        Raises:
            StoreError: A crc is wrong, a file is too short, or a shard does not exist.
        """
        requested = np.asarray(rows, np.int64)
        out = np.empty((len(requested), *self.shape[1:]), self.dtype)
        if len(requested) <= FEW:
            self._read_few(requested.tolist(), out)
            return out
        if np.min(requested) < 0 or np.max(requested) >= self.shape[0]:
            wrong = np.min(requested) if np.min(requested) < 0 else np.max(requested)
            raise StoreError(f"{self.path}: row {int(wrong)} of {self.shape[0]}")
        chunks = requested // self.chunk_rows
        for chunk in np.unique(chunks):
            at = np.flatnonzero(chunks == chunk)
            out[at] = self._chunk(int(chunk))[requested[at] % self.chunk_rows]
        return out

    def read_range(self, first: int, count: int) -> NDArray[Any]:
        """Rows `first` … `first` + `count` - 1, [count, …]; raises as `read`."""
        out = np.empty((count, *self.shape[1:]), self.dtype)
        if not 0 <= first <= first + count <= self.shape[0]:
            raise StoreError(f"{self.path}: rows {first} … {first + count - 1} of {self.shape[0]}")
        done = 0
        while done < count:
            chunk, at = divmod(first + done, self.chunk_rows)
            part = self._chunk(chunk)[at : at + count - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def _read_few(self, rows: list[int], out: NDArray[Any]) -> None:
        """Read the rows of a pick into `out`.

        For so few rows NumPy's grouping would cost more than the reading.
        """
        last, values = -1, out
        for i, row in enumerate(rows):
            if not 0 <= row < self.shape[0]:
                raise StoreError(f"{self.path}: row {row} of {self.shape[0]}")
            chunk, at = divmod(row, self.chunk_rows)
            if chunk != last:
                last, values = chunk, self._chunk(chunk)
            out[i] = values[at]

    def _chunk(self, chunk: int) -> NDArray[Any]:
        shard, inside = divmod(chunk, self.shard_rows // self.chunk_rows)
        fd, index = self._shard(shard)
        offset, length = index[inside].tolist()
        shape = (self.chunk_rows, *self.shape[1:])
        if offset == MISSING and length == MISSING:
            return np.full(shape, self.fill, self.dtype)
        size = math.prod(shape) * self.dtype.itemsize
        data = os.pread(fd, length, offset)
        if not intact(data, size):
            data = self._again(shard, fd, offset, length)
            if not intact(data, size):
                raise StoreError(
                    f"{self._file(shard)}: chunk {inside} fails its crc32c; see `distinit targets verify`"
                )
        return np.frombuffer(data, self.dtype, math.prod(shape)).reshape(shape)

    def _shard(self, shard: int) -> tuple[int, NDArray[np.uint64]]:
        if self._owner != os.getpid():  # a forked worker: the descriptors belong to the parent
            self._open, self._owner = OrderedDict(), os.getpid()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        fd = self._open_file(shard)
        try:
            n = 16 * (self.shard_rows // self.chunk_rows)
            start = max(os.fstat(fd).st_size - n - 4, 0)
            tail = os.pread(fd, n + 4, start)
            if not intact(tail, n):
                tail = self._again(shard, fd, start, n + 4)
                if not intact(tail, n):
                    raise StoreError(
                        f"{self._file(shard)}: the shard's index is damaged or cut off"
                    )
        except BaseException:
            os.close(fd)
            raise
        index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)
        self._open[shard] = (fd, index)
        if len(self._open) > OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return fd, index

    def _open_file(self, shard: int) -> int:
        """Return a descriptor of the shard's file."""
        file = self._file(shard)
        try:
            return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise StoreError(f"{file}: a committed shard is missing ({error.strerror})") from error

    def _again(self, shard: int, fd: int, start: int, length: int) -> bytes:
        """Read bytes again whose crc32c failed; a local file has no others."""
        return b""

    def _file(self, shard: int) -> str:
        return f"{self.path}/{self._key(shard)}"

    def _key(self, shard: int) -> str:
        return "/".join(("c", str(shard), *("0" for _ in self.shape[1:])))


def chunk_crcs_hold(data: bytes, chunks: int) -> bool:
    """Return whether the index and every chunk of a whole shard file pass their crc32c."""
    n = 16 * chunks
    tail = data[-n - 4 :]
    if not intact(tail, n):
        return False
    index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2).tolist()
    return all(
        intact(data[at : at + size], size - 4)
        for at, size in index
        if (at, size) != (MISSING, MISSING)
    )


def intact(data: bytes, size: int) -> bool:
    """Return whether `data` has `size` bytes and passes its crc32c."""
    return (
        len(data) == size + 4
        and int(google_crc32c.value(data[:-4])).to_bytes(4, "little") == data[-4:]
    )
