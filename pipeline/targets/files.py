"""Where the files of a store are. A folder is read in place; any other URL through `remote.py` and its cache.

Every file of a store has a name that follows from its nodes (docs/store-format.md), so nothing here lists a
folder: many HTTP servers cannot.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zarr

from ..errors import StoreError, in_one_line
from .digests import check_document
from .shardfile import ShardedRows
from .urls import is_url, local_path, public_url

Record = Callable[[str, int], Mapping[str, Any] | None]
"""(array path, shard) → size and digest of the shard's file as committed, None if it has none."""


class StoreFiles(ABC):
    """Read access to the files of one store; `name` is what messages call it. Picklable, fork-safe."""

    name: str
    sealed = False
    """Whether every node and array metadata file of the store has a digest; known when its root was read."""

    @property
    def address(self) -> str:
        """What opens the same store again: a URL with the password that `name` lacks, so for no file and no message."""
        return self.name

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole file; FileNotFoundError if there is none, StoreError if it cannot be read."""

    @abstractmethod
    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Those of the files that exist, by path, in the order asked for."""

    def pin(self, store_id: str, plans: Sequence[Mapping[str, Any]]) -> None:
        """Say which state of the tables is meant from now on, for those that keep what they read."""
        return

    @abstractmethod
    def table(self, path: str) -> zarr.Array:
        """An unsharded array, opened for reading. StoreError if it cannot be."""

    def forget(self, path: str) -> bool:
        """Drop what is kept of an unsharded array, and return whether `table` may find other values now."""
        return False

    @abstractmethod
    def rows(self, path: str, record: Record) -> ShardedRows:
        """A sharded array. `record` knows what the commits say of its files."""


class LocalFiles(StoreFiles):
    """A store in a folder of a mounted file system."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def read(self, path: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        return (self.root / path).read_bytes()

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Those of the files that exist, by path."""
        found = {}
        for path in paths:
            try:
                with open(f"{self.name}/{path}", "rb") as file:
                    found[path] = file.read()
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found

    def table(self, path: str) -> zarr.Array:
        """An unsharded array, opened for reading."""
        return open_table(self.root / path, sealed=self.sealed)

    def rows(self, path: str, record: Record) -> ShardedRows:
        """A sharded array, read by `pread` from its files."""
        return ShardedRows(self.root / path, sealed=self.sealed)


def store_files(
    where: str | os.PathLike[str] | StoreFiles,
    *,
    cache: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> StoreFiles:
    """The files of the store at a path or URL; what exists as a local path is one, whatever it is called.

    cache: folder for what is read from a URL (default: see `remote.cache_folder`). storage_options: for the
    fsspec file system of the URL. UsageError for a URL that may not be opened.
    """
    if isinstance(where, StoreFiles):
        return where
    text = local_path(os.fspath(where))
    if is_url(text):
        from .cache import cache_folder
        from .remote import RemoteFiles

        return RemoteFiles(text, cache_folder(cache), dict(storage_options or {}))
    return LocalFiles(Path(os.path.abspath(text)))


def check_local(path: str | os.PathLike[str]) -> None:
    """StoreError if a place to write is a URL, also one that was made a `Path`, which makes `s3:/` of `s3://`."""
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text) and not os.path.exists(text):
        url = public_url(re.sub(":/+", "://", text, count=1))
        raise StoreError(f"{url}: a store is written in a local folder; behind a URL it can only be read")


def absolute(where: str) -> str:
    """A store's address that holds from any working folder."""
    return where if is_url(where) else os.path.abspath(local_path(where))


def open_table(folder: Path, *, sealed: bool = False) -> zarr.Array:
    """The array in a local folder, for reading; StoreError if it is none. sealed: its metadata must have a digest."""
    try:
        check_document(f"{folder}/zarr.json", (folder / "zarr.json").read_bytes(), required=sealed)
        return zarr.open_array(folder, mode="r")
    except StoreError:
        raise
    except Exception as error:  # Metadata that is no array's raises anything in zarr.
        raise StoreError(f"{folder}: unreadable ({in_one_line(error)})") from error
