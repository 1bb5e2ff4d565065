"""Read labels: a csv file, the csv files of Kinetics, or a folder per side and class.

Videos of Kinetics may be anywhere below the root. They are recognised by the names that common
downloaders give them, `ID_000010_000020.mp4` (start and end in seconds).
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from ..common.documents import is_utf8, read_text, refuse_windows_paths
from ..common.errors import LabelsError, SourceError, UsageError
from ..corpus.sources import escape_path, is_video, list_videos
from .listing import SIDES, VAL, Listing, Row, first_few, require_utf8, videos_in

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
_KINETICS_SIDES = {"train": "train", "val": "test", "validate": "test", "validation": "test"}
_KINETICS_FILES = ("train.csv", "val.csv", "validate.csv", "validation.csv")


def read_csv(path: str, split: int | None, root: str | None = None) -> Listing:
    """Read the rows of a csv file that column `splitN` assigns to a side.

    Args:
        path: The csv file.
        split: N; None for all rows, whose side is then "".
        root: The folder that paths are relative to, by default that of the csv.

    Raises:
        LabelsError: The file is not a csv, or lacks a column, a path or a label.
    """
    base = os.path.abspath(root) if root is not None else os.path.dirname(path)
    columns, rows = _table(path)
    if split is not None and split not in (splits := _splits(columns)):
        choices = (
            f"its splits: {', '.join(map(str, splits))}"
            if splits
            else f"no splitN column among: {', '.join(columns) or 'no columns'}"
        )
        raise LabelsError(f"{path}: no column 'split{split}' ({choices})")
    split_rows = list(_split_rows(path, rows, None if split is None else f"split{split}"))
    refuse_windows_paths(path, base, [row.path for row in split_rows])
    listed = {os.path.normpath(row["path"]) for _, row in rows if row["path"]}
    existing = videos_in(base, (os.path.dirname(name) for name in listed))
    unlabelled = tuple(name for name in existing if name not in listed)
    return Listing(path, base, split_rows, unlabelled=unlabelled)


def csv_splits(path: str) -> tuple[int, ...]:
    """Return the sorted numbers N of the columns splitN.

    Raises:
        LabelsError: There is no such column.
    """
    columns, _ = _table(path)
    splits = _splits(columns)
    if not splits:
        raise LabelsError(f"{path}: no splitN column among: {', '.join(columns) or 'no columns'}")
    return tuple(splits)


def read_kinetics(path: str, split: int, root: str | None, partial: bool = False) -> Listing:
    """Read the train and validation sides of Kinetics; the latter is used as the test side.

    Args:
        path: A csv file with both sides, or a folder with train.csv and val.csv.
        split: Must be 1.
        root: The folder to search for videos, by default that of the csv.
        partial: Whether videos may be missing, since many of Kinetics are no longer online.

    Raises:
        UsageError: Another split than 1.
        LabelsError: A file cannot be read, or videos are missing or ambiguous.
    """
    if split != 1:
        raise UsageError(f"--split: kinetics has only split 1, got {split}")
    files = [path]
    if os.path.isdir(path):
        files = [
            file for name in _KINETICS_FILES if os.path.isfile(file := os.path.join(path, name))
        ]
        if not files:
            raise LabelsError(f"{path}: expected train.csv and val.csv of Kinetics, found neither")
    root = os.path.abspath(root or (path if os.path.isdir(path) else os.path.dirname(path)))
    try:
        videos = list_videos([root]).paths
    except SourceError:
        raise LabelsError(
            f"--root {root}: expected videos such as ID_000010_000020.mp4, found none"
        ) from None
    by_name: dict[str, list[str]] = {}
    for video in videos:
        by_name.setdefault(os.path.splitext(os.path.basename(video))[0], []).append(video)
    rows, matched, num_missing = [], set(), 0
    for file in files:
        for name, side, label, line in _kinetics_rows(file):
            matches = by_name.get(name, [])
            if len(matches) > 1:
                raise LabelsError(
                    f"{file}: {line}: {len(matches)} files have this name, {first_few(matches, 2)}"
                )
            num_missing += not matches
            matched.update(matches)
            video = matches[0] if matches else f"{name}.mp4"
            location = f"{os.path.basename(file)} {line}"
            rows.append(Row(video, label, side, location, source=name.rsplit("_", 2)[0]))
    if num_missing and not partial:
        first = next(row for row in rows if row.path not in matched)
        raise LabelsError(
            f"{path}: {num_missing} of {len(rows)} videos do not exist below {root}, the first is "
            f"{escape_path(first.path)} ({first.location}); download them, or give --partial"
        )
    unlabelled = tuple(video for video in videos if video not in matched)
    return Listing(path, root, rows, unlabelled=unlabelled)


def read_folder(root: str, split: int) -> Listing:
    """Read `ROOT/{train,test}/CLASS/…`, and `ROOT/val/CLASS/…` if it exists.

    Raises:
        LabelsError: Another split than 1, a missing side, or a video outside of a class folder.
    """
    if split != 1:
        raise LabelsError(f"{root}: a folder has only split 1, got --split {split}")
    rows: list[Row] = []
    notes: list[str] = []
    sides = (*SIDES, VAL) if os.path.isdir(os.path.join(root, VAL)) else SIDES
    for side in sides:
        folder = os.path.join(root, side)
        if not os.path.isdir(folder):
            raise LabelsError(
                f"{root}: expected DIR/train/CLASS/… and DIR/test/CLASS/…, found no folder {side!r}"
            )
        try:
            listed = list_videos([f"{side}={folder}"]).paths
        except SourceError:
            # An empty side is reported by `check_rows`.
            listed = []
        for name in listed:
            label, slash, _ = name.partition("/")
            if not slash:
                raise LabelsError(f"{folder}: {escape_path(name)} is in no class folder")
            rows.append(
                Row(f"{side}/{name}", class_name(label), side, f"{side}/{escape_path(label)}")
            )
        notes += _skipped_files(root, side, listed)
    return Listing(root, root, rows, notes=(*notes, *_other_folders(root)))


def class_name(folder: str) -> str:
    """Return the class of a folder: its name, percent-escaped if it is not UTF-8.

    Models and results store the name as UTF-8.
    """
    return folder if is_utf8(folder) else escape_path(folder)


def _skipped_files(root: str, side: str, listed: list[str]) -> Iterator[str]:
    """Yield a note on files without the ending of a video, and one on classes without videos."""
    top = os.path.join(root, side)
    videos, other_files = set(listed), []
    for folder, folders, names in os.walk(top, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (
            os.path.normpath(os.path.relpath(os.path.join(folder, name), top))
            for name in sorted(names)
            if name[0] != "."
        )
        other_files += [path for path in paths if path not in videos and not is_video(path)]
    if other_files:
        shown = first_few((f"{side}/{name}" for name in other_files), 5)
        yield f"{len(other_files)} files of {root} are skipped, since their endings are not those of videos: {shown}"
    used_classes = {name.partition("/")[0] for name in listed}
    classes = (entry.name for entry in os.scandir(top) if entry.is_dir() and entry.name[0] != ".")
    if empty := sorted(name for name in classes if name not in used_classes):
        yield f"{len(empty)} class folders of {os.path.join(root, side)} have no video: {first_few(empty, 5)}"


def _other_folders(root: str) -> Iterator[str]:
    """Yield a note on each folder with videos next to train, val and test."""
    for name in sorted(os.listdir(root)):
        if (
            name in (*SIDES, VAL)
            or name.startswith(".")
            or not os.path.isdir(os.path.join(root, name))
        ):
            continue
        try:
            count = len(list_videos([f"other={os.path.join(root, name)}"]))
        except SourceError:
            continue
        yield f"{escape_path(name)}/ of {root} is not used ({count} videos), only train/, val/ and test/ are"


def _table(
    path: str, required: Sequence[str] = ("path", "label")
) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Return the columns, and ("line N", row) of every row."""
    try:
        # Names that are not UTF-8 are read as surrogates, as in Python's os module.
        reader = csv.DictReader(
            io.StringIO(read_text(path), newline=""), skipinitialspace=True, restval=""
        )
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        for name in required:
            if name not in columns:
                shown = escape_path(", ".join(columns)) or "no columns"
                raise LabelsError(f"{path}: no column {name!r} (found: {shown})")
        return columns, [(f"line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the label file ({error.strerror})") from error
    except csv.Error as error:
        raise LabelsError(f"{path}: not a csv file ({error})") from error


def _kinetics_rows(path: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name without ending, side, label, "line N") of the rows of both sides."""
    for line, row in _table(path, KINETICS_COLUMNS)[1]:
        side = _KINETICS_SIDES.get(row["split"].strip().lower())
        if side is None:
            continue
        label, video = row["label"].strip(), row["youtube_id"].strip()
        require_utf8(path, line, (label, video))
        try:
            start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        except (ValueError, OverflowError):
            raise LabelsError(
                f"{path}: {line}: expected seconds, got time_start {row['time_start']!r}, "
                f"time_end {row['time_end']!r}"
            ) from None
        if not label or not video:
            raise LabelsError(f"{path}: {line} has no {'youtube_id' if label else 'label'}")
        yield f"{video}_{start:06d}_{end:06d}", side, label, line


def _splits(columns: list[str]) -> list[int]:
    return sorted(
        int(match[1]) for name in columns if (match := re.fullmatch(r"split([1-9]\d{0,8})", name))
    )


def _split_rows(
    path: str, rows: Iterable[tuple[str, dict[str, str]]], column: str | None
) -> Iterable[Row]:
    """Yield the rows with a side in a column; None for all rows, whose side is then ""."""
    for location, row in rows:
        side = "" if column is None else row[column].strip().lower()
        if column is not None and not side:
            continue
        if column is not None and side not in (*SIDES, VAL):
            value = row[column].strip()
            raise LabelsError(
                f"{path}: {location} has {column}={value!r}, expected {', '.join((*SIDES, VAL))} or an empty cell"
            )
        name, label = row["path"], row["label"].strip()
        if not name or not label:
            raise LabelsError(f"{path}: {location} has no {'label' if name else 'path'}")
        source = row.get("source", "").strip()
        require_utf8(path, location, (label, source))
        yield Row(os.path.normpath(name), label, side, location, source)
