"""A digest of a whole file, inside the file: a reader finds every byte that has changed.

The digest is the sha256 of the file in which its own 64 hex digits are zeros. They follow the mark
`distinit-sha256` at a place where each format allows other text: in the metadata of safetensors, in
the comment that ends a zip archive (which a checkpoint of torch is), in the user block before the
first byte of HDF5. Any other reader of these formats passes over them.

Free of torch.
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
USER_BLOCK = 512  # bytes; the smallest that HDF5 has
_LINE = f"{KEY}: ".encode()
_IN_JSON = f'"{KEY}":"'.encode()
_LONGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP, _ZIP_END, _ZIP_TAIL = b"PK\3\4", b"PK\5\6", 22
_BLOCK = 2**20
# Bytes of a file that is not read again where its size and times are what they were.
_LARGE = 2**24


def comment() -> bytes:
    """Return the text that a format without keys carries, before it is sealed."""
    return _LINE + BLANK.encode()


def add_comment(archive: IO[bytes]) -> None:
    """Give a zip archive the comment that `seal` fills. It must have none."""
    archive.seek(-_ZIP_TAIL, os.SEEK_END)
    if archive.read(4) != _ZIP_END:
        raise ValueError("no zip archive, or one with a comment")
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(comment())) + comment())


def seal(file: IO[bytes]) -> None:
    """Write the digest of an open file into it. It must have a place for it."""
    at = _place(file)
    if at is None:
        raise ValueError("no place for a digest")
    digest = _sha256(file, at)
    file.seek(at)
    file.write(digest.encode())


def check_seal(path: str | os.PathLike[str], error: type[DistInitError]) -> bool:
    """Compare a file with the digest in it; return False where it has none, as in version 0.1.

    A large file is read once for each of its states in this process.

    Raises:
        error: The file differs from its digest, or cannot be read. The message begins with the
            path.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{os.fspath(path)}: is no regular file")
        found = (_remembered if status.st_size >= _LARGE else _check)(
            os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns
        )
    except OSError as problem:
        raise error(f"{os.fspath(path)}: {problem.strerror or problem}") from None
    if found is False:
        raise error(
            f"{os.fspath(path)}: damaged: its bytes are not those that were written (their sha256 differs)"
        )
    return found is True


@contextmanager
def open_checked(path: str | os.PathLike[str], framework: str) -> Iterator[Any]:
    """Open a safetensors file as `safe_open` does.

    Args:
        path: The file.
        framework: "pt" or "np", the kind of its tensors.

    Raises:
        CheckpointError: Another file, or a damaged one; also where reading it fails while it is
            open.
    """
    sealed = check_seal(path, CheckpointError)
    try:
        with safe_open(path, framework=framework) as file:
            if not sealed and "distinit" in (file.metadata() or {}):
                log.warning(
                    "%s: written by distinit 0.1, without a digest: damage cannot be found", path
                )
            yield file
    except DistInitError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged ({error})") from None


def sha256_of(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Return the sha256 of a file's first `size` bytes (default: all), in hex. OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        _feed(digest, file, os.fstat(file.fileno()).st_size if size is None else size)
        return digest.hexdigest()


def _check(path: str, *state: int) -> bool | None:
    """Return whether a file has the digest that it records; None if it records none."""
    with open(path, "rb") as file:
        at = _place(file)
        if at is None:
            return None
        file.seek(at)
        return file.read(len(BLANK)) == _sha256(file, at).encode()


_remembered = lru_cache(maxsize=4096)(_check)


def _place(file: IO[bytes] | BinaryIO) -> int | None:
    """Return where the digits of a file's digest begin.

    Known in HDF5 and zip by the room that was made for it as well, so that a mark with a flipped
    bit is found.
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
    # A quotation mark within a value is escaped in JSON, so that no value looks like the key.
    found = re.search(re.escape(_IN_JSON) + rb'(?=.{64}")', file.read(length), re.DOTALL)
    return 8 + found.end() if found else None


def _sha256(file: IO[bytes], at: int) -> str:
    """Return the digest of the whole file, with zeros for the digits at `at`."""
    digest = hashlib.sha256()
    file.seek(0)
    _feed(digest, file, at)
    digest.update(BLANK.encode())
    size = file.seek(0, os.SEEK_END)
    file.seek(at + len(BLANK))
    _feed(digest, file, size - at - len(BLANK))
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, file: IO[bytes], size: int) -> None:
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
