"""Where the files of a store are: a folder is read in place, a URL through `remote.py`.

Every file of a store has a name that follows from its nodes (docs/store-format.md), so nothing here
lists a folder: many HTTP servers cannot.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import StoreError, in_one_line
from ..common.urls import is_url, local_path
from .columns import Column
from .digests import check_document
from .shards import ShardedRows
from .validation import check_array

Record = Callable[[str, int], Mapping[str, Any] | None]
"""(array path, shard) → size and digest of the shard's file as committed, None if it has none."""


class StoreFiles(ABC):
    """Read access to the files of one store, picklable and fork-safe.

    `name` is its name in messages.
    """

    name: str
    sealed = False
    """Whether every node and array metadata file of the store has a digest; known when its root was
    read."""

    @property
    def address(self) -> str:
        """Return what opens the same store again.

        It is a URL with the password that `name` lacks, and must not be written to files or
        messages.
        """
        return self.name

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the whole file; FileNotFoundError or, if it is unreadable, StoreError."""

    @abstractmethod
    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Those of the files that exist, by path, in the order asked for."""

    def pin(self, store_id: str, plans: Sequence[Mapping[str, Any]]) -> None:
        """Set which state of the tables is meant from now on, for those that cache."""
        return

    @abstractmethod
    def table(self, path: str) -> Column:
        """Open an unsharded array for reading; StoreError if that fails."""

    def forget(self, path: str) -> bool:
        """Drop an unsharded array from the cache.

        Returns whether `table` may return other values now.
        """
        return False

    @abstractmethod
    def rows(self, path: str, record: Record) -> ShardedRows:
        """Return a sharded array; `record` returns what the commits record of its files."""


class LocalFiles(StoreFiles):
    """A store in a folder of a mounted file system. Only `root` itself may be a link."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)
        self._folders: set[str] = {""}
        """Folders of the store that were found to be no links."""
        self._tables: set[str] = set()
        """Tables in whose folders there is none."""

    def read(self, path: str) -> bytes:
        """Return the whole file; FileNotFoundError if there is none."""
        descriptor = self.open(path)
        try:
            with open(descriptor, "rb", buffering=0) as file:
                return file.readall()
        except (OSError, MemoryError, OverflowError) as error:
            raise StoreError(
                f"{self.name}/{path}: cannot be read ({in_one_line(error)})"
            ) from error

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Return the contents of those files that exist, by path."""
        contents = {}
        for path in paths:
            try:
                contents[path] = self.read(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
        return contents

    def open(self, path: str) -> int:
        """Return a descriptor of a regular file of the store.

        Every file of a local store is opened here.

        Raises:
            FileNotFoundError: There is no such file.
            StoreError: A name leaves the store, or is a link, a device or a pipe, which would wait
                for ever.
        """
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            inside(self.root, folder)
        where = f"{self.name}/{path}"
        try:
            descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except (OSError, ValueError) as error:
            link = isinstance(error, OSError) and error.errno == errno.ELOOP
            why = (
                "a link, which a store does not have"
                if link
                else f"cannot be read ({in_one_line(error)})"
            )
            raise StoreError(f"{where}: {why}") from error
        if name == ".." or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StoreError(f"{where}: not a regular file")
        if len(self._folders) < 4096 or folder.count("/") < 2:
            self._folders.add(folder)
        return descriptor

    def metadata(self, path: str) -> dict[str, Any]:
        """Return the zarr.json of an array, checked for its digest and form."""
        try:
            text = self.read(f"{path}/zarr.json")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(f"{self.name}/{path}/zarr.json: missing") from error
        return array_metadata(f"{self.name}/{path}/zarr.json", path, text, sealed=self.sealed)

    def table(self, path: str) -> Column:
        """Open an unsharded array for reading."""
        meta = self.metadata(path)
        if path not in self._tables:
            inside(
                self.root,
                path,
                below=not path.startswith(("frames/", "teachers/"))
                or path.endswith(("/class", "/basis", "/mean")),
            )
            self._tables.add(path)
        return Column(self.root / path, f"{self.name}/{path}", meta)

    def rows(self, path: str, record: Record) -> ShardedRows:
        """Return a sharded array, read by `pread` from its files."""
        return _LocalRows(self, path)


class _LocalRows(ShardedRows):
    """Rows of an array in a local folder."""

    def __init__(self, files: LocalFiles, path: str) -> None:
        super().__init__(files.root / path, files.metadata(path))
        self._files, self._place = files, path

    def _open_file(self, shard: int) -> int:
        try:
            return self._files.open(f"{self._place}/{self._key(shard)}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{self._file(shard)}: a committed shard is missing ({error.strerror})"
            ) from error


def array_metadata(where: str, path: str, text: bytes, *, sealed: bool = False) -> dict[str, Any]:
    """Parse the zarr.json of the array `path` of a store.

    sealed: it must have a digest.

    Raises:
        StoreError: Its digest or form is wrong.
    """
    document = check_document(where, text, required=sealed)
    check_array(where, path, document)
    return document


def inside(root: str | os.PathLike[str], path: str, *, below: bool = False) -> Path:
    """Return the path of a file or folder of a local store, which need not exist.

    below: what is in that folder is checked too.

    Raises:
        StoreError: A name leaves the store, or a part of it, or anything below, is a link or
            neither a file nor a folder.
    """
    names = path.split("/")
    if {"", ".", ".."}.intersection(names) or "\0" in path:
        raise StoreError(f"{os.fspath(root)}: {path!r} is no name of a file in a store")
    place = os.fspath(root)
    for name in names:
        place = f"{place}/{name}"
        try:
            mode = os.lstat(place).st_mode
        except (FileNotFoundError, NotADirectoryError):
            break
        except OSError as error:
            raise StoreError(f"{place}: cannot be read ({error.strerror})") from error
        _check_mode(place, mode)
    else:
        if below and stat.S_ISDIR(mode):
            for parent, folders, files in os.walk(place):
                for name in (*folders, *files):
                    _check_mode(f"{parent}/{name}", os.lstat(f"{parent}/{name}").st_mode)
    return Path(root, path)


def _check_mode(place: str, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise StoreError(f"{place}: a link, which a store does not have")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StoreError(f"{place}: neither a file nor a folder")


def store_files(
    where: str | os.PathLike[str] | StoreFiles,
    *,
    cache: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> StoreFiles:
    """Return the files of the store at a path or URL; an existing local path is always a path.

    Args:
        where: A path or URL.
        cache: Folder for what is read from a URL (default: see `cache.cache_folder`).
        storage_options: For the fsspec file system of the URL.

    Raises:
        UsageError: The URL may not be opened.
    """
    if isinstance(where, StoreFiles):
        return where
    text = local_path(os.fspath(where))
    if is_url(text):
        from .cache import cache_folder
        from .remote import RemoteFiles

        return RemoteFiles(text, cache_folder(cache), dict(storage_options or {}))
    return LocalFiles(Path(os.path.abspath(text)))


def absolute(where: str) -> str:
    """Return a store's address that holds in any working folder."""
    return where if is_url(where) else os.path.abspath(local_path(where))
