"""Locks of folders and files against another process; each dies with the process that holds it."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DistInitError, UsageError
from .files import sweep_run

log = logging.getLogger(__name__)

OUTLIVED_S = 8.0  # for which a process that was told to end may go on: it writes a checkpoint
_own: set[int] = set()  # descriptors of `folder_lock`


def lock(
    descriptor: int, path: str | os.PathLike[str], busy: DistInitError, *, shared: bool = False
) -> None:
    """Lock an open file or folder, without waiting, until the descriptor is closed.

    Raises `busy` where another process holds it, DistInitError where the file system of `path` has
    no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    except OSError as error:
        raise DistInitError(f"{path}: its file system cannot lock it ({error.strerror})") from None


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder, which is made, against every other command that writes there. Readers do not
    ask.

    The lock ends with this process, for processes that it forks (of loaders) have no part in it.
    Where the file system has no locks, a warning is logged and nothing is locked.

    Raises:
        UsageError: The folder cannot be made, or another process has it, still after `OUTLIVED_S`.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"--out {os.fspath(folder)} cannot be made: {error.strerror}") from error
    _own.add(descriptor)
    try:
        deadline = time.monotonic() + OUTLIVED_S
        busy = UsageError(f"{os.fspath(folder)}: another distinit command is at work there")
        while True:
            try:
                lock(descriptor, folder, busy)
                break
            except UsageError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            except DistInitError as error:
                # Training on such a file system must stay possible; a store, which many processes
                # fill, needs the lock.
                log.warning("%s: nothing keeps a second command from writing there", error)
                break
        with suppress(OSError):  # a folder that cannot be written: the command says so
            sweep_run(Path(folder))
        yield
    finally:
        if descriptor in _own:
            _own.remove(descriptor)
            os.close(descriptor)


def _give_up_locks() -> None:
    """Run in a process that was just forked: it would hold the locks of its parent beyond the
    parent's end."""
    while _own:
        os.close(_own.pop())


os.register_at_fork(after_in_child=_give_up_locks)
