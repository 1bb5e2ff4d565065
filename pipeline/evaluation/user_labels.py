"""A user's own labels: a csv file, or a folder per side and class."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator

from ..common.errors import LabelsError, SourceError
from ..corpus.sources import escape_path, is_video, list_videos
from ..corpus.textfiles import is_utf8, read_text, refuse_windows_paths
from .listing import SIDES, Listing, Row, first_few, require_utf8, videos_in


def read_csv(path: str, split: int | None, root: str | None = None) -> Listing:
    """The rows that column `splitN` gives to a side, or all rows, on no side, where the split is
    None; `root` is what the paths are relative to, default the csv's folder. Raises LabelsError:
    missing columns, a row without path or label, not a csv."""
    base = os.path.abspath(root) if root is not None else os.path.dirname(path)
    reader_columns, rows = _table(path)
    if split is not None:
        _require_columns(path, reader_columns, split)
    used = list(_used_rows(path, rows, None if split is None else f"split{split}"))
    refuse_windows_paths(path, base, [row.path for row in used])
    named = {os.path.normpath(row["path"]) for _, row in rows if row["path"]}
    there = videos_in(base, (os.path.dirname(name) for name in named))
    return Listing(path, base, used, unlabelled=tuple(name for name in there if name not in named))


def csv_splits(path: str) -> tuple[int, ...]:
    """N of every column splitN, sorted. LabelsError where there is none."""
    columns, _ = _table(path)
    splits = _splits(columns)
    if not splits:
        raise LabelsError(f"{path}: no splitN column among: {', '.join(columns) or 'no columns'}")
    return tuple(splits)


def read_folder(root: str, split: int) -> Listing:
    """`ROOT/{train,test}/CLASS/…`. Raises LabelsError: another split than 1, a side that is not
    there, a video in no class folder."""
    if split != 1:
        raise LabelsError(f"{root}: a folder has split 1 only, got --split {split}")
    rows: list[Row] = []
    notes: list[str] = []
    for side in SIDES:
        folder = os.path.join(root, side)
        if not os.path.isdir(folder):
            raise LabelsError(
                f"{root}: no folder {side!r}; expected DIR/train/CLASS/… and DIR/test/CLASS/…"
            )
        try:
            listed = list_videos([f"{side}={folder}"]).paths
        except SourceError:
            listed = []  # an empty side is reported with the other checks
        for name in listed:
            label, slash, _ = name.partition("/")
            if not slash:
                raise LabelsError(f"{folder}: {escape_path(name)} stands in no class folder")
            rows.append(
                Row(f"{side}/{name}", class_name(label), side, f"{side}/{escape_path(label)}")
            )
        notes += _left_out(root, side, listed)
    return Listing(root, root, rows, notes=(*notes, *_other_folders(root)))


def class_name(folder: str) -> str:
    """The class of a folder: its name, percent-escaped where that is not UTF-8, for models and
    results hold it."""
    return folder if is_utf8(folder) else escape_path(folder)


def _left_out(root: str, side: str, listed: list[str]) -> Iterator[str]:
    """What of a side is no video by its ending, and the classes that have no video for it."""
    top = os.path.join(root, side)
    known, others = set(listed), []
    for folder, folders, names in os.walk(top, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = (
            os.path.normpath(os.path.relpath(os.path.join(folder, n), top))
            for n in sorted(names)
            if n[0] != "."
        )
        others += [name for name in below if name not in known and not is_video(name)]
    if others:
        shown = first_few((f"{side}/{name}" for name in others), 5)
        yield f"{len(others)} files of {root} are left out, for their ending is not that of a video: {shown}"
    used = {name.partition("/")[0] for name in listed}
    classes = (entry.name for entry in os.scandir(top) if entry.is_dir() and entry.name[0] != ".")
    if empty := sorted(name for name in classes if name not in used):
        yield f"{len(empty)} class folders of {os.path.join(root, side)} hold no video: {first_few(empty, 5)}"


def _other_folders(root: str) -> Iterator[str]:
    """Folders next to train and test, such as val, that hold videos."""
    for name in sorted(os.listdir(root)):
        if name in SIDES or name.startswith(".") or not os.path.isdir(os.path.join(root, name)):
            continue
        try:
            count = len(list_videos([f"other={os.path.join(root, name)}"]))
        except SourceError:
            continue
        yield f"{escape_path(name)}/ of {root} is not used ({count} videos): only train/ and test/ are"


def _table(path: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Columns, and ("line N", row) of every row."""
    try:
        # Names that are not UTF-8 travel as surrogates, like everywhere in Python's os module.
        reader = csv.DictReader(
            io.StringIO(read_text(path), newline=""), skipinitialspace=True, restval=""
        )
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        for name in ("path", "label"):
            if name not in columns:
                shown = escape_path(", ".join(columns)) or "no columns"
                raise LabelsError(f"{path}: no column {name!r} (found: {shown})")
        return columns, [(f"line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the label file ({error.strerror})") from error
    except csv.Error as error:
        raise LabelsError(f"{path}: not a csv file ({error})") from error


def _splits(columns: list[str]) -> list[int]:
    return sorted(
        int(m[1]) for m in (re.fullmatch(r"split([1-9]\d{0,8})", name) for name in columns) if m
    )


def _require_columns(path: str, columns: list[str], split: int) -> None:
    if split in _splits(columns):
        return
    splits = _splits(columns)
    there = (
        f"splits there are: {', '.join(map(str, splits))}"
        if splits
        else f"no splitN column among: {', '.join(columns) or 'no columns'}"
    )
    raise LabelsError(f"{path}: no column 'split{split}' ({there})")


def _used_rows(
    path: str, rows: Iterable[tuple[str, dict[str, str]]], column: str | None
) -> Iterable[Row]:
    for where, row in rows:
        side = "" if column is None else row[column].strip().lower()
        if column is not None and not side:
            continue
        if column is not None and side not in SIDES:
            found = row[column].strip()
            raise LabelsError(
                f"{path}: {where} has {column}={found!r}, allowed: {', '.join(SIDES)} or an empty cell"
            )
        name, label = row["path"], row["label"].strip()
        if not name or not label:
            raise LabelsError(f"{path}: {where} has no {'label' if name else 'path'}")
        source = row.get("source", "").strip()
        require_utf8(path, where, (label, source))
        yield Row(os.path.normpath(name), label, side, where, source)
