"""Kinetics from its csv files: `label,youtube_id,time_start,time_end,split`.

Videos are found by the names that the usual downloaders give them, `ID_000010_000020.mp4` (start
and end in seconds), wherever they lie below the root.
"""

from __future__ import annotations

import csv
import io
import os

from ..common.errors import LabelsError, SourceError, UsageError
from ..corpus.sources import escape_path, list_videos
from ..corpus.textfiles import read_text
from .listing import Listing, Row, first_few, require_utf8

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_SIDES = {"train": "train", "val": "test", "validate": "test", "validation": "test"}
_FILES = ("train.csv", "val.csv", "validate.csv", "validation.csv")


def read_kinetics(where: str, split: int, root: str | None, partial: bool = False) -> Listing:
    """`where` is a csv file with both sides, or a folder with train.csv and val.csv; validation is
    the test side.

    root: the folder searched for the videos, default that of the csv. Rows of other splits are left
    out. Unless `partial`, every video must be there: many of Kinetics' are gone from the web.
    """
    if split != 1:
        raise UsageError(f"--split: kinetics has split 1 only, got {split}")
    files = [where]
    if os.path.isdir(where):
        files = [path for name in _FILES if os.path.isfile(path := os.path.join(where, name))]
        if not files:
            raise LabelsError(f"{where}: no train.csv and val.csv; expected Kinetics' csv files")
    root = os.path.abspath(root or (where if os.path.isdir(where) else os.path.dirname(where)))
    try:
        paths = list_videos([root]).paths
    except SourceError:
        raise LabelsError(
            f"--root {root}: no videos in it, expected files such as ID_000010_000020.mp4"
        ) from None
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    rows, used, missing = [], set(), 0
    for file in files:
        for name, side, label, line in _rows(file):
            found = by_name.get(name, [])
            if len(found) > 1:
                raise LabelsError(
                    f"{file}: {line}: {len(found)} files are named so, {first_few(found, 2)}"
                )
            missing += not found
            used.update(found)
            listed = f"{os.path.basename(file)} {line}"
            rows.append(
                Row(
                    found[0] if found else f"{name}.mp4",
                    label,
                    side,
                    listed,
                    source=name.rsplit("_", 2)[0],
                )
            )
    if missing and not partial:
        first = next(row for row in rows if row.path not in used)
        raise LabelsError(
            f"{where}: {missing} of {len(rows)} videos are not below {root}, the first is "
            f"{escape_path(first.path)} ({first.where}); download them, or take --partial"
        )
    return Listing(where, root, rows, unlabelled=tuple(path for path in paths if path not in used))


def _rows(path: str) -> list[tuple[str, str, str, str]]:
    """(name without ending, side, label, "line N") of the rows that train or test."""
    found = []
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
                    f"{path}: {line}: time_start {row['time_start']!r}, time_end {row['time_end']!r}: not seconds"
                ) from None
            if not label or not row["youtube_id"].strip():
                raise LabelsError(f"{path}: {line} has no {'youtube_id' if label else 'label'}")
            found.append((f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}", side, label, line))
    except (OSError, csv.Error) as error:
        raise LabelsError(f"{path}: cannot read the label file ({error})") from error
    return found
