"""All errors that a user can meet, in one small hierarchy, and one line for other exceptions.

Each is also the builtin that it resembles, so that callers who do not know this package can catch
it. The command line returns its `exit_code`: 2 for wrong use, 1 for a failure of the job itself.
Messages are one line: the file or option, its value, the values allowed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager


class DistInitError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1
    shared = False
    """Whether every process of the run raises this error, so that only one has to print it."""


class UsageError(DistInitError, ValueError):
    """An option or a config key has a value that is not allowed."""

    exit_code = 2


class SourceError(UsageError):
    """A source has no videos: a missing folder, an empty list, only files of other kinds."""


class VideoError(DistInitError, ValueError):
    """A video cannot be read. The message is the reason, without the path."""


class DecoderError(DistInitError, RuntimeError):
    """Decoding fails on this machine for any video.

    A library is missing, a limit is too low, or a process cannot start.
    """


class TeacherError(UsageError):
    """A teacher is unknown or its module cannot be built."""


class WeightsError(DistInitError, ValueError):
    """A weights file is missing, has another sha256, or does not fit the model."""


class StoreError(DistInitError, OSError):
    """A target store cannot be opened or written: missing, corrupt, of another version."""


class StoreMismatchError(DistInitError, ValueError):
    """Two identities (of teachers, sampling, videos or stores) differ. The message names both."""


class CheckpointError(DistInitError, ValueError):
    """A checkpoint or an exported model is unreadable or does not fit."""


class LabelsError(DistInitError, ValueError):
    """A label file or a labelled folder is inconsistent."""


class ListError(SourceError, LabelsError):
    """A list or a csv file is not text in UTF-8, or has the paths of another system."""


class DeviceError(UsageError):
    """The machine does not have the requested device."""


class TrainingError(DistInitError, RuntimeError):
    """Training cannot continue: a loss that is not finite, no clip left to draw."""


class WorkerDied(TrainingError):
    """A loader process died or does not respond.

    `path` is the file that it was reading, and `reason` why that file may be at fault; both may be
    empty.
    """

    path = ""
    reason = ""


class RankLostError(TrainingError):
    """Another process of the same run has ended; its own error gives the reason."""


class TrainingInterrupted(DistInitError, RuntimeError):
    """Training was asked to stop (SIGTERM) and has written its checkpoint.

    The exit code asks to try again later (EX_TEMPFAIL).
    """

    exit_code = 75


def short(value: object) -> str:
    """Return the repr of a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of a third-party message, shortened; the type's name if it is empty."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:200]


def in_one_line(error: BaseException) -> str:
    """Return the type of a third-party error and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


@contextmanager
def third_party(prefix: str, failure: type[DistInitError]) -> Iterator[None]:
    """Turn exceptions of third-party code in the block into `failure`.

    Args:
        prefix: Begins the message.
        failure: Type of the error that is raised.
    """
    try:
        yield
    except DistInitError:
        raise
    except Exception as error:
        raise failure(f"{prefix}: {in_one_line(error)}") from error


def explain(error: BaseException) -> tuple[str, int]:
    """Return one line and the exit code for any exception."""
    disk_error = full_disk(error)
    if disk_error is not None:
        return (
            f"disk full while writing{_file_of(disk_error, error)}; free some space and run it again",
            1,
        )
    if isinstance(error, DistInitError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return str(limit_met(error)), 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1
    if isinstance(error, ModuleNotFoundError):
        return f"{error} (is the installation complete? pip install distinit)", 1
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]} (--debug shows where)", 1


def full_disk(error: BaseException) -> OSError | None:
    """Return the error of a full disk or quota that caused `error`, None for another cause."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return cause
    return None


def _file_of(disk_error: OSError, error: BaseException) -> str:
    if disk_error.filename:
        return f" {disk_error.filename}"
    return f": {error}" if isinstance(error, DistInitError) else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def limit_met(error: BaseException) -> str | None:
    """Return a message for an error about a system limit, None for another error.

    Libraries that pass descriptors between processes keep the message of such an error without its
    number.
    """
    # Windows has no such module, and --help works there.
    import resource

    number, message = getattr(error, "errno", None), str(error)
    if (
        number in (errno.EMFILE, errno.ENFILE)
        or "Too many open files" in message
        or "items of ancdata" in message
    ):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: a process may have {limit}; raise that limit (ulimit -n)"
    if number in (errno.EAGAIN, errno.ENOMEM):
        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        count = "any number of" if limit == resource.RLIM_INFINITY else str(limit)
        return f"no further process or memory: this user may have {count} processes (ulimit -u)"
    return None


_VARYING = re.compile(r"0x[0-9a-f]+|/[^\s:,'\"]+|'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", re.IGNORECASE)


class SameFailure:
    """Stop a run whose first videos all fail for one reason, before that reason is recorded.

    Such a reason is rarely the fault of the videos.

    Args:
        limit: Number of videos to watch; 0 watches none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._reasons: dict[int, str] = {}
        self._kind: str | None = None
        self.watching = limit > 0

    def add(self, video: int, reason: str | None, path: str) -> None:
        """Add the reason of a video, None if it is usable.

        Raises:
            DistInitError: It is the last of `limit` videos, and all failed for one reason.
        """
        if not self.watching or video in self._reasons:
            return
        kind = _kind(reason, path) if reason is not None else None
        if reason is None or self._kind not in (None, kind):
            self.watching = False
            return
        self._kind = kind
        self._reasons[video] = reason
        if len(self._reasons) >= self._limit:
            self._stop(f"the first {len(self._reasons)} videos")

    def finish(self) -> None:
        """End the watch after the last video.

        Raises:
            DistInitError: All of them failed for one reason.
        """
        if self.watching and self._reasons:
            self._stop(
                "the one video" if len(self._reasons) == 1 else f"all {len(self._reasons)} videos"
            )

    def _stop(self, which: str) -> None:
        reason = next(iter(self._reasons.values()))
        raise DistInitError(
            f"{which} failed for one reason, none of them is recorded: {reason}; "
            "if the videos are at fault, --max-failures 0 records it and continues"
        )


def _kind(reason: str, path: str) -> str:
    """Return the reason without parts that vary per video: its name, numbers, addresses."""
    for name in (path, os.path.basename(path)):
        reason = reason.replace(name, "")
    return _VARYING.sub("", reason)
