"""Read Kinetics from its csv files: `label,youtube_id,time_start,time_end,split`.

Videos are found anywhere below the root by the names that usual downloaders give them,
`ID_000010_000020.mp4` (start and end in seconds).
"""

from __future__ import annotations

import csv
import io
import os

from ..common.documents import read_text
from ..common.errors import LabelsError, SourceError, UsageError
from ..corpus.sources import escape_path, list_videos
from .listing import Listing, Row, first_few, require_utf8

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_SIDES = {"train": "train", "val": "test", "validate": "test", "validation": "test"}
_FILES = ("train.csv", "val.csv", "validate.csv", "validation.csv")


def read_kinetics(where: str, split: int, root: str | None, partial: bool = False) -> Listing:
    """Read the rows of the train and validation sides; the latter is the test side.

    Args:
        where: A csv file with both sides, or a folder with train.csv and val.csv.
        split: Must be 1.
        root: The folder to search for videos, by default that of the csv.
        partial: Whether videos may be missing: many of Kinetics' are no longer on the web.

    Raises:
        UsageError: Another split than 1.
        LabelsError: A file cannot be read, or videos are missing or ambiguous.
    """
    if split != 1:
        raise UsageError(f"--split: kinetics has only split 1, got {split}")
    files = [where]
    if os.path.isdir(where):
        files = [path for name in _FILES if os.path.isfile(path := os.path.join(where, name))]
        if not files:
            raise LabelsError(f"{where}: expected train.csv and val.csv of Kinetics, found neither")
    root = os.path.abspath(root or (where if os.path.isdir(where) else os.path.dirname(where)))
    try:
        paths = list_videos([root]).paths
    except SourceError:
        raise LabelsError(
            f"--root {root}: expected videos such as ID_000010_000020.mp4, found none"
        ) from None
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    rows, used, missing = [], set(), 0
    for file in files:
        for name, side, label, line in _rows(file):
            matches = by_name.get(name, [])
            if len(matches) > 1:
                raise LabelsError(
                    f"{file}: {line}: {len(matches)} files have this name, {first_few(matches, 2)}"
                )
            missing += not matches
            used.update(matches)
            path = matches[0] if matches else f"{name}.mp4"
            where_listed = f"{os.path.basename(file)} {line}"
            rows.append(Row(path, label, side, where_listed, source=name.rsplit("_", 2)[0]))
    if missing and not partial:
        first = next(row for row in rows if row.path not in used)
        raise LabelsError(
            f"{where}: {missing} of {len(rows)} videos do not exist below {root}, the first is "
            f"{escape_path(first.path)} ({first.where}); download them, or give --partial"
        )
    return Listing(where, root, rows, unlabelled=tuple(path for path in paths if path not in used))


def _rows(path: str) -> list[tuple[str, str, str, str]]:
    """Return (name without ending, side, label, "line N") of the rows of both sides."""
    rows = []
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restval="")
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise LabelsError(
                f"{path}: no column {missing[0]!r} (found: {', '.join(columns) or 'none'})"
            )
        for row in reader:
            line = f"line {reader.line_num}"
            side = _SIDES.get(row["split"].strip().lower())
            if side is None:
                continue
            label = row["label"].strip()
            require_utf8(path, line, (label, row["youtube_id"]))
            try:
                start, end = int(float(row["time_start"])), int(float(row["time_end"]))
            except (ValueError, OverflowError):
                raise LabelsError(
                    f"{path}: {line}: expected seconds, got time_start {row['time_start']!r}, "
                    f"time_end {row['time_end']!r}"
                ) from None
            if not label or not row["youtube_id"].strip():
                raise LabelsError(f"{path}: {line} has no {'youtube_id' if label else 'label'}")
            rows.append((f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}", side, label, line))
    except (OSError, csv.Error) as error:
        raise LabelsError(f"{path}: cannot read the label file ({error})") from error
    return rows
