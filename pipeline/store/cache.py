"""Cache data read from stores behind URLs in a local folder.

    CACHE/stores/<place>-<store id>/tables/<digest of plans>/<array>/…
        columns of the tables, as these plans name them
    CACHE/stores/<place>-<store id>/shards/<2 digits>/<digest>
        a shard file whose digest was checked
    CACHE/stores/<place>-<store id>/shards/<2 digits>/<digest>.part
        a sparse shard file with ranges that are still missing

<place> is the digest of the store's URL, so a store never reads rows that were cached for another
store with the same digests. A name in a store becomes a file name only if it has the form that
docs/store-format.md defines. No link in the cache is followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ..common.errors import StoreError
from .validation import is_digest

NAME = re.compile(r"(?!\.+(/|$))[A-Za-z0-9._-]+(/(?!\.+(/|$))[A-Za-z0-9._-]+)*")
PIECE = 1 << 20


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return `folder`, else $DISTINIT_CACHE, else `distinit` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.fspath(folder) if folder is not None else os.environ.get("DISTINIT_CACHE")
    if not chosen:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "distinit")
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def require_name(path: str, store: str) -> str:
    """Return the path of a file in a store, checked.

    Raises:
        StoreError: The path leads out of the store.
    """
    if not NAME.fullmatch(path):
        raise StoreError(f"{store}: {path[:200]!r} is not the name of a file of a store")
    return path


def require_digest(text: object, store: str) -> str:
    """Return a digest or a store's id; StoreError if it is not 32 hexadecimal digits."""
    if not is_digest(text):
        raise StoreError(
            f"{store}: {str(text)[:200]!r} is not a digest, which has 32 hexadecimal digits"
        )
    return text


class StoreCache:
    """Cached files of one store. place: digest of its URL. store_id: its id."""

    def __init__(self, root: Path, place: str, store_id: str) -> None:
        self.root, self.home = root, f"stores/{place}-{store_id}"

    def table(self, state: str, path: str) -> Path:
        """Return the folder of a column of a table, which need not exist."""
        *folders, name = path.split("/")
        return self._folder("tables", state, *folders) / name

    def keep_table(self, folder: Path, files: Mapping[str, bytes]) -> Path:
        """Write the files of a column into a new folder next to `folder`, for `publish`."""
        new_folder = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            for name, data in files.items():
                file = new_folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        except OSError as error:
            self.remove(new_folder)
            raise self.error(error) from error
        return new_folder

    def remove(self, folder: Path) -> None:
        """Remove a column from the cache."""
        shutil.rmtree(folder, ignore_errors=True)

    def publish(self, new_folder: Path, state: str, path: str, files: Iterable[str]) -> None:
        """Rename a column to its final name.

        If this or another process has made the column already, it gets these files instead.
        """
        try:
            os.rename(new_folder, self.table(state, path))
        except OSError:
            for name in files:
                *inner, last = name.split("/")
                folder = self._folder("tables", state, *path.split("/"), *inner)
                try:
                    os.replace(new_folder / name, folder / last)
                except OSError as error:
                    raise self.error(error) from error
        finally:
            self.remove(new_folder)

    def open_shard(self, digest: str, size: int) -> int:
        """Return a descriptor of the shard file of this digest.

        The file has holes for ranges that have not been read yet.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        file = self._folder("shards", digest[:2]) / digest
        try:
            try:
                fd = os.open(file, flags)
            except FileNotFoundError:
                fd = os.open(f"{file}.part", flags | os.O_CREAT, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "not a plain file", str(file))
                if os.fstat(fd).st_size != size:
                    os.ftruncate(fd, size)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise self.error(error) from error
        return fd

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write bytes into a shard file; if the disk is full, only warn."""
        try:
            os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self.error(error) from error
            warnings.warn(
                f"{self.root}: the disk is full, targets are fetched but not cached",
                stacklevel=2,
            )

    def name_whole(self, digest: str) -> None:
        """Rename a shard file whose digest was checked to its final name."""
        file = self._folder("shards", digest[:2]) / digest
        # Another process may have renamed it already.
        with suppress(FileNotFoundError):
            os.replace(f"{file}.part", file)

    def error(self, error: OSError) -> StoreError:
        """Return the exception for a cache that cannot be written."""
        reason = error.strerror or error
        return StoreError(
            f"{self.root}: the cache cannot be written ({reason}); DISTINIT_CACHE names another folder"
        )

    def _folder(self, *names: str) -> Path:
        """Return a folder in the cache, created if needed; no link is followed."""
        folder = self.root
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (*self.home.split("/"), *names):
                folder /= name
                with suppress(FileExistsError):
                    folder.mkdir()
                if not stat.S_ISDIR(os.lstat(folder).st_mode):
                    raise OSError(errno.ENOTDIR, f"{folder} is a link or a file, expected a folder")
        except OSError as error:
            raise self.error(error) from error
        return folder


def has_holes(fd: int, size: int) -> bool:
    """Return whether a file has ranges that were never written."""
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE) < size
    # Some file systems cannot report holes.
    except OSError:
        return False


def digest_file(fd: int, size: int) -> str:
    """Return the digest of a file of `size` bytes, as commits record it."""
    digest = hashlib.blake2b(digest_size=16)
    for offset in range(0, size, PIECE):
        digest.update(os.pread(fd, PIECE, offset))
    return digest.hexdigest()
