"""status.csv of a folder of copies, one line per video, and the summary of a run.

Both people and the next run read the file.
"""

from __future__ import annotations

import csv
import io
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..common.files import replacing
from ..common.streams import counted, printable
from ..video.pool.messages import INTERNAL

log = logging.getLogger(__name__)

Row = dict[str, Any]
Key = tuple[str, str]
"""(corpus, escaped path)"""

COLUMNS = (
    "corpus", "path", "status", "reason", "frames", "seconds", "source_bytes", "copy_bytes", "width", "height",
    "psnr", "ssim", "clipped", "note", "source_mtime_ns",
)  # fmt: skip
# The quantile at which the worst 5 % of the videos begin.
WORST = {"psnr": 0.05, "ssim": 0.05, "clipped": 0.95}


class StatusFile:
    """A csv file to which a row is appended per finished video.

    At the end of a run its rows are sorted into the order of the list. Memory holds only the lines,
    a short string per video.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[Key, str] = {}
        self._file: TextIO | None = None
        if path.exists():
            with open(path, newline="", encoding="utf-8", errors="replace") as file:
                for row in csv.reader(file):
                    # The last line of a killed run may be cut short: its video is processed again.
                    if len(row) == len(COLUMNS) and row[2] in ("ok", "failed"):
                        self._lines[row[0], row[1]] = _csv_line(row)

    def row(self, key: Key) -> Row | None:
        """Return the row of a video; all values are text."""
        line = self._lines.get(key)
        if line is None:
            return None
        return dict(zip(COLUMNS, next(csv.reader([line])), strict=True))

    def set(self, key: Key, row: Row) -> None:
        """Keep a row in memory, without writing it yet."""
        self._lines[key] = _csv_line(
            [*key, *("" if row.get(c) is None else printable(str(row[c])) for c in COLUMNS[2:])]
        )

    def begin(self) -> None:
        """Write the rows in memory, and open the file for appending."""
        self._write(self._lines)
        self._file = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (closed by finish)

    def add(self, key: Key, row: Row) -> None:
        """Add a new row and write it at once."""
        self.set(key, row)
        if self._file is not None:
            self._file.write(self._lines[key])
            self._file.flush()

    def finish(self, order: Iterable[Key]) -> None:
        """Write the rows of the listed videos in order, then those of earlier runs."""
        if self._file is not None:
            self._file.close()
            self._file = None
        listed = dict.fromkeys(key for key in order if key in self._lines)
        self._write({**listed, **dict.fromkeys(self._lines)})

    def _write(self, keys: Iterable[Key]) -> None:
        with replacing(self._path) as part, open(part, "x", newline="", encoding="utf-8") as file:
            file.write(_csv_line(COLUMNS))
            file.writelines(self._lines[key] for key in keys)


def _csv_line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


class Tally:
    """Totals over the copies so far, with a few numbers per video."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.ok = self.frames = self.source_bytes = self.copy_bytes = 0
        self.seconds = 0.0
        self.measured: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """Count a row of status.csv."""
        if row["status"] != "ok":
            self.reasons[str(row["reason"])] += 1
            return
        self.ok += 1
        self.frames += int(row["frames"])
        self.seconds += float(row["seconds"])
        self.source_bytes += int(row["source_bytes"])
        self.copy_bytes += int(row["copy_bytes"])
        for name in WORST:
            if row.get(name):
                self.measured[name].append(float(row[name]))


def summary(out: Path, videos: int, new: int, seconds: float, tally: Tally) -> dict[str, Any]:
    """Return the summary of a run that --json prints, and log it as text."""
    failed = sum(tally.reasons.values())
    if failed:
        log.info(f"{counted(failed, 'video')} failed; {out / 'status.csv'} lists them:")
        for reason, count in tally.reasons.most_common(10):
            log.info(f"  {count:6d}  {reason}")
    result: dict[str, Any] = {
        "out": str(out),
        "complete": tally.ok > 0
        and not any(reason.startswith(INTERNAL) for reason in tally.reasons),
        "videos": videos,
        "ok": tally.ok,
        "failed": failed,
        "failures": dict(tally.reasons.most_common(100)),
        "new": new,
        "seconds": round(seconds, 2),
        "frames": tally.frames,
        "video_seconds": round(tally.seconds, 2),
        "source_bytes": tally.source_bytes,
        "copy_bytes": tally.copy_bytes,
        "bytes_per_second": round(tally.copy_bytes / tally.seconds) if tally.seconds else None,
    }
    for name, worst in WORST.items():
        if column := tally.measured[name]:
            result[name] = {
                "mean": float(np.mean(column)),
                "worst_5_percent": float(np.quantile(column, worst)),
            }
    if not new:
        log.info("nothing to do: every video has its copy or a reason why not")
    if tally.ok:
        factor = tally.source_bytes / max(1, tally.copy_bytes)
        shown = f"{factor:.1f} times smaller" if factor >= 1 else f"{1 / factor:.1f} times larger"
        log.info(
            f"{tally.ok} done, {tally.copy_bytes / 1e6:.1f} MB for {tally.source_bytes / 1e6:.1f} MB of sources "
            f"({shown}, {tally.copy_bytes / max(tally.seconds, 1e-9) / 1e3:.1f} kB per second)"
        )
    if "psnr" in result and "ssim" in result:
        log.info(
            f"against the scaled source: PSNR {result['psnr']['mean']:.1f} dB, SSIM {result['ssim']['mean']:.3f}; "
            f"the worst 5 % of the videos below {result['psnr']['worst_5_percent']:.1f} dB, "
            f"{result['ssim']['worst_5_percent']:.3f}"
        )
    if "clipped" in result:
        log.info(
            f"beyond the bound: {result['clipped']['mean']:.3%} of the values; "
            f"above {result['clipped']['worst_5_percent']:.3%} in the worst 5 % of the videos"
        )
    return result
