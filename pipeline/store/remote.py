"""Read a store behind a URL, keeping locally what was read (`cache.py`).

A shard file in the cache has its full length from the start, as a hole, and is filled with what is
asked for. No list of what is there is kept: every chunk and every index ends with its own crc32c,
which a hole does not satisfy. So processes share the cache without locks, a kill leaves nothing
wrong behind, and a warm row costs what it costs in a local store. A file that has no hole left is
compared with the digest of its commit.

What a server sends is data of a third party: names and sizes are checked before they are used, and
no answer is read beyond what the file can have.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import StoreError, first_line, in_one_line
from ..common.urls import canonical_url, check_url, hide_secrets, public_url
from .cache import StoreCache, digest_file, has_holes, require_digest, require_name
from .columns import Column
from .digests import (
    Ranges,
    check_document,
    checked_rows,
    digest_bytes,
    num_planned,
    ranges_of,
    split_ranges,
)
from .shards import ShardedRows, chunk_crcs_hold
from .storage import Record, StoreFiles, array_metadata
from .validation import largest_chunk
from .web import STALL_S, TOTAL_S, AnswerError, WebReader

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

WHOLE = 4 << 20  # files up to this many bytes are fetched in one request
BLOCK = 256 << 10  # of larger ones, aligned blocks: neighbours of a row are rows of the same video
LARGEST = 64 << 20  # bytes of a node, or of a file of a table
CHUNKS = 1 << 14  # of a column: of 16,384 rows each, 268 million videos
PARALLEL = 32  # requests at a time where the file system takes several
WAITS_S = (0.5, 2.0)  # before a failed request is made again

# Columns that have no row of fill, so that a chunk without a file is lost.
WITHOUT_FILL = ("videos/path", "videos/corpus", "segments/video", "segments/shard")


class RemoteFiles(StoreFiles):
    """A store under a URL. `name` is the URL without what is secret in it.

    Raises:
        UsageError: The URL is none of those that may be opened (`urls.check_url`).
        StoreError: The package for its protocol is not installed.
    """

    def __init__(self, url: str, cache: Path, options: Mapping[str, Any]) -> None:
        check_url(url)
        self.name, self.url = public_url(url).rstrip("/"), url
        self._root, self._options = cache, dict(options)
        self._cache: StoreCache | None = None
        self._state, self._planned, self._ranges = "", dict[str, int](), Ranges()
        self._asked_again: set[str] = set()
        self._connection: tuple[int, AbstractFileSystem, str | WebReader] | None = None
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def pin(self, store_id: str, plans: Sequence[Mapping[str, Any]]) -> None:
        """Say which state of the tables is meant: rows of which these plans speak do not change.

        By what the plans say, not by their number: two copies of a store may have grown
        differently.
        """
        filesystem, _ = self._connect()
        endpoint = getattr(filesystem, "endpoint_url", None) or getattr(
            filesystem, "endpoint", None
        )
        place = f"{canonical_url(self.url)} {endpoint or ''}"
        self._cache = StoreCache(
            self._root, digest_bytes(place.encode()), require_digest(store_id, self.name)
        )
        self._state = digest_bytes(json.dumps(plans, sort_keys=True).encode())
        self._planned = {key: num_planned(plans, key) for key in ("videos", "segments")}
        self._ranges = ranges_of(plans)

    @property
    def address(self) -> str:
        """The URL as it was given."""
        return self.url

    @property
    def cache(self) -> StoreCache:
        """What is kept of this store, known once it is known which one it is."""
        if self._cache is None:
            raise StoreError(f"{self.name}: its plans are not read yet")
        return self._cache

    def read(self, path: str) -> bytes:
        """Return the whole file, a node; FileNotFoundError if there is none."""
        return self._get(path, limit=LARGEST)

    def read_many(self, paths: Iterable[str], limit: int | None = None) -> dict[str, bytes]:
        """Return those of the files that exist, by path, fetched in parallel if possible."""
        paths = list(paths)
        filesystem, _ = self._connect()

        def get(path: str) -> bytes | None:
            try:
                return self._get(path, limit=limit or LARGEST)
            except FileNotFoundError:
                return None

        if not getattr(filesystem, "async_impl", False) or len(paths) < 2:
            answers = [get(p) for p in paths]
        else:
            with ThreadPoolExecutor(PARALLEL) as pool:
                answers = list(pool.map(get, paths))
        return {p: data for p, data in zip(paths, answers, strict=True) if data is not None}

    def table(self, path: str) -> Column:
        """Return a column of a table, fetched whole on first use."""
        folder = self.cache.table(self._state, require_name(path, self.name))
        if (
            folder.is_symlink()
            or not (folder / "zarr.json").is_file()
            or self._may_have_grown(path, folder)
        ):
            self._fetch_table(path, folder)
        where = f"{self.name}/{path}"
        text = (folder / "zarr.json").read_bytes()
        meta = array_metadata(f"{where}/zarr.json", path, text, sealed=self.sealed)
        return Column(folder, where, meta)

    def forget(self, path: str) -> bool:
        """Remove a column from the cache, in which it may be damaged."""
        folder = self.cache.table(self._state, require_name(path, self.name))
        self.cache.remove(folder)
        return True

    def rows(self, path: str, record: Record) -> ShardedRows:
        """Return a sharded array behind the cache."""
        return _CachedRows(self, path, record)

    def range(self, path: str, start: int, stop: int, size: int) -> tuple[int, bytes]:
        """Bytes [start, stop) of a file of `size` bytes, and where they begin in it.

        A server that knows no ranges sends the whole file, which then is what comes back.
        """
        whole = start == 0 and stop == size
        data = self._get(path, None if whole else (start, stop), limit=size)
        if not whole and len(data) == stop - start:
            return start, data
        if len(data) != size:
            raise StoreError(f"{self.name}/{path}: has {len(data)} bytes, committed were {size}")
        return 0, data

    # -- details

    def _connect(self) -> tuple[AbstractFileSystem, str | WebReader]:
        """Return the file system, and the store's path in it or its reader.

        A forked process makes its own.
        """
        if self._connection is None or self._connection[0] != os.getpid():
            import fsspec

            protocol = self.url.partition("://")[0].lower()
            try:
                kind = fsspec.get_filesystem_class(protocol)
                filesystem = kind(**{**kind._get_kwargs_from_urls(self.url), **self._options})
                base: str | WebReader = str(kind._strip_protocol(self.name))
                if protocol in ("http", "https"):
                    base = WebReader(filesystem, self.url)
            except ImportError as error:
                raise StoreError(
                    f'{self.name}: {error}; pip install "distinit[remote]" installs the support for http'
                ) from error
            except Exception as error:  # every file system has errors of its own
                raise StoreError(f"{self.name}: cannot be opened ({_short(error)})") from None
            self._connection = (os.getpid(), filesystem, base)
        return self._connection[1:]

    def _get(self, path: str, span: tuple[int, int] | None = None, *, limit: int) -> bytes:
        """Return a file of at most `limit` bytes, or bytes [start, stop) of it.

        The second if the server supports ranges.
        """
        require_name(path, self.name)
        waits = iter(WAITS_S)
        while True:
            try:
                data = self._ask(path, span, limit)
            except (FileNotFoundError, NotADirectoryError):
                raise FileNotFoundError(
                    errno.ENOENT, "no such file", f"{self.name}/{path}"
                ) from None
            except Exception as error:  # every file system has errors of its own
                wait = next(waits, None) if _another_try_may_help(error) else None
                if wait is None:  # without its cause, which may contain a password
                    raise StoreError(
                        f"{self.name}/{path}: cannot be read ({_short(error)})"
                    ) from None
                time.sleep(wait)
                continue
            if len(data) > limit:
                raise StoreError(
                    f"{self.name}/{path}: has more than the {limit} bytes that it can have"
                )
            return data

    def _ask(self, path: str, span: tuple[int, int] | None, limit: int) -> bytes:
        from fsspec.asyn import sync

        filesystem, base = self._connect()
        if isinstance(base, WebReader):
            return bytes(
                sync(filesystem.loop, base.read, path, span, limit, timeout=TOTAL_S + STALL_S)
            )
        start, stop = span or (0, limit + 1)
        if not getattr(filesystem, "async_impl", False):
            return bytes(filesystem.cat_file(f"{base}/{path}", start=start, end=stop))
        ask = filesystem._cat_file
        return bytes(
            sync(filesystem.loop, ask, f"{base}/{path}", start=start, end=stop, timeout=TOTAL_S)
        )

    def _may_have_grown(self, path: str, folder: Path) -> bool:
        """Return whether the server has chunks that a column in the cache lacks.

        A 404 holds for one run only.
        """
        if path in self._asked_again:
            return False
        self._asked_again.add(path)
        text = (folder / "zarr.json").read_bytes()
        names = self._chunk_names(
            path, check_document(f"{self.name}/{path}/zarr.json", text, required=self.sealed)
        )
        lacking = [name for name in names if not (folder / name).exists()]
        return bool(self.read_many(f"{path}/{name}" for name in lacking)) if lacking else False

    def _chunk_names(self, path: str, meta: Mapping[str, Any]) -> list[str]:
        """Return the chunk files with the planned rows of a column; StoreError if it is none."""
        try:
            shape, chunks = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
            count = -(-min(shape[0], self._planned.get(path.split("/")[0], shape[0])) // chunks[0])
            last = "/0" * (len(shape) - 1)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise StoreError(
                f"{self.name}/{path}/zarr.json: unreadable ({in_one_line(error)})"
            ) from error
        if not 0 <= count <= CHUNKS:
            raise StoreError(f"{self.name}/{path}: has {count} chunks, at most {CHUNKS} are read")
        return [f"c/{i}{last}" for i in range(count)]

    def _metadata(self, path: str) -> tuple[bytes, dict[str, Any]]:
        """Return the zarr.json of an array, as it is and checked for its digest and form."""
        try:
            text = self.read(f"{path}/zarr.json")
        except FileNotFoundError as error:
            raise StoreError(f"{self.name}/{path}: missing") from error
        return text, array_metadata(f"{self.name}/{path}/zarr.json", path, text, sealed=self.sealed)

    def _fetch_table(self, path: str, folder: Path) -> None:
        self._asked_again.add(path)
        text, meta = self._metadata(path)
        names = self._chunk_names(path, meta)
        fetched = self.read_many(
            (f"{path}/{name}" for name in names), min(LARGEST, largest_chunk(meta))
        )
        lost = next((name for name in names if f"{path}/{name}" not in fetched), None)
        if lost is not None and (
            path in WITHOUT_FILL or path.endswith(("/class", "/basis", "/mean"))
        ):
            raise StoreError(f"{self.name}/{path}/{lost}: missing")
        files = {"zarr.json": text} | {
            name.removeprefix(f"{path}/"): data for name, data in fetched.items()
        }
        fresh = self.cache.keep_table(folder, files)
        try:  # what cannot be read is not kept: the server may be right again tomorrow
            column = Column(fresh, f"{self.name}/{path}", meta)
            stop = min(column.shape[0], self._planned.get(path.split("/")[0], column.shape[0]))
            for start, end in split_ranges(0, stop, column.chunks[0]):
                checked_rows(column, start, end, self._ranges.get(path, {}))
        except BaseException:
            self.cache.remove(fresh)
            raise
        self.cache.publish(fresh, self._state, path, files)


class _CachedRows(ShardedRows):
    """Rows of a remote array, read from the cache's sparse files; holes are fetched."""

    def __init__(self, files: RemoteFiles, path: str, record: Record) -> None:
        super().__init__(f"{files.name}/{path}", files._metadata(path)[1])
        self._files, self._path, self._record = files, path, record

    def _open_file(self, shard: int) -> int:
        size, digest = self._committed(shard)
        return self._files.cache.open_shard(digest, size)

    def _again(self, shard: int, fd: int, start: int, length: int) -> bytes:
        size, digest = self._committed(shard)
        if not 0 <= start <= start + length <= size:
            raise StoreError(f"{self._file(shard)}: its index names bytes that it does not have")
        low = start // BLOCK * BLOCK
        high = min(size, -(-(start + length) // BLOCK) * BLOCK)
        if size <= WHOLE:
            low, high = 0, size
        try:
            at, data = self._files.range(self._name(shard), low, high, size)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self._files.name}/{self._name(shard)}: a committed shard is missing"
            ) from error
        if len(data) == size and digest_bytes(data) != digest:
            raise self._differs(shard)
        self._files.cache.write(fd, data, at)
        self._check_whole(shard, fd, size, digest)
        return data[start - at : start - at + length]

    def _check_whole(self, shard: int, fd: int, size: int, digest: str) -> None:
        """Compare a file without holes with its digest.

        Raises:
            StoreError: It differs; it is then empty again.
        """
        if has_holes(fd, size):
            return
        if digest_file(fd, size) == digest:
            self._files.cache.name_whole(digest)
        # Where holes are not known exactly, a chunk that was not fetched yet fails its crc32c.
        elif chunk_crcs_hold(os.pread(fd, size, 0), self.shard_rows // self.chunk_rows):
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            raise self._differs(shard)

    def _differs(self, shard: int) -> StoreError:
        return StoreError(f"{self._file(shard)}: differs from what was committed (digest)")

    def _committed(self, shard: int) -> tuple[int, str]:
        """Return size and digest of a shard's file; StoreError if no shard can have such a size."""
        record = self._record(self._path, shard)
        if record is None:
            raise StoreError(f"{self._files.name}/{self._name(shard)}: not committed")
        size, chunks = record["size"], self.shard_rows // self.chunk_rows
        chunk = math.prod((self.chunk_rows, *self.shape[1:])) * self.dtype.itemsize + 4
        least = 16 * chunks + 4
        if not isinstance(size, int) or not least <= size <= least + chunks * chunk:
            raise StoreError(
                f"{self._files.name}/{self._name(shard)}: cannot have {size!r} bytes, as its commit says"
            )
        return size, require_digest(record["blake2b"], f"{self._files.name}/{self._name(shard)}")

    def _name(self, shard: int) -> str:
        return f"{self._path}/{self._key(shard)}"


def _another_try_may_help(error: Exception) -> bool:
    """Return whether to ask again: not without permission, nor after other HTTP client errors."""
    if isinstance(error, AnswerError):
        return error.again
    status = getattr(error, "status", None)
    client_error = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return not client_error and not isinstance(error, PermissionError)


def _short(error: Exception) -> str:
    return hide_secrets(first_line(error) if isinstance(error, AnswerError) else in_one_line(error))
