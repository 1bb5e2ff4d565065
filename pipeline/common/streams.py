"""Text for terminals and pages, in any encoding, without characters that control a terminal.

Names of classes, videos and teachers, reasons and messages of libraries may come from third-party
files. All text that leaves the program passes `printable`: in `console.Console` (lines,
tables, progress), in `CleanStream` (text that Python, click and libraries write to standard output
and error) and in `files.write_page` (pages, Markdown, CSV, SVG).
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# C0, DEL and C1; marks, embeddings, overrides and isolates that change the order of text; line and
# paragraph separators; annotations; halves of surrogate pairs, which stand for bytes of file names
# that are not UTF-8.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)
_UNSAFE_IN_LINES = re.compile(_UNSAFE.pattern.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f"))


def counted(count: int, noun: str, plural: str = "s") -> str:
    """Return a number with its noun.

    Example:
        >>> counted(1, "video"), counted(3, "process", "es")
        ('1 video', '3 processes')
    """
    return f"{count} {noun}{'' if count == 1 else plural}"


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return the text with unprintable characters escaped, as in `\x1b`.

    These are control characters, characters that reorder text, and undecodable bytes.

    Args:
        text: Any text.
        lines: Keep line feeds, for a text of several lines.
    """
    if text.isprintable():
        return text
    return (_UNSAFE_IN_LINES if lines else _UNSAFE).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON in printable ASCII."""
    # `json` escapes every other unprintable character itself.
    return json.dumps(value, allow_nan=False, indent=indent).replace("\x7f", "\\u007f")


class CleanStream:
    """A text stream that escapes unprintable characters, for text that no `Console` writes.

    Line feeds, tabs and carriage returns pass, since the progress bars of libraries need them.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write the text, escaped, and return the length of the original."""
        self.stream.write(
            text if text.isprintable() else re.sub(r"[^\n\r\t]+", lambda m: printable(m[0]), text)
        )
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def clean_streams() -> Iterator[None]:
    """Write standard output and error through a `CleanStream` during the block."""
    never_fail_to_encode(sys.stdout, sys.stderr)
    out, err = (cast(TextIO, CleanStream(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


def raw_stream(stream: TextIO) -> TextIO:
    """Return the stream below a `CleanStream`.

    It is for a writer that escapes text itself and sends its own escape codes.
    """
    return stream.stream if isinstance(stream, CleanStream) else stream


def never_fail_to_encode(*streams: TextIO | None) -> None:
    """Let the streams escape characters that their encodings (Latin-1, ASCII) lack.

    A character must not end a job.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
