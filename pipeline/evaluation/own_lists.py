"""A user's own labels: a csv file, or a folder per side and class."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable

from ..corpus.sources import escape_path, list_videos
from ..errors import LabelsError, SourceError
from .listing import SIDES, Listing, Row, videos_in


def read_csv(path: str, split: int, root: str | None = None) -> Listing:
    """The rows that column `splitN` gives to a side; `root` is what the paths are relative to, default the csv's
    folder. Raises LabelsError: missing columns, a row without path or label, not a csv."""
    base = os.path.abspath(root) if root is not None else os.path.dirname(path)
    reader_columns, rows = _table(path)
    _require_columns(path, reader_columns, split)
    used = list(_used_rows(path, rows, f"split{split}"))
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
    """`ROOT/{train,test}/CLASS/…`. Raises LabelsError: another split than 1, a side that is not there, a video in no
    class folder."""
    if split != 1:
        raise LabelsError(f"{root}: a folder has split 1 only, got --split {split}")
    rows = []
    for side in SIDES:
        folder = os.path.join(root, side)
        if not os.path.isdir(folder):
            raise LabelsError(f"{root}: no folder {side!r}; expected DIR/train/CLASS/… and DIR/test/CLASS/…")
        try:
            listed = list_videos([f"{side}={folder}"])
        except SourceError:
            continue  # an empty side is reported with the other checks
        for name in listed.paths:
            label, slash, _ = name.partition("/")
            if not slash:
                raise LabelsError(f"{folder}: {escape_path(name)} stands in no class folder")
            rows.append(Row(f"{side}/{name}", label, side, f"{side}/{label}"))
    return Listing(root, root, rows)


def _table(path: str) -> tuple[list[str], list[tuple[str, dict[str, str]]]]:
    """Columns, and ("line N", row) of every row."""
    try:
        # Names that are not UTF-8 travel as surrogates, like everywhere in Python's os module.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            for name in ("path", "label"):
                if name not in columns:
                    raise LabelsError(f"{path}: no column {name!r} (found: {', '.join(columns) or 'no columns'})")
            return columns, [(f"line {reader.line_num}", row) for row in reader]
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the label file ({error.strerror})") from error
    except csv.Error as error:
        raise LabelsError(f"{path}: not a csv file ({error})") from error


def _splits(columns: list[str]) -> list[int]:
    return sorted(int(m[1]) for m in (re.fullmatch(r"split([1-9]\d*)", name) for name in columns) if m)


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


def _used_rows(path: str, rows: Iterable[tuple[str, dict[str, str]]], column: str) -> Iterable[Row]:
    for where, row in rows:
        side = row[column].strip().lower()
        if not side:
            continue
        if side not in SIDES:
            found = row[column].strip()
            raise LabelsError(f"{path}: {where} has {column}={found!r}, allowed: {', '.join(SIDES)} or an empty cell")
        name, label = row["path"], row["label"].strip()
        if not name or not label:
            raise LabelsError(f"{path}: {where} has no {'label' if name else 'path'}")
        yield Row(os.path.normpath(name), label, side, where, row.get("source", "").strip())
