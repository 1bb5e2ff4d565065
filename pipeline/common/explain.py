"""Turn any exception into one line for the user, and the exit code of the command."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from .errors import DistInitError


def explain(error: BaseException) -> tuple[str, int]:
    """Return one line and the exit code for any exception."""
    full = full_disk(error)
    if full is not None:
        return (
            f"disk full while writing{_file_of(full, error)}; free some space and run it again",
            1,
        )
    if isinstance(error, DistInitError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        from .limits import limit_met

        return str(limit_met(error)), 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, ModuleNotFoundError):
        return f"{error} (is the installation complete? pip install distinit)", 1
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]} (--debug shows where)", 1


def full_disk(error: BaseException) -> OSError | None:
    """Return the error of a full disk or quota that led to `error`, if one did."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return cause
    return None


def _file_of(full: OSError, error: BaseException) -> str:
    if full.filename:
        return f" {full.filename}"
    return f": {error}" if isinstance(error, DistInitError) else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
