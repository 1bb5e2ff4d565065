"""Every error a user can meet, in one small hierarchy.

Each is also the builtin it resembles, so that callers who do not know this package can catch it.
`exit_code` is what the command line returns: 2 for wrong use, 1 for a failure of the job itself.
Messages are one line: the file or option, the value found, the values allowed.
"""

from __future__ import annotations

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
