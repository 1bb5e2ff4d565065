"""Writing HDF5 files. On a full disk HDF5 itself crashes the process when it closes the file (h5py 3, HDF5 1.14)."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py


class Hdf5Writer:
    """`file`, an h5py.File to be filled, is whole once the writer is left without an error. A context manager.

    Raises OSError, of a full disk or whatever else the system says of the path: by `check`, which who writes much
    calls now and then, and at the end.
    """

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        self._target = _Target(path)
        try:
            self.file = h5py.File(self._target, "w", **options)
        except BaseException:
            self._target.close()
            raise

    def check(self) -> None:
        """Raises the first error of what was written so far."""
        if self._target.error is not None:
            raise self._target.error

    def close(self) -> None:
        """The end of the file goes to the disk; also of one that is given up. Raises OSError."""
        self.file.close()
        self._target.close()
        self.check()

    def __enter__(self) -> Hdf5Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:
                raise


class _Target:
    """The file that HDF5 writes to. HDF5 is never told of an error: what it writes after one goes nowhere."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.error: OSError | None = None
        self._path = Path(path)
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._failed(error)
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._failed(error)
            return size or 0

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            if self.error is None:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if self.error is None:
            error.filename = str(self._path)
            self.error = error

    def __getattr__(self, name: str) -> Any:  # read, readinto, seek, tell, flush
        return getattr(self._file, name)
