"""Helper processes that end when the process they work for ends, even if it is killed.

Also what processes may use: cores and open files.
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
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Owner:
    """The process that helper processes work for; it is sent to each of them at their start.

    Args:
        in_main_thread: Whether they are started in its main thread. Linux takes the end of the
            thread that started a process for the end of the parent.
    """

    pid: int
    in_main_thread: bool

    @classmethod
    def here(cls) -> Owner:
        """Return this process, as the owner of those that this thread starts."""
        return cls(os.getpid(), threading.current_thread() is threading.main_thread())


def end_with(owner: Owner) -> None:
    """Kill this process when `owner` ends, or now if it has ended.

    On Linux the kernel kills it, even while the interpreter is stuck. A thread kills it if the
    parent is not the owner but a fork server, or if the owner started it from a thread that may end
    earlier.
    """
    if owner.in_main_thread:
        _signal_at_death_of_parent(signal.SIGKILL)
    ended = _watch_of(owner.pid)
    if ended is None:
        _kill_self()
    threading.Thread(
        target=_kill_self_after, args=(owner.pid, ended), name="end-with-owner", daemon=True
    ).start()


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Send this process a signal when its parent ends.

    For `preexec_fn`, with `os.getpid()` of the parent. Does nothing on other systems than Linux.
    The thread that starts the process has to wait for it.
    """
    _signal_at_death_of_parent(number)
    if os.getppid() != parent:
        os._exit(1)


def _signal_at_death_of_parent(number: int) -> None:
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number)


def _watch_of(pid: int) -> int | None:
    """Return a descriptor that is readable once a process has ended.

    It is −1 if the system has none, None if the process has ended.
    """
    try:
        return os.pidfd_open(pid) if sys.platform.startswith("linux") else -1
    except ProcessLookupError:
        return None
    except OSError:  # an old kernel, or no descriptor left
        return -1


def _kill_self_after(pid: int, ended: int) -> None:
    if ended >= 0:
        watch = select.poll()  # select would refuse a descriptor above 1023
        watch.register(ended, select.POLLIN)
        watch.poll()
    else:
        parent = os.getppid()
        while os.getppid() == parent and process_exists(pid):
            time.sleep(_LOOK_EVERY_S)
    _kill_self()


def process_exists(pid: int) -> bool:
    """Return whether a process of this machine has the number, under any account."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another account has the number, so one exists
        return True
    return True


def _kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cores() -> int:
    """Cores this process may use; those that a launcher has started on one machine share them."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def require_descriptors(count: int, what: str) -> None:
    """Let this process and its children have `count` open files, where the system allows it.

    Args:
        count: open files that are required.
        what: what requires them, as messages name it.

    Raises:
        DistInitError: names `what` and the limit if the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise DistInitError(
            f"{what}: requires {count} open files, a process may have {hard}; raise that limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
