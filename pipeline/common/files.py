"""Write files whole or not at all, and remove the temporary files of killed processes.

A file is written under a temporary name next to it, `.NAME.PID.partial`, and then renamed, so that
every reader sees the old content or the new one. Both the file and its folder are synced, so that
a file to which another one refers survives a crash of the machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DistInitError, UsageError
from .streams import printable

# Zarr's temporary names, and those of this module; version 0.1 wrote them without the first dot.
_TEMPORARY_IN_STORE = re.compile(
    r".+\.[0-9a-f]{32}\.partial"
    r"|\.?zarr\.json\.\d+\.partial"
)
_TEMPORARY_IN_RUN = re.compile(r"\..+\.\d+\.partial")


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give `path` the content that the block writes into the yielded temporary path.

    If the block raises, `path` is untouched and the temporary file is removed. A link at
    one of the two paths is replaced, never followed. Missing folders are created.

    Args:
        path: The file to write.
        scratch: The temporary path, on the same file system; by default its name contains the
            process id.

    Raises:
        OSError: The file cannot be synced or renamed.
    """
    part = scratch or path.with_name(f".{path.name}.{os.getpid()}.partial")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    try:
        yield part
        fsync_path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, path)
        fsync_path(path.parent)
    except BaseException as error:
        # The error of a failed write(2) has no file name. Errors of this package have no number.
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(
    path: Path, content: bytes | memoryview, failure: type[DistInitError] = DistInitError
) -> None:
    """Replace the content of a file, see `replacing`.

    Raises:
        failure: The file cannot be written; the cause is the OSError.
    """
    try:
        with replacing(path) as part, open(part, "xb") as file:
            file.write(content)
    except OSError as error:
        remark = "; the existing file is unchanged" if path.exists() else ""
        raise failure(f"cannot write {path}: {error.strerror or error}{remark}") from error


def write_page(path: Path, content: str | bytes) -> None:
    """Replace a page or a figure; UsageError if it cannot be written.

    Text is escaped by `printable`: a page cannot hold control characters, and may be shown by a
    terminal.
    """
    data = content if isinstance(content, bytes) else printable(content, lines=True).encode()
    write_whole(path, data, UsageError)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep_store(root: Path) -> None:
    """Remove temporary files from a store. The caller holds its lock, so no file is in use."""
    for folder, _, names in os.walk(root):
        for name in filter(_TEMPORARY_IN_STORE.fullmatch, names):
            os.unlink(os.path.join(folder, name))


def sweep_run(folder: Path) -> None:
    """Remove temporary files from a run folder and its checkpoints. The caller holds its lock."""
    for path in (*folder.iterdir(), *folder.glob("checkpoints/.*")):
        if _TEMPORARY_IN_RUN.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
            path.unlink()
