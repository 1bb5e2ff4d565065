"""Locks of folders and files against other processes; a lock ends with its process."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .errors import DistInitError, UsageError
from .files import sweep_run

log = logging.getLogger(__name__)

# A process that was asked to end may write a checkpoint first.
MAX_WAIT_S = 8.0
# Descriptors of the locks that this process holds.
_held: set[int] = set()


class NoLocksError(DistInitError):
    """The file system of a path has no locks."""


@contextmanager
def locked(
    path: str | os.PathLike[str],
    busy: DistInitError,
    *,
    shared: bool = False,
    make: bool = False,
    wait_s: float = 0.0,
) -> Iterator[int]:
    """Lock a file or a folder and yield its descriptor.

    The lock ends with this process: forked processes, such as loaders, do not hold it.

    Args:
        path: The file or folder.
        busy: The error to raise if another process still holds the lock after `wait_s`.
        shared: Share the lock with other readers.
        make: The path is a file, which is created if missing; a link is not followed.
        wait_s: Seconds to wait for another process.

    Raises:
        NoLocksError: The file system has no locks.
        OSError: The path cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if make else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(
                    descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
                )
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise busy from None
                time.sleep(0.2)
            except OSError as error:
                raise NoLocksError(
                    f"{os.fspath(path)}: its file system cannot lock it ({error.strerror})"
                ) from None
        yield descriptor
    finally:
        if descriptor in _held:
            _held.remove(descriptor)
            os.close(descriptor)


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Create a folder if it is missing, and lock it against other commands that write there.

    Readers take no lock. If the file system has no locks, a warning is logged and nothing is
    locked.

    Raises:
        UsageError: The folder cannot be created, or another process still holds the lock after
            MAX_WAIT_S.
    """
    busy = UsageError(f"{os.fspath(folder)}: another distinit command is writing there")
    with ExitStack() as stack:
        try:
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(locked(folder, busy, wait_s=MAX_WAIT_S))
        except OSError as error:
            raise UsageError(
                f"--out {os.fspath(folder)} cannot be created: {error.strerror}"
            ) from error
        except NoLocksError as error:
            # Training on such a file system must stay possible. A store, which many processes fill,
            # requires the lock.
            log.warning("%s: a second command could write there at the same time", error)
        # The command itself reports a folder that cannot be written.
        with suppress(OSError):
            sweep_run(Path(folder))
        yield


def _give_up_locks() -> None:
    """Close the locks in a forked process.

    It would hold the locks of its parent after the parent's end.
    """
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_give_up_locks)
