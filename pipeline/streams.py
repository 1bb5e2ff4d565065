"""Standard output and error in whatever encoding the terminal has."""

from __future__ import annotations

import io
from typing import TextIO


def never_fail_to_encode(*streams: TextIO | None) -> None:
    """Write what a stream's encoding lacks (Latin-1, ASCII) as escapes: a character must not end a job."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
