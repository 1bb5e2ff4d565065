"""Videos of a store that a student must not see, above all those it will be tested on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .store import TargetStore


def read_leave_out(path: str) -> list[str]:
    """The lines of a list, CORPUS/PATH each; empty lines and lines from # on are skipped. UsageError if unreadable."""
    try:
        text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UsageError(f"leave_out: {path} cannot be read: {error.strerror}") from error
    return [line for line in (raw.strip() for raw in text.splitlines()) if line and not line.startswith("#")]


def leave_out_digest(path: str) -> str:
    """SHA-256 of which videos a list names, whatever their order: what a resumed run must share."""
    lines = "\n".join(sorted(set(read_leave_out(path))))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def without(store: TargetStore, videos: NDArray[np.int64], path: str) -> NDArray[np.int64]:
    """Those of `videos` that the list does not name.

    UsageError for a line that names no video of the store (a list with a slip in it would leave a test video in), and
    where nothing is left.
    """
    named = dict.fromkeys(read_leave_out(path))
    left_out = np.zeros(store.n_videos, bool)
    for video in range(store.n_videos):
        name = "/".join(store.place(video))
        if name in named:
            left_out[video] = True
            del named[name]
    if named:
        example = "/".join(store.place(0)) if store.n_videos else "CORPUS/PATH"
        raise UsageError(
            f"leave_out: {path}: {next(iter(named))!r} ({len(named)} such) is not in {store.name}; "
            f"a line is CORPUS/PATH, as in {example!r}"
        )
    kept = videos[~left_out[videos]]
    if len(kept) == 0:
        raise UsageError(f"leave_out: {path} names every video of {store.name} that could be drawn")
    return kept
