"""Read columns of tables straight from their chunk files, as `shards.py` reads rows.

A store has forty columns. zarr-python needs 3 ms of a core to open and read one
(docs/benchmarks.md), and a command that only reads a store does not load zarr at all. The files
are plain Zarr v3: `check_array` has checked that a column's codecs are `bytes` or `vlen-utf8`,
then `zstd`, `crc32c`, both or neither.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from ..common.errors import StoreError, in_one_line
from .digests import split_ranges
from .shards import intact
from .validation import largest_chunk, unpacked_bytes

# A short text takes sixteen bytes instead of a Python object; NumPy 1 has no such type.
TEXT: Any = np.dtypes.StringDType() if hasattr(np.dtypes, "StringDType") else np.dtype(object)
# Largest size of the header of a zstd frame in bytes.
ZSTD_HEADER = 18


class Column:
    """One column of a table in a local folder.

    Args:
        folder: The array's folder.
        where: The array's name in messages.
        meta: The array's zarr.json, checked by `check_array`.
    """

    def __init__(self, folder: Path, where: str, meta: Mapping[str, Any]) -> None:
        self.folder, self.where = folder, where
        self.shape: tuple[int, ...] = tuple(meta["shape"])
        self.chunks: tuple[int, ...] = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
        serializer, *self._compression = meta["codecs"]
        self._text = serializer["name"] == "vlen-utf8"
        self.dtype = TEXT if self._text else np.dtype(meta["data_type"])
        big = serializer.get("configuration", {}).get("endian") == "big"
        self._stored_dtype = (
            self.dtype if self._text else self.dtype.newbyteorder(">" if big else "<")
        )
        self._fill: Any = np.nan if meta["fill_value"] == "NaN" else meta["fill_value"]
        self._max_bytes = largest_chunk(meta)

    def key(self, chunk: int) -> str:
        """Return the name of a chunk's file below the folder."""
        return "/".join(("c", str(chunk), *("0" for _ in self.shape[1:])))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows [start, stop); a chunk without a file holds the fill value.

        Raises:
            StoreError: A chunk cannot be read or decoded, or is larger than its rows can be.
        """
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for first, end in split_ranges(start, stop, self.chunks[0]):
            chunk, offset = divmod(first, self.chunks[0])
            try:
                rows[first - start : end - start] = self._chunk(chunk)[
                    offset : offset + end - first
                ]
            # Each codec raises its own kinds of errors.
            except Exception as error:
                raise StoreError(
                    f"{self.where}/{self.key(chunk)}: cannot be decoded ({in_one_line(error)})"
                ) from error
        return rows

    def _chunk(self, chunk: int) -> NDArray[Any]:
        try:
            data = self._read_file(f"{self.folder}/{self.key(chunk)}")
        except (FileNotFoundError, NotADirectoryError):
            return np.full(self.chunks, self._fill, self.dtype)
        for codec in reversed(self._compression):
            data = Zstd().decode(data) if codec["name"] == "zstd" else _without_crc(data)
        if self._text:
            return np.asarray(VLenUTF8().decode(data)).reshape(self.chunks)
        return np.frombuffer(data, self._stored_dtype).reshape(self.chunks)

    def _read_file(self, file: str) -> bytes:
        """Return a chunk's file; ValueError if it would unpack to more bytes than allowed."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(file, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            head = os.pread(descriptor, ZSTD_HEADER, 0)
            compressed = any(codec["name"] == "zstd" for codec in self._compression)
            num_unpacked = unpacked_bytes(head) if compressed else 0
            if num_unpacked is None:
                raise ValueError("does not record its size")
            if (size := max(status.st_size, num_unpacked)) > self._max_bytes:
                raise ValueError(f"holds {size} bytes, at most {self._max_bytes} are allowed")
            return os.pread(descriptor, status.st_size, 0)
        finally:
            os.close(descriptor)


def _without_crc(data: bytes) -> bytes:
    if not intact(data, len(data) - 4):
        raise ValueError("fails its crc32c")
    return data[:-4]
