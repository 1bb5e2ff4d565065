"""Locks of folders and files against another process; each dies with the process that holds it."""

from __future__ import annotations

import fcntl
import os

from .errors import DistInitError


def lock(descriptor: int, path: str | os.PathLike[str], busy: DistInitError, *, shared: bool = False) -> None:
    """Lock an open file or folder, without waiting, until the descriptor is closed.

    Raises `busy` where another process holds it, DistInitError where the file system of `path` has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:
        raise DistInitError(f"{path}: its file system cannot lock it ({error.strerror}); choose another") from None
