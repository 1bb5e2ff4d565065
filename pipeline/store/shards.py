"""Write shard files, and read rows straight from local ones: one `pread` per chunk and its crc32c.

zarr-python needs 2 ms per row, this module 0.02 ms (docs/benchmarks.md); a loader reads thousands
of rows per second. The files are plain Zarr v3: `sharding_indexed` with the index at the end
(offset and length of every chunk as uint64 pairs, then a crc32c), inner codecs `bytes`
little-endian and `crc32c`.

Shapes: n requested rows, R rows of a shard.
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
# Up to this many rows are read one after the other, without NumPy's grouping.
MAX_SINGLE_READS = 16
# Descriptors and indices that are kept open per array.
MAX_OPEN_SHARDS = 128


class ShardedRows:
    """Rows of one sharded local array; opens shards lazily and keeps the most recent ones open.

    It is picklable and fork-safe: descriptors belong to the process that opened them.

    Args:
        path: The array's folder, or its name in messages if a subclass reads it elsewhere.
        meta: The array's zarr.json.
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
        """Close the shards that this process has opened."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def read(self, rows: ArrayLike) -> NDArray[Any]:
        """Return the rows [n, …] in the requested order.

        Raises:
            StoreError: A crc32c is wrong, a file is too short, or a shard does not exist.
        """
        requested = np.asarray(rows, np.int64)
        out = np.empty((len(requested), *self.shape[1:]), self.dtype)
        if len(requested) <= MAX_SINGLE_READS:
            self._read_few(requested.tolist(), out)
            return out
        lowest, highest = int(np.min(requested)), int(np.max(requested))
        if lowest < 0 or highest >= self.shape[0]:
            raise StoreError(
                f"{self.path}: row {lowest if lowest < 0 else highest} of {self.shape[0]}"
            )
        chunks = requested // self.chunk_rows
        for chunk in np.unique(chunks):
            positions = np.flatnonzero(chunks == chunk)
            out[positions] = self._chunk(int(chunk))[requested[positions] % self.chunk_rows]
        return out

    def read_range(self, first: int, count: int) -> NDArray[Any]:
        """Return rows `first` … `first` + `count` - 1, [count, …]; raises like `read`."""
        out = np.empty((count, *self.shape[1:]), self.dtype)
        if not 0 <= first <= first + count <= self.shape[0]:
            raise StoreError(f"{self.path}: rows {first} … {first + count - 1} of {self.shape[0]}")
        num_read = 0
        while num_read < count:
            chunk, offset = divmod(first + num_read, self.chunk_rows)
            values = self._chunk(chunk)[offset : offset + count - num_read]
            out[num_read : num_read + len(values)] = values
            num_read += len(values)
        return out

    def _read_few(self, rows: list[int], out: NDArray[Any]) -> None:
        """Read the rows of a pick into `out`.

        For so few rows NumPy's grouping would take longer than reading.
        """
        current_chunk, values = -1, out
        for i, row in enumerate(rows):
            if not 0 <= row < self.shape[0]:
                raise StoreError(f"{self.path}: row {row} of {self.shape[0]}")
            chunk, offset = divmod(row, self.chunk_rows)
            if chunk != current_chunk:
                current_chunk, values = chunk, self._chunk(chunk)
            out[i] = values[offset]

    def _chunk(self, chunk: int) -> NDArray[Any]:
        shard, position = divmod(chunk, self.shard_rows // self.chunk_rows)
        fd, index = self._shard(shard)
        offset, length = index[position].tolist()
        shape = (self.chunk_rows, *self.shape[1:])
        if offset == MISSING and length == MISSING:
            return np.full(shape, self.fill, self.dtype)
        size = math.prod(shape) * self.dtype.itemsize
        data = os.pread(fd, length, offset)
        if not intact(data, size):
            data = self._reread(shard, fd, offset, length)
            if not intact(data, size):
                raise StoreError(
                    f"{self._file(shard)}: chunk {position} fails its crc32c; see `distinit targets verify`"
                )
        return np.frombuffer(data, self.dtype, math.prod(shape)).reshape(shape)

    def _shard(self, shard: int) -> tuple[int, NDArray[np.uint64]]:
        # In a forked worker the descriptors belong to the parent process.
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        fd = self._open_file(shard)
        try:
            num_bytes = 16 * (self.shard_rows // self.chunk_rows)
            start = max(os.fstat(fd).st_size - num_bytes - 4, 0)
            tail = os.pread(fd, num_bytes + 4, start)
            if not intact(tail, num_bytes):
                tail = self._reread(shard, fd, start, num_bytes + 4)
                if not intact(tail, num_bytes):
                    raise StoreError(
                        f"{self._file(shard)}: the shard's index is damaged or cut off"
                    )
        except BaseException:
            os.close(fd)
            raise
        index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2)
        self._open[shard] = (fd, index)
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return fd, index

    def _open_file(self, shard: int) -> int:
        """Return a descriptor of the shard's file."""
        file = self._file(shard)
        try:
            return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise StoreError(f"{file}: a committed shard is missing ({error.strerror})") from error

    def _reread(self, shard: int, fd: int, start: int, length: int) -> bytes:
        """Read bytes again whose crc32c failed; a local file has no other copy of them."""
        return b""

    def _file(self, shard: int) -> str:
        return f"{self.path}/{self._key(shard)}"

    def _key(self, shard: int) -> str:
        return "/".join(("c", str(shard), *("0" for _ in self.shape[1:])))


def encode_shard(
    values: NDArray[Any], fill: float, *, shard_rows: int, chunk_rows: int
) -> bytes | None:
    """Return the file of a shard whose first rows are `values` [n ≤ R, …].

    The other rows have the fill value. As in zarr-python, chunks that hold only the fill value are
    left out. Return None if all chunks do.
    """
    index = np.full((shard_rows // chunk_rows, 2), MISSING, "<u8")
    parts: list[bytes] = []
    offset = 0
    for chunk, first in enumerate(range(0, len(values), chunk_rows)):
        rows = np.full((chunk_rows, *values.shape[1:]), fill, values.dtype)
        rows[: len(values) - first] = values[first : first + chunk_rows]
        if _is_fill(rows, fill):
            continue
        data = rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()
        parts += [data, _crc(data)]
        index[chunk] = offset, len(data) + 4
        offset += len(data) + 4
    table = index.tobytes()
    return b"".join([*parts, table, _crc(table)]) if parts else None


def _is_fill(rows: NDArray[Any], fill: float) -> bool:
    """Return whether all values are the fill value, by their bits: -0.0 is not 0.0."""
    if np.isnan(fill):
        return bool(np.isnan(rows).all())
    return rows.tobytes() == np.full_like(rows, fill).tobytes()


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")


def chunk_crcs_hold(data: bytes, chunks: int) -> bool:
    """Return whether the index and every chunk of a whole shard file pass their crc32c."""
    num_bytes = 16 * chunks
    tail = data[-num_bytes - 4 :]
    if not intact(tail, num_bytes):
        return False
    index = np.frombuffer(tail[:-4], "<u8").reshape(-1, 2).tolist()
    return all(
        intact(data[offset : offset + length], length - 4)
        for offset, length in index
        if (offset, length) != (MISSING, MISSING)
    )


def intact(data: bytes, size: int) -> bool:
    """Return whether `data` is `size` bytes followed by their crc32c."""
    return len(data) == size + 4 and _crc(data[:-4]) == data[-4:]
