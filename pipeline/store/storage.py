"""Read the files of a store: from a folder, or from a URL through `remote.py`.

The name of every file of a store follows from its nodes (docs/store-format.md). No folder is listed
here, because many HTTP servers cannot do that.
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
"""(array path, shard) → committed size and digest of the shard's file, None without a file."""


class StoreFiles(ABC):
    """Read access to the files of one store, picklable and fork-safe.

    `name` is its name in messages.
    """

    name: str
    sealed = False
    """Whether every node and array metadata file of the store has a digest; set when its root is
    read."""

    @property
    def address(self) -> str:
        """Path or URL that opens the same store again.

        A URL includes the password that `name` omits, and must not be written to files or messages.
        """
        return self.name

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: The file does not exist.
            StoreError: It cannot be read.
        """

    @abstractmethod
    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Return the contents of the files that exist, by path, in the requested order."""

    def pin(self, store_id: str, plans: Sequence[Mapping[str, Any]]) -> None:
        """Set the state of the tables to read from now on; only caching subclasses need it."""
        return

    @abstractmethod
    def table(self, path: str) -> Column:
        """Open an unsharded array for reading; StoreError if that fails."""

    def forget(self, path: str) -> bool:
        """Drop an unsharded array from the cache; return whether it may now be read differently."""
        return False

    @abstractmethod
    def rows(self, path: str, record: Record) -> ShardedRows:
        """Return a sharded array; `record` returns what the commits record of its files."""


class LocalFiles(StoreFiles):
    """A store in a folder of a mounted file system. Only `root` itself may be a link."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)
        self._folders: set[str] = {""}
        """Folders of the store that were checked and are not links."""
        self._tables: set[str] = set()
        """Tables whose folders were checked and contain no links."""

    def read(self, path: str) -> bytes:
        """Return the content of a file; FileNotFoundError if it does not exist."""
        descriptor = self.open(path)
        try:
            with open(descriptor, "rb", buffering=0) as file:
                return file.readall()
        except (OSError, MemoryError, OverflowError) as error:
            raise StoreError(
                f"{self.name}/{path}: cannot be read ({in_one_line(error)})"
            ) from error

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Return the contents of the files that exist, by path."""
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
            FileNotFoundError: The file does not exist.
            StoreError: The path leaves the store, or is a link, a device or a pipe. Reading a pipe
                would block for ever.
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
            reason = (
                "a link, which a store does not have"
                if link
                else f"cannot be read ({in_one_line(error)})"
            )
            raise StoreError(f"{where}: {reason}") from error
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
        self._files, self._array_path = files, path

    def _open_file(self, shard: int) -> int:
        try:
            return self._files.open(f"{self._array_path}/{self._key(shard)}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"{self._file(shard)}: a committed shard is missing ({error.strerror})"
            ) from error


def array_metadata(where: str, path: str, text: bytes, *, sealed: bool = False) -> dict[str, Any]:
    """Parse the zarr.json of the array `path` of a store.

    sealed: whether it must have a digest.

    Raises:
        StoreError: Its digest or form is wrong.
    """
    document = check_document(where, text, required=sealed)
    check_array(where, path, document)
    return document


def inside(root: str | os.PathLike[str], path: str, *, below: bool = False) -> Path:
    """Return the checked path of a file or folder of a local store; it need not exist.

    below: whether the content of that folder is checked too.

    Raises:
        StoreError: The path leaves the store; or a part of it, or an entry below it, is a link or
            neither a file nor a folder.
    """
    names = path.split("/")
    if {"", ".", ".."}.intersection(names) or "\0" in path:
        raise StoreError(f"{os.fspath(root)}: {path!r} is not a valid name of a file in a store")
    current = os.fspath(root)
    for name in names:
        current = f"{current}/{name}"
        try:
            mode = os.lstat(current).st_mode
        except (FileNotFoundError, NotADirectoryError):
            break
        except OSError as error:
            raise StoreError(f"{current}: cannot be read ({error.strerror})") from error
        _check_mode(current, mode)
    else:
        if below and stat.S_ISDIR(mode):
            for parent, folders, files in os.walk(current):
                for name in (*folders, *files):
                    _check_mode(f"{parent}/{name}", os.lstat(f"{parent}/{name}").st_mode)
    return Path(root, path)


def _check_mode(path: str, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise StoreError(f"{path}: a link, which a store does not have")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StoreError(f"{path}: neither a file nor a folder")


def store_files(
    where: str | os.PathLike[str] | StoreFiles,
    *,
    cache: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> StoreFiles:
    """Return the files of the store at a path or URL; an existing local path is always a path.

    Args:
        where: A path or URL.
        cache: Folder that caches data read from a URL (default: see `cache.cache_folder`).
        storage_options: Options of the fsspec file system of the URL.

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
    """Return a store's address that is valid in any working folder."""
    return where if is_url(where) else os.path.abspath(local_path(where))
