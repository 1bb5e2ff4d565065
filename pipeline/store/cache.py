"""The folder that keeps what was read from stores behind URLs.

    CACHE/stores/<place>-<store id>/tables/<digest of plans>/<array>/…
        columns of the tables, as these plans name them
    CACHE/stores/<place>-<store id>/shards/<2 digits>/<digest>
        a shard file whose digest was checked
    CACHE/stores/<place>-<store id>/shards/<2 digits>/<digest>.part
        one of which ranges are still missing; sparse

<place> is the digest of the store's URL. So a store gives rows only to itself, whatever digests
another one claims. A name that a store gives becomes the name of a file only in the form that
docs/store-format.md defines, and no link in the cache is followed.
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


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Return `given`, else $DISTINIT_CACHE, else `distinit` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.fspath(given) if given is not None else os.environ.get("DISTINIT_CACHE")
    if not chosen:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "distinit")
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def require_name(path: str, store: str) -> str:
    """Return the path of a file in a store.

    Raises:
        StoreError: A name that the store recorded leads out of it.
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
    """What is kept of one store. `place` and `store_id`: digests of its URL and its own."""

    def __init__(self, root: Path, place: str, store_id: str) -> None:
        self.root, self.home = root, f"stores/{place}-{store_id}"

    def table(self, state: str, path: str) -> Path:
        """Return where a column of a table is kept, whether it exists or not."""
        *folders, name = path.split("/")
        return self._folder("tables", state, *folders) / name

    def keep_table(self, folder: Path, files: Mapping[str, bytes]) -> Path:
        """Write the files of a column into a new folder next to `folder`, for `publish`."""
        fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            for name, data in files.items():
                file = fresh / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        except OSError as error:
            self.remove(fresh)
            raise self.error(error) from error
        return fresh

    def remove(self, folder: Path) -> None:
        """Remove a column that is not to be kept."""
        shutil.rmtree(folder, ignore_errors=True)

    def publish(self, fresh: Path, state: str, path: str, files: Iterable[str]) -> None:
        """Give a column its name.

        If it exists already, by this or another process, it gets these files.
        """
        try:
            os.rename(fresh, self.table(state, path))
        except OSError:
            for name in files:
                *inner, last = name.split("/")
                folder = self._folder("tables", state, *path.split("/"), *inner)
                try:
                    os.replace(fresh / name, folder / last)
                except OSError as error:
                    raise self.error(error) from error
        finally:
            self.remove(fresh)

    def open_shard(self, digest: str, size: int) -> int:
        """Return a descriptor of the shard file of this digest.

        The file has holes where nothing was read yet.
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
        """Write bytes into a shard file; a full disk ends the caching, not the reading."""
        try:
            os.pwrite(fd, data, offset)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self.error(error) from error
            warnings.warn(
                f"{self.root}: the disk is full, targets are fetched without being kept",
                stacklevel=2,
            )

    def name_whole(self, digest: str) -> None:
        """Give a shard file whose digest was checked its name."""
        file = self._folder("shards", digest[:2]) / digest
        with suppress(FileNotFoundError):  # another process was faster, or it has the name already
            os.replace(f"{file}.part", file)

    def error(self, error: OSError) -> StoreError:
        """Return what to raise where the cache cannot be used."""
        why = error.strerror or error
        return StoreError(
            f"{self.root}: the cache cannot be written ({why}); DISTINIT_CACHE names another folder"
        )

    def _folder(self, *names: str) -> Path:
        """Return a folder in the cache, made if need be; none is reached through a link."""
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
    except OSError:  # a file system that cannot report it
        return False


def digest_file(fd: int, size: int) -> str:
    """Return the digest, as in commits, of a file of `size` bytes."""
    state = hashlib.blake2b(digest_size=16)
    for at in range(0, size, PIECE):
        state.update(os.pread(fd, PIECE, at))
    return state.hexdigest()
