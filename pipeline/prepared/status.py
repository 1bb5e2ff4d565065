"""status.csv of a folder of copies: one line a video, for people, and for the next run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from ..common.files import replacing
from ..common.streams import printable

Row = dict[str, Any]
Key = tuple[str, str]
"""(corpus, escaped path)"""

COLUMNS = (
    "corpus", "path", "status", "reason", "frames", "seconds", "source_bytes", "copy_bytes", "width", "height",
    "psnr", "ssim", "clipped", "note", "source_mtime_ns",
)  # fmt: skip


class StatusFile:
    """A csv file to which a row is appended per finished video.

    The end of a run sorts it into the order of the list. Only the lines are kept in memory, a short
    string per video.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[Key, str] = {}
        self._file: TextIO | None = None
        if path.exists():
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.reader(file):
                    # The last line of a killed run may be cut short: that video is looked at again.
                    if len(row) == len(COLUMNS) and row[2] in ("ok", "failed"):
                        self._lines[row[0], row[1]] = _line(row)

    def row(self, key: Key) -> Row | None:
        """Return the row of a video; all values are text."""
        line = self._lines.get(key)
        if line is None:
            return None
        return dict(zip(COLUMNS, next(csv.reader([line])), strict=True))

    def set(self, key: Key, row: Row) -> None:
        """Know a row, without writing it yet."""
        self._lines[key] = _line(
            [*key, *("" if row.get(c) is None else printable(str(row[c])) for c in COLUMNS[2:])]
        )

    def begin(self) -> None:
        """Write what is known, and open the file to append."""
        self._write(self._lines)
        self._file = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed by finish)

    def add(self, key: Key, row: Row) -> None:
        """Add a new row and write it at once."""
        self.set(key, row)
        if self._file is not None:
            self._file.write(self._lines[key])
            self._file.flush()

    def finish(self, order: Iterable[Key]) -> None:
        """Put the listed videos in order, then those that earlier runs listed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        listed = dict.fromkeys(key for key in order if key in self._lines)
        self._write({**listed, **dict.fromkeys(self._lines)})

    def _write(self, keys: Iterable[Key]) -> None:
        with replacing(self._path) as part, open(part, "x", newline="", encoding="utf-8") as file:
            file.write(_line(COLUMNS))
            file.writelines(self._lines[key] for key in keys)


def _line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
