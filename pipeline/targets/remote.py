"""Read a store from any URL that fsspec opens, keeping locally what was read.

    CACHE/tables/<store id>-<digest>/…   columns of the tables as the plans so far, of this digest, speak of them
    CACHE/shards/<digest>                shard files, under the digest of their commit; sparse

A shard file in the cache has its full length from the start, as a hole, and is filled with what is asked for. No
list of what is there is kept: every chunk and every index ends with its own crc32c, which a hole does not satisfy.
So processes share the cache without locks, a kill leaves nothing wrong behind, and a warm row costs what it costs
in a local store. Files are named by content: no store can be given the rows of another.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zarr

from ..errors import StoreError
from .digests import digest_bytes
from .files import Record, StoreFiles, open_table
from .shardfile import ShardedRows

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

WHOLE = 4 << 20  # files up to this many bytes are fetched in one request
BLOCK = 256 << 10  # of larger ones, aligned blocks: neighbours of a row are rows of the same video
PARALLEL = 32  # requests at a time where the file system takes several
WAITS_S = (0.5, 2.0, 8.0)  # before a failed request is made again


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """`given`, else $DISTINIT_CACHE, else `distinit` in $XDG_CACHE_HOME or ~/.cache."""
    chosen = os.fspath(given) if given is not None else os.environ.get("DISTINIT_CACHE")
    if not chosen:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "distinit")
    return Path(os.path.abspath(os.path.expanduser(chosen)))


class RemoteFiles(StoreFiles):
    """A store under a URL. Raises StoreError for a protocol that fsspec does not know or cannot load."""

    def __init__(self, url: str, cache: Path, options: Mapping[str, Any]) -> None:
        self.name, self.cache, self.options = url.rstrip("/"), cache, dict(options)
        self._snapshot = ""
        self._connection: tuple[int, AbstractFileSystem, str] | None = None
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def pin(self, store_id: str, plans: Sequence[Mapping[str, Any]]) -> None:
        """Say which state of the tables is meant: rows of which these plans speak do not change.

        By what the plans say, not by their number: two copies of a store may have grown differently.
        """
        self._snapshot = f"{store_id}-{digest_bytes(json.dumps(plans, sort_keys=True).encode())}"

    def read(self, path: str) -> bytes:
        """The whole file; FileNotFoundError if there is none."""
        return self._get(path)

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Those of the files that exist, by path; asked for in parallel where the file system can."""
        paths = list(paths)
        filesystem, _ = self._connect()
        if not getattr(filesystem, "async_impl", False) or len(paths) < 2:
            answers = [self._get_if_there(p) for p in paths]
        else:
            with ThreadPoolExecutor(PARALLEL) as pool:
                answers = list(pool.map(self._get_if_there, paths))
        return {p: data for p, data in zip(paths, answers, strict=True) if data is not None}

    def table(self, path: str) -> zarr.Array:
        """A column of a table, fetched whole on first use."""
        folder = self.cache / "tables" / self._snapshot / path
        if not folder.exists():
            self._fetch_table(path, folder)
        return open_table(folder)

    def rows(self, path: str, record: Record) -> ShardedRows:
        """A sharded array behind the cache."""
        return _CachedRows(self, path, record)

    def range(self, path: str, start: int, stop: int, size: int) -> tuple[int, bytes]:
        """Bytes [start, stop) of a file of `size` bytes, and where they begin in it.

        A server that knows no ranges sends the whole file, which then is what comes back.
        """
        whole = start == 0 and stop == size
        data = self._get(path) if whole else self._get(path, start, stop)
        if not whole and len(data) == stop - start:
            return start, data
        if len(data) != size:
            raise StoreError(f"{self.name}/{path}: has {len(data)} bytes, committed were {size}")
        return 0, data

    # -- details -------------------------------------------------------------------------------------

    def _connect(self) -> tuple[AbstractFileSystem, str]:
        """The file system and the store's path in it; a forked process makes its own."""
        if self._connection is None or self._connection[0] != os.getpid():
            import fsspec

            try:
                filesystem, base = fsspec.core.url_to_fs(self.name, **self.options)
            except ImportError as error:
                raise StoreError(f'{self.name}: {error}; pip install "distinit[remote]" serves http') from error
            except Exception as error:  # every file system has errors of its own
                raise StoreError(f"{self.name}: cannot be opened ({_short(error)})") from error
            self._connection = (os.getpid(), filesystem, base.rstrip("/"))
        return self._connection[1:]

    def _get(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        filesystem, base = self._connect()
        waits = iter(WAITS_S)
        while True:
            try:
                return bytes(filesystem.cat_file(f"{base}/{path}", start=start, end=stop))
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(errno.ENOENT, "no such file", f"{self.name}/{path}") from error
            except Exception as error:  # every file system has errors of its own
                wait = None if _refused(error) else next(waits, None)
                if wait is None:
                    raise StoreError(f"{self.name}/{path}: cannot be read ({_short(error)})") from error
                time.sleep(wait)

    def _get_if_there(self, path: str) -> bytes | None:
        try:
            return self._get(path)
        except FileNotFoundError:
            return None

    def _fetch_table(self, path: str, folder: Path) -> None:
        try:
            text = self.read(f"{path}/zarr.json")
            meta = json.loads(text)
            shape, chunks = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
        except (FileNotFoundError, ValueError, KeyError) as error:
            raise StoreError(f"{self.name}/{path}: unreadable ({error})") from error
        last = "/0" * (len(shape) - 1)
        names = [f"{path}/c/{i}{last}" for i in range(-(-shape[0] // chunks[0]))]
        # A chunk without a file is fill.
        found = {"zarr.json": text} | {
            name.removeprefix(f"{path}/"): data for name, data in self.read_many(names).items()
        }
        fresh = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            for name, data in found.items():
                file = fresh / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            os.rename(fresh, folder)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if not folder.exists():  # else another process was faster
                raise _cache_error(self.cache, error) from error


class _CachedRows(ShardedRows):
    """Rows of a remote array: read from the cache's sparse files, fetched where those have holes."""

    def __init__(self, files: RemoteFiles, path: str, record: Record) -> None:
        try:
            meta = files.read(f"{path}/zarr.json")
        except FileNotFoundError as error:
            raise StoreError(f"{files.name}/{path}: missing") from error
        super().__init__(f"{files.name}/{path}", meta)
        self._files, self._path, self._record = files, path, record

    def _open_file(self, shard: int) -> int:
        size, digest = self._committed(shard)
        file = self._files.cache / "shards" / digest[:2] / digest
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise _cache_error(self._files.cache, error) from error
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
        return fd

    def _again(self, shard: int, fd: int, start: int, length: int) -> bytes:
        size, digest = self._committed(shard)
        low = start // BLOCK * BLOCK
        high = min(size, -(-(start + length) // BLOCK) * BLOCK)
        if size <= WHOLE:
            low, high = 0, size
        at, data = self._range(self._name(shard), low, high, size)
        if len(data) == size and digest_bytes(data) != digest:
            raise StoreError(f"{self._files.name}/{self._name(shard)}: differs from what was committed (digest)")
        _write(fd, data, at, self._files.cache)
        return data[start - at : start - at + length]

    def _range(self, name: str, start: int, stop: int, size: int) -> tuple[int, bytes]:
        try:
            return self._files.range(name, start, stop, size)
        except FileNotFoundError as error:
            raise StoreError(f"{self._files.name}/{name}: a committed shard is missing") from error

    def _committed(self, shard: int) -> tuple[int, str]:
        record = self._record(self._path, shard)
        if record is None:
            raise StoreError(f"{self._files.name}/{self._name(shard)}: not committed")
        return int(record["size"]), str(record["blake2b"])

    def _name(self, shard: int) -> str:
        return f"{self._path}/{self._key(shard)}"


def _write(fd: int, data: bytes, offset: int, cache: Path) -> None:
    """Put bytes into a cached file. A cache that is full is no reason to stop: reading goes on without it."""
    try:
        os.pwrite(fd, data, offset)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise _cache_error(cache, error) from error
        warnings.warn(f"{cache}: the disk is full, targets are fetched without being kept", stacklevel=2)


def _cache_error(cache: Path, error: OSError) -> StoreError:
    return StoreError(f"{cache}: the cache cannot be written ({error.strerror}); DISTINIT_CACHE names another folder")


def _refused(error: Exception) -> bool:
    """Whether asking again is of no use: no permission, or a client error of HTTP."""
    status = getattr(error, "status", None)
    client_error = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return client_error or isinstance(error, PermissionError)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
