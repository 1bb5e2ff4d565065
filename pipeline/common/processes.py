"""Helper processes that end when the process they work for ends, even if it is killed.

The limits of a process, cores and open files, are here as well.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass

from .errors import DistInitError

_PR_SET_PDEATHSIG = 1  # of prctl(2)
# Looked up before any fork: another thread may hold the lock of the linker.
_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None
_POLL_INTERVAL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that helper processes work for; it is passed to each of them at the start.

    Args:
        pid: Its process id.
        in_main_thread: Whether it starts them in its main thread. Linux takes the end of the
            thread that started a process for the end of the parent.
    """

    pid: int
    in_main_thread: bool

    @classmethod
    def current(cls) -> Owner:
        """Return this process as the owner of the processes that this thread starts."""
        return cls(os.getpid(), threading.current_thread() is threading.main_thread())


def end_with(owner: Owner) -> None:
    """Kill this process when `owner` ends, or now if it has ended.

    On Linux the kernel kills it, even while the interpreter is stuck. A thread kills it if the
    parent is not the owner but a fork server, or if the owner started it from a thread that may end
    earlier.
    """
    if owner.in_main_thread:
        _signal_at_death_of_parent(signal.SIGKILL)
    descriptor = _open_pidfd(owner.pid)
    if descriptor is None:
        _kill_self()
    threading.Thread(
        target=_kill_self_after, args=(owner.pid, descriptor), name="end-with-owner", daemon=True
    ).start()


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal when its parent ends.

    It is for `preexec_fn`, and does nothing on other systems than Linux. The thread that starts the
    process has to wait for it.

    Args:
        parent: Process id of the parent.
        number: Number of the signal.
    """
    _signal_at_death_of_parent(number)
    if os.getppid() != parent:
        os._exit(1)


def _signal_at_death_of_parent(number: int) -> None:
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number)


def _open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends.

    It is −1 if the system has no such descriptors, None if the process has ended.
    """
    try:
        return os.pidfd_open(pid) if sys.platform.startswith("linux") else -1
    except ProcessLookupError:
        return None
    # An old kernel, or no descriptor left.
    except OSError:
        return -1


def _kill_self_after(pid: int, descriptor: int) -> None:
    if descriptor >= 0:
        # select.select refuses descriptors above 1023.
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    else:
        parent = os.getppid()
        while os.getppid() == parent and process_exists(pid):
            time.sleep(_POLL_INTERVAL_S)
    _kill_self()


def process_exists(pid: int) -> bool:
    """Return whether this machine has a process with the id, under any account."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # It belongs to another account.
    except PermissionError:
        return True
    return True


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cores() -> int:
    """Return the number of cores for this process, its share if a launcher started several."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def require_descriptors(count: int, prefix: str) -> None:
    """Raise the limit of open files of this process and its children, if it is too low.

    Args:
        count: Number of open files that are required.
        prefix: Begins the message: the option that requires them.

    Raises:
        DistInitError: The hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise DistInitError(
            f"{prefix}: requires {count} open files, a process may have {hard}; raise that limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
