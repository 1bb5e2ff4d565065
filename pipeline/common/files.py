"""Files that are written whole or not at all, and what a killed process leaves of one.

A file is written under a temporary name next to it, `.NAME.PID.partial`, and then renamed, so that
every reader sees the old content or the new one. Both the file and its folder are synced: a file
that another one names survives a crash of the machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DistInitError, UsageError
from .streams import printable

_IN_STORE = re.compile(
    r".+\.[0-9a-f]{32}\.partial"  # of zarr, which writes a file under this name and renames it
    r"|\.?zarr\.json\.\d+\.partial"  # without the dot: of version 0.1
)
_IN_RUN = re.compile(r"\..+\.\d+\.partial")


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """Give `path` the content that the block writes into the yielded temporary path.

    If the block raises, `path` is untouched and the temporary file is removed. A link that has one
    of the two names is replaced, never followed. Missing folders are made.

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
        # A failed write(2) does not know its file; errors of our own have no number.
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
        kept = "; the one before is untouched" if path.exists() else ""
        raise failure(f"cannot write {path}: {error.strerror or error}{kept}") from error


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
    """Remove temporary files from a store, whose lock must be held: no living process owns them."""
    for folder, _, names in os.walk(root):
        for name in filter(_IN_STORE.fullmatch, names):
            os.unlink(os.path.join(folder, name))


def sweep_run(folder: Path) -> None:
    """Remove temporary files from a run folder, whose lock must be held, and its checkpoints."""
    for path in (*folder.iterdir(), *folder.glob("checkpoints/.*")):
        if _IN_RUN.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
            path.unlink()
