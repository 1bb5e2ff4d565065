"""HDF5 files: `Hdf5Writer` writes all of them, `open_hdf5` opens all of them for reading.

On a full disk HDF5 itself crashes the process when it closes the file (h5py 3, HDF5 1.14). And a
file may refer to others: by a link, external storage or a virtual data set it can show the content
of any file that its reader may open.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from .errors import DistInitError
from .sealed import USER_BLOCK, comment, seal

STRING = "string"
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
_LARGEST_CHUNK = 2**28  # bytes
_BEST_RATIO = 1100  # more than deflate can compress


class Hdf5Error(DistInitError, OSError):
    """An HDF5 file is damaged, names other files, or is not of its format.

    The message is the reason, without the path.
    """


Dimensions = int | tuple[int, ...]
Tables = Mapping[str, tuple[str, Dimensions]]


@contextmanager
def open_hdf5(
    path: str | os.PathLike[str],
    tables: Tables,
    groups: tuple[str, ...] = (),
    *,
    checked: bool = False,
) -> Iterator[h5py.File]:
    """Open a file for reading.

    Each of its objects must have the type of its format and be stored in the file itself. All
    exceptions while the file is open, except errors of distinit, are taken for damage.

    Args:
        path: The file.
        tables: Path of each data set that the format has → kinds of its values (numpy's letters, or
            STRING) and allowed numbers of dimensions. A file need not have all of them.
        groups: Paths of the groups that the format has.
        checked: The file was opened and checked before, and is not checked again.

    Raises:
        FileNotFoundError: There is no such file.
        Hdf5Error: The file is not HDF5 or damaged, or has an object that the format does not have
            or that is stored elsewhere.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not checked:
                _check_group(file.id, "", tables, groups, os.stat(path).st_size)
            yield file
    except (FileNotFoundError, DistInitError):
        raise
    # h5py raises all kinds for damage: OSError, KeyError, RuntimeError, AttributeError, …
    except Exception as error:
        raise Hdf5Error(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _check_group(
    group: h5py.h5g.GroupID,
    prefix: str,
    tables: Tables,
    groups: tuple[str, ...],
    size: int,
) -> None:
    """Raise Hdf5Error if a group has an object other than these.

    It uses h5py's low-level interface, which is faster: a loader opens a file for each clip.

    Args:
        group: The group.
        prefix: Its path with a slash, empty for the root.
        tables: As in `open_hdf5`.
        groups: As in `open_hdf5`.
        size: Size of the file in bytes.
    """
    if len(group) > len(tables) + len(groups):
        raise Hdf5Error(f"{len(group)} objects, more than the format has")
    for name in group:
        path = prefix + os.fsdecode(name)
        # Checked before the object is opened, which would follow the link.
        if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
            raise Hdf5Error(f"{path!r} is a link, maybe to another file: refused")
        item = h5py.h5o.open(group, name)
        if path in groups and isinstance(item, h5py.h5g.GroupID):
            _check_group(item, f"{path}/", tables, groups, size)
        elif path in tables and isinstance(item, h5py.h5d.DatasetID):
            _check_table(item, path, *tables[path], size)
        else:
            raise Hdf5Error(f"{path!r} is no object of the format")


def _check_table(
    table: h5py.h5d.DatasetID, path: str, kinds: str, dimensions: Dimensions, size: int
) -> None:
    """Raise Hdf5Error if a data set is stored outside the file or has other types or shapes."""
    properties, shape, dtype = table.get_create_plist(), table.shape, table.dtype
    layout = properties.get_layout()
    if layout == h5py.h5d.VIRTUAL or properties.get_external_count():
        raise Hdf5Error(f"{path!r} is stored in other files: refused")
    text = h5py.check_string_dtype(dtype) is not None
    allowed = (dimensions,) if isinstance(dimensions, int) else dimensions
    other_kind = not text if kinds == STRING else text or dtype.kind not in kinds
    if other_kind or len(shape or ()) not in allowed:
        raise Hdf5Error(f"{path!r} is {dtype} {shape}, which the format does not have")
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    if not filters <= _FILTERS:
        raise Hdf5Error(f"{path!r} has a filter that the format does not have")
    ratio = _BEST_RATIO if h5py.h5z.FILTER_DEFLATE in filters else 1
    chunk = math.prod(properties.get_chunk()) if layout == h5py.h5d.CHUNKED else 0
    if math.prod(shape) * dtype.itemsize > ratio * size or chunk * dtype.itemsize > _LARGEST_CHUNK:
        raise Hdf5Error(f"{path!r} is {dtype} {shape}, more than the file can hold")


class Hdf5Writer:
    """A context manager around `file`, an h5py.File to be filled.

    The file is complete once the block ends without an error. An OSError of the system, such as a
    full disk, is raised at the end and by `check`, which writers of much data call now and then.

    Args:
        path: The file to write.
        sealed: Store a digest of the file in it, see `sealed`, for which it is read again.
        options: Further arguments of h5py.File.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, sealed: bool = False, **options: Any
    ) -> None:
        self._target = _Target(path)
        self._sealed = sealed
        try:
            self.file = h5py.File(
                self._target, "w", userblock_size=USER_BLOCK if sealed else 0, **options
            )
        except BaseException:
            self._target.close()
            raise

    def check(self) -> None:
        """Raise the first error of writing, if there was one."""
        if self._target.error is not None:
            raise self._target.error

    def close(self) -> None:
        """Write the end of the file to the disk, also after an error.

        Raises:
            OSError: Writing failed.
        """
        self.file.close()
        if self._sealed:
            self._target.seal()
        self._target.close()
        self.check()

    def __enter__(self) -> Hdf5Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:
                raise


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


class _Target:
    """The file that HDF5 writes to.

    Errors are recorded and not raised to HDF5. After the first one all writes are discarded.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.error: OSError | None = None
        self._path = Path(path)
        # The target of a link at this path must not be written to.
        self._file = open(path, "w+b", buffering=0, opener=_no_link)  # noqa: SIM115 (closed by close)

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        try:
            while remaining and self.error is None:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            self._record(error)
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._record(error)
            return size or 0

    def seal(self) -> None:
        """Write the digest of the file into the user block."""
        if self._file.closed or self.error is not None:
            return
        try:
            self._file.seek(0)
            self._file.write(comment())
            seal(self._file)
        except OSError as error:
            self._record(error)

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            if self.error is None:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self._record(error)

    def _record(self, error: OSError) -> None:
        if self.error is None:
            error.filename = str(self._path)
            self.error = error

    # HDF5 also calls read, readinto, seek, tell and flush.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
