"""Every error a user can meet, in one small hierarchy, and one line for any other exception.

Each is also the builtin it resembles, so that callers who do not know this package can catch it.
`exit_code` is what the command line returns: 2 for wrong use, 1 for a failure of the job itself.
Messages are one line: the file or option, the value found, the values allowed.
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
    """Raised alike in every process of one run, so that one of them tells it."""


class UsageError(DistInitError, ValueError):
    """An option or a config key has a value that is not allowed."""

    exit_code = 2


class SourceError(UsageError):
    """A video source names nothing: no such folder, an empty list, no videos found."""


class VideoError(DistInitError, ValueError):
    """A video cannot be read. The message is the reason, without the path."""


class DecoderError(DistInitError, RuntimeError):
    """Decoding does not work on this machine, whatever the video.

    A library is missing, a limit is too low, or a process cannot start.
    """


class TeacherError(UsageError):
    """A teacher is unknown or its module cannot be built."""


class WeightsError(DistInitError, ValueError):
    """A weights file is missing, has another sha256, or does not fit the model."""


class StoreError(DistInitError, OSError):
    """A target store cannot be opened or written: missing, corrupt, of another version."""


class StoreMismatchError(DistInitError, ValueError):
    """Two identities differ: of teachers, sampling, videos or stores. Names both sides."""


class CheckpointError(DistInitError, ValueError):
    """A checkpoint or an exported model is unreadable or does not fit."""


class LabelsError(DistInitError, ValueError):
    """A label file or a labelled folder is inconsistent."""


class ListError(SourceError, LabelsError):
    """A list or a csv file is not text in UTF-8, or names files in the way of another system."""


class DeviceError(UsageError):
    """A device was asked for that this machine does not have."""


class TrainingError(DistInitError, RuntimeError):
    """Training cannot continue: a loss that is not finite, no clip left to draw."""


class WorkerDied(TrainingError):
    """A loader process died or gave no answer.

    `path` is the file that it was reading, and `reason` why that file may be at fault; both may be
    empty.
    """

    path = ""
    reason = ""


class RankLostError(TrainingError):
    """Another process of the same run has ended; its own error says why."""


class TrainingInterrupted(DistInitError, RuntimeError):
    """Training was asked to stop (SIGTERM) and has written its checkpoint.

    The exit code asks to try again later (EX_TEMPFAIL).
    """

    exit_code = 75


def short(value: object) -> str:
    """Return how Python writes a value, for a message: at most 80 characters."""
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
def third_party(who: str, failure: type[DistInitError]) -> Iterator[None]:
    """Raise `failure` for whatever third-party code in the block raises, except errors of distinit.

    who: begins the message.
    """
    try:
        yield
    except DistInitError:
        raise
    except Exception as error:
        raise failure(f"{who}: {in_one_line(error)}") from error


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


def limit_met(error: BaseException) -> str | None:
    """Return which limit of the system an error speaks of and how to raise it, None for another.

    Libraries that pass descriptors between processes drop the number of the error and keep its
    words.
    """
    import resource  # Windows has none, where --help works

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


_VARYING = re.compile(r"0x[0-9a-f]+|/[^\s:,'\"]+|'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", re.IGNORECASE)


class SameFailure:
    """Stop a run whose first videos all fail for one reason, before that reason is recorded.

    It is hardly the videos' own.

    Args:
        limit: Number of videos whose outcome is watched; 0: of none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: dict[int, str] = {}
        self._kind: str | None = None
        self.watching = limit > 0

    def see(self, video: int, reason: str | None, path: str) -> None:
        """Add the reason of a video, None if it is usable.

        Raises:
            DistInitError: It is the last that was waited for, and all failed for one reason.
        """
        if not self.watching or video in self._seen:
            return
        kind = _kind(reason, path) if reason is not None else None
        if reason is None or self._kind not in (None, kind):
            self.watching = False
            return
        self._kind = kind
        self._seen[video] = reason
        if len(self._seen) >= self._limit:
            self._stop(f"the first {len(self._seen)} videos")

    def finish(self) -> None:
        """End the watch: there are no more videos.

        Raises:
            DistInitError: All of them failed for one reason.
        """
        if self.watching and self._seen:
            self._stop("the one video" if len(self._seen) == 1 else f"all {len(self._seen)} videos")

    def _stop(self, which: str) -> None:
        reason = next(iter(self._seen.values()))
        raise DistInitError(
            f"{which} failed for one reason, nothing of them is recorded: {reason}; "
            "if it is the videos' own, --max-failures 0 records it and continues"
        )


def _kind(reason: str, path: str) -> str:
    """Return the reason without what varies from video to video: its name, numbers, addresses."""
    for name in (path, os.path.basename(path)):
        reason = reason.replace(name, "")
    return _VARYING.sub("", reason)
