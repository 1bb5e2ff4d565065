"""Store a digest of a whole file inside the file, so that readers detect every changed byte.

The digest is the sha256 of the file with zeros in place of its own 64 hex digits. They follow the
mark `distinit-sha256` where the format allows other text: in the metadata of safetensors, in the
comment at the end of a zip archive (such as a checkpoint of torch), in the user block before the
first byte of HDF5. Other readers of these formats ignore them.

This module does not import torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, DistInitError

log = logging.getLogger(__name__)

KEY = "distinit-sha256"
"""The metadata key of safetensors, whose value `seal` replaces."""
BLANK = "0" * 64
USER_BLOCK = 512  # bytes; the minimum of HDF5
_LINE = f"{KEY}: ".encode()
_IN_JSON = f'"{KEY}":"'.encode()
_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP, _ZIP_END, _ZIP_TAIL = b"PK\3\4", b"PK\5\6", 22
_BLOCK = 2**20
# A file of this many bytes or more is read again only if its size or times have changed.
_LARGE = 2**24


def comment() -> bytes:
    """Return the mark and the zeros of a format without keys, which `seal` fills."""
    return _LINE + BLANK.encode()


def add_comment(archive: IO[bytes]) -> None:
    """Add the comment that `seal` fills to a zip archive, which must have none."""
    archive.seek(-_ZIP_TAIL, os.SEEK_END)
    if archive.read(4) != _ZIP_END:
        raise ValueError("no zip archive, or one with a comment")
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(comment())) + comment())


def seal(file: IO[bytes]) -> None:
    """Write the digest of an open file into the space that the file reserves for it."""
    offset = _digest_offset(file)
    if offset is None:
        raise ValueError("no space for a digest")
    digest = _sha256(file, offset)
    file.seek(offset)
    file.write(digest.encode())


def check_seal(path: str | os.PathLike[str], error: type[DistInitError]) -> bool:
    """Compare a file with its digest; return False if it has none, as in version 0.1.

    A process reads a large file again only if the file has changed.

    Raises:
        error: The file differs from its digest, or cannot be read. The message begins with the
            path.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{os.fspath(path)}: not a regular file")
        intact = (_is_intact_cached if status.st_size >= _LARGE else _is_intact)(
            os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns
        )
    except OSError as problem:
        raise error(f"{os.fspath(path)}: {problem.strerror or problem}") from None
    if intact is False:
        raise error(f"{os.fspath(path)}: damaged: its sha256 is not the one that was written")
    return intact is True


@contextmanager
def open_checked(path: str | os.PathLike[str], framework: str) -> Iterator[Any]:
    """Open a safetensors file with `safe_open`, after a check of its digest.

    Args:
        path: The file.
        framework: "pt" or "np", the library of the tensors.

    Raises:
        CheckpointError: The file has another format, is damaged, or cannot be read, also within
            the block.
    """
    sealed = check_seal(path, CheckpointError)
    try:
        with safe_open(path, framework=framework) as file:
            if not sealed and "distinit" in (file.metadata() or {}):
                log.warning(
                    "%s: written by distinit 0.1, without a digest: damage cannot be detected", path
                )
            yield file
    except DistInitError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged ({error})") from None


def sha256_of(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Return the sha256 of a file's first `size` bytes (default: all), in hex."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        _feed(digest, file, os.fstat(file.fileno()).st_size if size is None else size)
        return digest.hexdigest()


def _is_intact(path: str, *state: int) -> bool | None:
    """Return whether a file has the digest that it records, None if it records none.

    The state (inode, size, time) is a key of the cache.
    """
    with open(path, "rb") as file:
        offset = _digest_offset(file)
        if offset is None:
            return None
        file.seek(offset)
        return file.read(len(BLANK)) == _sha256(file, offset).encode()


_is_intact_cached = lru_cache(maxsize=4096)(_is_intact)


def _digest_offset(file: IO[bytes] | BinaryIO) -> int | None:
    """Return the offset of the digits of a file's digest, None for a file without one.

    In HDF5 and zip the space reserved for the digest is enough, so that a flipped bit in the mark
    is detected as well.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(USER_BLOCK + len(_HDF5))
    if head.startswith(_LINE) or head[USER_BLOCK:] == _HDF5:
        return len(_LINE)
    if head.startswith(_ZIP):
        file.seek(max(0, size - len(comment()) - _ZIP_TAIL))
        tail = file.read()
        return (
            size - len(BLANK)
            if _LINE in tail[-len(comment()) :] or tail.startswith(_ZIP_END)
            else None
        )
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > _LONGEST_HEADER:
        return None
    file.seek(8)
    # JSON escapes a quotation mark within a value, so that no value can be taken for the key.
    match = re.search(re.escape(_IN_JSON) + rb'(?=.{64}")', file.read(length), re.DOTALL)
    return 8 + match.end() if match else None


def _sha256(file: IO[bytes], offset: int) -> str:
    """Return the digest of the whole file, with zeros for the digits at `offset`."""
    digest = hashlib.sha256()
    file.seek(0)
    _feed(digest, file, offset)
    digest.update(BLANK.encode())
    size = file.seek(0, os.SEEK_END)
    file.seek(offset + len(BLANK))
    _feed(digest, file, size - offset - len(BLANK))
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, file: IO[bytes], size: int) -> None:
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
