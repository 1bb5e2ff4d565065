"""Read a store behind a URL and cache the data locally (`cache.py`).

A shard file in the cache has its full length from the start, as a hole, and is filled with the
ranges that are read. No list of cached ranges is stored: every chunk and every index ends with its
crc32c, which a hole does not satisfy. So processes share the cache without locks, a killed process
leaves no wrong data, and a cached row is read as fast as in a local store. A file without holes is
compared with the digest in its commit.

A server's data comes from a third party: names and sizes are checked before they are used, and no
response is read beyond the size that the file can have.
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
from .web import STALL_S, TOTAL_S, ResponseError, WebReader

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Files of up to this many bytes are fetched in one request.
WHOLE_FILE_BYTES = 4 << 20
# Larger files are fetched in aligned blocks of so many bytes: the neighbours of a row belong to the
# same video.
BLOCK_BYTES = 256 << 10
# Bytes of a node, or of one file of a table.
MAX_FILE_BYTES = 64 << 20
# Chunks of a column. With 16,384 rows per chunk this allows 268 million videos.
MAX_CHUNKS = 1 << 14
# Simultaneous requests, where the file system supports several.
MAX_REQUESTS = 32
# Seconds before each retry of a failed request.
WAITS_S = (0.5, 2.0)

# Columns in which no row has the fill value, so that a chunk without a file is an error.
WITHOUT_FILL = ("videos/path", "videos/corpus", "segments/video", "segments/shard")


class RemoteFiles(StoreFiles):
    """A store under a URL. `name` is the URL without its secrets.

    Raises:
        UsageError: The URL is not allowed (`urls.check_url`).
        StoreError: The package for its protocol is not installed.
    """

    def __init__(self, url: str, cache: Path, options: Mapping[str, Any]) -> None:
        check_url(url)
        self.name, self.url = public_url(url).rstrip("/"), url
        self._cache_root, self._options = cache, dict(options)
        self._cache: StoreCache | None = None
        self._state, self._planned, self._ranges = "", dict[str, int](), Ranges()
        self._refreshed_columns: set[str] = set()
        self._connection: tuple[int, AbstractFileSystem, str | WebReader] | None = None
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def pin(self, store_id: str, plans: Sequence[Mapping[str, Any]]) -> None:
        """Set the state of the tables to read: the rows that these plans list do not change.

        The content of the plans identifies the state, not their number: two copies of a store may
        have grown differently.
        """
        filesystem, _ = self._connect()
        endpoint = getattr(filesystem, "endpoint_url", None) or getattr(
            filesystem, "endpoint", None
        )
        place = f"{canonical_url(self.url)} {endpoint or ''}"
        self._cache = StoreCache(
            self._cache_root, digest_bytes(place.encode()), require_digest(store_id, self.name)
        )
        self._state = digest_bytes(json.dumps(plans, sort_keys=True).encode())
        self._planned = {key: num_planned(plans, key) for key in ("videos", "segments")}
        self._ranges = ranges_of(plans)

    @property
    def address(self) -> str:
        """The URL with its secrets."""
        return self.url

    @property
    def cache(self) -> StoreCache:
        """Cached files of this store; available after `pin`."""
        if self._cache is None:
            raise StoreError(f"{self.name}: its plans are not read yet")
        return self._cache

    def read(self, path: str) -> bytes:
        """Return the content of a file; FileNotFoundError if it does not exist."""
        return self._get(path, limit=MAX_FILE_BYTES)

    def read_many(self, paths: Iterable[str], limit: int | None = None) -> dict[str, bytes]:
        """Return the contents of the files that exist, by path, fetched in parallel if possible."""
        paths = list(paths)
        filesystem, _ = self._connect()

        def get(path: str) -> bytes | None:
            try:
                return self._get(path, limit=limit or MAX_FILE_BYTES)
            except FileNotFoundError:
                return None

        if not getattr(filesystem, "async_impl", False) or len(paths) < 2:
            contents = [get(path) for path in paths]
        else:
            with ThreadPoolExecutor(MAX_REQUESTS) as pool:
                contents = list(pool.map(get, paths))
        return {path: data for path, data in zip(paths, contents, strict=True) if data is not None}

    def table(self, path: str) -> Column:
        """Return a column of a table, which is fetched as a whole on first use."""
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
        """Remove a column, which may be damaged, from the cache."""
        folder = self.cache.table(self._state, require_name(path, self.name))
        self.cache.remove(folder)
        return True

    def rows(self, path: str, record: Record) -> ShardedRows:
        """Return a sharded array that is read through the cache."""
        return _CachedRows(self, path, record)

    def range(self, path: str, start: int, stop: int, size: int) -> tuple[int, bytes]:
        """Return an offset in a file of `size` bytes and the bytes from there.

        These are bytes [start, stop), or the whole file from a server that does not support ranges.
        """
        whole = start == 0 and stop == size
        data = self._get(path, None if whole else (start, stop), limit=size)
        if not whole and len(data) == stop - start:
            return start, data
        if len(data) != size:
            raise StoreError(f"{self.name}/{path}: has {len(data)} bytes, {size} were committed")
        return 0, data

    # -- details

    def _connect(self) -> tuple[AbstractFileSystem, str | WebReader]:
        """Return the file system, and the store's path in it or, for http, its reader.

        A forked process opens a new connection.
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
            # Each file system raises its own kinds of errors.
            except Exception as error:
                raise StoreError(f"{self.name}: cannot be opened ({_short(error)})") from None
            self._connection = (os.getpid(), filesystem, base)
        return self._connection[1:]

    def _get(self, path: str, span: tuple[int, int] | None = None, *, limit: int) -> bytes:
        """Return a file of at most `limit` bytes, or its bytes [start, stop) in `span`.

        A server that does not support ranges returns the whole file.
        """
        require_name(path, self.name)
        waits = iter(WAITS_S)
        while True:
            try:
                data = self._request(path, span, limit)
            except (FileNotFoundError, NotADirectoryError):
                raise FileNotFoundError(
                    errno.ENOENT, "no such file", f"{self.name}/{path}"
                ) from None
            # Each file system raises its own kinds of errors.
            except Exception as error:
                wait = next(waits, None) if _can_retry(error) else None
                if wait is None:
                    # The cause is left out, because it may contain a password.
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

    def _request(self, path: str, span: tuple[int, int] | None, limit: int) -> bytes:
        from fsspec.asyn import sync

        filesystem, base = self._connect()
        if isinstance(base, WebReader):
            return bytes(
                sync(filesystem.loop, base.read, path, span, limit, timeout=TOTAL_S + STALL_S)
            )
        start, stop = span or (0, limit + 1)
        if not getattr(filesystem, "async_impl", False):
            return bytes(filesystem.cat_file(f"{base}/{path}", start=start, end=stop))
        cat_file = filesystem._cat_file
        return bytes(
            sync(
                filesystem.loop, cat_file, f"{base}/{path}", start=start, end=stop, timeout=TOTAL_S
            )
        )

    def _may_have_grown(self, path: str, folder: Path) -> bool:
        """Return whether the server has chunks that a cached column lacks.

        A 404 is trusted within one run only.
        """
        if path in self._refreshed_columns:
            return False
        self._refreshed_columns.add(path)
        text = (folder / "zarr.json").read_bytes()
        names = self._chunk_names(
            path, check_document(f"{self.name}/{path}/zarr.json", text, required=self.sealed)
        )
        missing = [name for name in names if not (folder / name).exists()]
        return bool(self.read_many(f"{path}/{name}" for name in missing)) if missing else False

    def _chunk_names(self, path: str, meta: Mapping[str, Any]) -> list[str]:
        """Return the names of the chunk files with the planned rows of a column."""
        try:
            shape, chunks = meta["shape"], meta["chunk_grid"]["configuration"]["chunk_shape"]
            count = -(-min(shape[0], self._planned.get(path.split("/")[0], shape[0])) // chunks[0])
            suffix = "/0" * (len(shape) - 1)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise StoreError(
                f"{self.name}/{path}/zarr.json: unreadable ({in_one_line(error)})"
            ) from error
        if not 0 <= count <= MAX_CHUNKS:
            raise StoreError(
                f"{self.name}/{path}: has {count} chunks, at most {MAX_CHUNKS} are read"
            )
        return [f"c/{i}{suffix}" for i in range(count)]

    def _metadata(self, path: str) -> tuple[bytes, dict[str, Any]]:
        """Return the zarr.json of an array as bytes and parsed, checked for digest and form."""
        try:
            text = self.read(f"{path}/zarr.json")
        except FileNotFoundError as error:
            raise StoreError(f"{self.name}/{path}: missing") from error
        return text, array_metadata(f"{self.name}/{path}/zarr.json", path, text, sealed=self.sealed)

    def _fetch_table(self, path: str, folder: Path) -> None:
        self._refreshed_columns.add(path)
        text, meta = self._metadata(path)
        names = self._chunk_names(path, meta)
        fetched = self.read_many(
            (f"{path}/{name}" for name in names), min(MAX_FILE_BYTES, largest_chunk(meta))
        )
        missing = next((name for name in names if f"{path}/{name}" not in fetched), None)
        if missing is not None and (
            path in WITHOUT_FILL or path.endswith(("/class", "/basis", "/mean"))
        ):
            raise StoreError(f"{self.name}/{path}/{missing}: missing")
        files = {"zarr.json": text} | {
            name.removeprefix(f"{path}/"): data for name, data in fetched.items()
        }
        new_folder = self.cache.keep_table(folder, files)
        # A column that cannot be read is not cached, because the server may be repaired later.
        try:
            column = Column(new_folder, f"{self.name}/{path}", meta)
            stop = min(column.shape[0], self._planned.get(path.split("/")[0], column.shape[0]))
            for start, end in split_ranges(0, stop, column.chunks[0]):
                checked_rows(column, start, end, self._ranges.get(path, {}))
        except BaseException:
            self.cache.remove(new_folder)
            raise
        self.cache.publish(new_folder, self._state, path, files)


class _CachedRows(ShardedRows):
    """Rows of a remote array, read from the cache's sparse files; holes are fetched."""

    def __init__(self, files: RemoteFiles, path: str, record: Record) -> None:
        super().__init__(f"{files.name}/{path}", files._metadata(path)[1])
        self._files, self._path, self._record = files, path, record

    def _open_file(self, shard: int) -> int:
        size, digest = self._committed(shard)
        return self._files.cache.open_shard(digest, size)

    def _reread(self, shard: int, fd: int, start: int, length: int) -> bytes:
        size, digest = self._committed(shard)
        if not 0 <= start <= start + length <= size:
            raise StoreError(f"{self._file(shard)}: its index names bytes that it does not have")
        block_start = start // BLOCK_BYTES * BLOCK_BYTES
        block_end = min(size, -(-(start + length) // BLOCK_BYTES) * BLOCK_BYTES)
        if size <= WHOLE_FILE_BYTES:
            block_start, block_end = 0, size
        try:
            offset, data = self._files.range(self._name(shard), block_start, block_end, size)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self._files.name}/{self._name(shard)}: a committed shard is missing"
            ) from error
        if len(data) == size and digest_bytes(data) != digest:
            raise self._differs(shard)
        self._files.cache.write(fd, data, offset)
        self._check_whole(shard, fd, size, digest)
        return data[start - offset : start - offset + length]

    def _check_whole(self, shard: int, fd: int, size: int, digest: str) -> None:
        """Compare a file that has no holes with its digest.

        Raises:
            StoreError: It differs; it has then been emptied.
        """
        if has_holes(fd, size):
            return
        if digest_file(fd, size) == digest:
            self._files.cache.name_whole(digest)
            return
        # Some file systems report holes inexactly, and another process may just be writing; then a
        # chunk fails its crc32c. Both checks are of the same bytes.
        data = os.pread(fd, size, 0)
        num_chunks = self.shard_rows // self.chunk_rows
        if digest_bytes(data) != digest and chunk_crcs_hold(data, num_chunks):
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            raise self._differs(shard)

    def _differs(self, shard: int) -> StoreError:
        return StoreError(f"{self._file(shard)}: differs from what was committed (digest)")

    def _committed(self, shard: int) -> tuple[int, str]:
        """Return the committed size and digest of a shard's file, checked."""
        record = self._record(self._path, shard)
        if record is None:
            raise StoreError(f"{self._files.name}/{self._name(shard)}: not committed")
        size, chunks = record["size"], self.shard_rows // self.chunk_rows
        chunk_bytes = math.prod((self.chunk_rows, *self.shape[1:])) * self.dtype.itemsize + 4
        min_size = 16 * chunks + 4
        max_size = min_size + chunks * chunk_bytes
        if not isinstance(size, int) or not min_size <= size <= max_size:
            raise StoreError(
                f"{self._files.name}/{self._name(shard)}: its commit records {size!r} bytes, expected "
                f"{min_size} to {max_size}"
            )
        return size, require_digest(record["blake2b"], f"{self._files.name}/{self._name(shard)}")

    def _name(self, shard: int) -> str:
        return f"{self._path}/{self._key(shard)}"


def _can_retry(error: Exception) -> bool:
    """Return whether to retry; not without permission, nor after most client errors of HTTP."""
    if isinstance(error, ResponseError):
        return error.retry
    status = getattr(error, "status", None)
    client_error = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return not client_error and not isinstance(error, PermissionError)


def _short(error: Exception) -> str:
    return hide_secrets(
        first_line(error) if isinstance(error, ResponseError) else in_one_line(error)
    )
