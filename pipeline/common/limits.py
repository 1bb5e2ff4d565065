"""Name the limit of the system that a process ran into, and how to raise it."""

from __future__ import annotations

import errno
import resource

from .errors import DistInitError


def limit_met(error: BaseException) -> str | None:
    """Return which limit an error speaks of, None for another error.

    Libraries that pass descriptors between processes drop the number of the error and keep its
    words.
    """
    number, words = getattr(error, "errno", None), str(error)
    if (
        number in (errno.EMFILE, errno.ENFILE)
        or "Too many open files" in words
        or "items of ancdata" in words
    ):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: a process may have {limit}; raise that limit (ulimit -n)"
    if number in (errno.EAGAIN, errno.ENOMEM):
        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        count = "any number of" if limit == resource.RLIM_INFINITY else str(limit)
        return f"no further process or memory: this user may have {count} processes (ulimit -u)"
    return None


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
