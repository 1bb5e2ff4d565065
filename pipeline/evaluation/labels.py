"""Labelled data sets: which videos train, which test, and of which class.

Two forms are read: `csv:FILE` and `folder:DIR`. Whatever the form, the result is checked in the same way, so
that no number is ever computed on a list that leaks, misses files or names a class it cannot learn.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..corpus.sources import escape_path, list_videos
from ..errors import LabelsError, SourceError, UsageError, VideoError
from ..video.folders import CopyFolder
from ..video.reading import VideoFile

SIDES = ("train", "test")


class Labelled(NamedTuple):
    """One labelled video: its path relative to `Labels.root` and the index of its class."""

    path: str
    label: int


@dataclass(frozen=True)
class Labels:
    """One split of a labelled data set: classes[K], train and test videos.

    copies: where the videos are read from, if not from their own files.
    """

    dataset: str
    split: int
    root: str
    classes: tuple[str, ...]
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    copies: CopyFolder | None = None

    def file(self, video: Labelled) -> VideoFile:
        """Where a video is read. VideoError where it has no copy."""
        path = self.absolute(video)
        if self.copies is None:
            return VideoFile(path)
        return VideoFile(self.copies.find(self.root, video.path), self.copies.kind, path)

    def absolute(self, video: Labelled) -> str:
        return os.path.join(self.root, video.path)

    def __repr__(self) -> str:
        return (
            f"Labels({self.dataset}, split {self.split}, classes[{len(self.classes)}], "
            f"train[{len(self.train)}], test[{len(self.test)}])"
        )


@dataclass(frozen=True)
class _Row:
    """A video as listed, before any check. `where` says to a person where it was listed."""

    path: str
    label: str
    side: str
    where: str


def load_labels(dataset: str, split: int | None = None, videos: str | None = None) -> Labels:
    """Reads `csv:FILE` or `folder:DIR`; the split is 1 where it is left out.

    csv: columns `path` (relative to the csv's folder), `label` and `splitN`, whose values are `train`, `test`
    or anything else (not used in this split); other columns are ignored. folder: `DIR/{train,test}/CLASS/…`,
    which has split 1 only. videos: a folder of copies by `distinit prepare` to read in place of the videos, which
    then need not be there.

    Raises UsageError for another form, and LabelsError (one line, naming the file and what was found) for
    missing columns, unknown paths, an empty side, a class on one side only, a file on both sides or of two
    classes.
    """
    kind, colon, where = dataset.partition(":")
    if not colon or kind not in _READERS or not where:
        raise UsageError(f"--dataset {dataset!r}: expected csv:FILE or folder:DIR")
    root, rows = _READERS[kind](os.path.abspath(where), 1 if split is None else split)
    copies = None if videos is None else CopyFolder.open(videos)
    return _check(dataset, 1 if split is None else split, os.path.abspath(where), root, rows, copies)


def _read_csv(path: str, split: int) -> tuple[str, list[_Row]]:
    try:
        # Names that are not UTF-8 travel as surrogates, like everywhere in Python's os module.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            _require_columns(path, columns, split)
            rows = list(_used_rows(path, reader, f"split{split}"))
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the label file ({error.strerror})") from error
    except csv.Error as error:
        raise LabelsError(f"{path}: not a csv file ({error})") from error
    return os.path.dirname(path), rows


def _require_columns(path: str, columns: list[str], split: int) -> None:
    found = ", ".join(columns) or "no columns"
    for name in ("path", "label"):
        if name not in columns:
            raise LabelsError(f"{path}: no column {name!r} (found: {found})")
    if f"split{split}" not in columns:
        splits = [m.group(1) for m in (re.fullmatch(r"split(\d+)", name) for name in columns) if m]
        there = f"splits there are: {', '.join(splits)}" if splits else f"no splitN column among: {found}"
        raise LabelsError(f"{path}: no column 'split{split}' ({there})")


def _used_rows(path: str, reader: csv.DictReader[str], column: str) -> Iterable[_Row]:
    for row in reader:
        side = row[column].strip().lower()
        if side not in SIDES:
            continue
        where = f"line {reader.line_num}"
        name, label = row["path"], row["label"].strip()
        if not name or not label:
            raise LabelsError(f"{path}: {where} has no {'label' if name else 'path'}")
        yield _Row(os.path.normpath(name), label, side, where)


def _read_folder(root: str, split: int) -> tuple[str, list[_Row]]:
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
            rows.append(_Row(f"{side}/{name}", label, side, f"{side}/{label}"))
    return root, rows


_READERS: dict[str, Callable[[str, int], tuple[str, list[_Row]]]] = {"csv": _read_csv, "folder": _read_folder}


def _check(
    dataset: str, split: int, source: str, root: str, rows: list[_Row], copies: CopyFolder | None = None
) -> Labels:
    for side in SIDES:
        if not any(row.side == side for row in rows):
            raise LabelsError(f"{source}: split {split} has no {side} videos ({len(rows)} rows are used)")
    rows = _one_row_per_file(source, root, rows, copies)
    classes = _classes(source, rows)
    index = {name: i for i, name in enumerate(classes)}
    if copies is not None and not any(_has_copy(copies, root, row.path) for row in rows):
        raise UsageError(f"--videos {copies.folder}: holds a copy of none of the {len(rows)} videos of {source}")
    sides = {side: tuple(Labelled(row.path, index[row.label]) for row in rows if row.side == side) for side in SIDES}
    return Labels(dataset, split, root, classes, sides["train"], sides["test"], copies)


def _one_row_per_file(source: str, root: str, rows: list[_Row], copies: CopyFolder | None) -> list[_Row]:
    """Drops plain repetitions; refuses paths that are not there and files with two labels or sides."""
    kept: dict[tuple[int, int], _Row] = {}
    missing: list[_Row] = []
    for row in rows:
        try:
            found = _stat(root, row.path, copies)
        except (OSError, ValueError):  # ValueError: a null byte in the name, or no copy
            missing.append(row)
            continue
        # Device and inode, not the name: a link to a training video in the test list leaks as well.
        first = kept.setdefault((found.st_dev, found.st_ino), row)
        if first.label != row.label:
            raise LabelsError(
                f"{source}: {escape_path(row.path)} has two labels, "
                f"{first.label!r} ({first.where}) and {row.label!r} ({row.where})"
            )
        if first.side != row.side:
            raise LabelsError(
                f"{source}: the same file is on both sides of the split, {escape_path(first.path)} "
                f"({first.where}, {first.side}) and {escape_path(row.path)} ({row.where}, {row.side})"
            )
    if missing:
        raise LabelsError(
            f"{source}: {len(missing)} of {len(rows)} paths do not exist; the first is "
            f"{escape_path(missing[0].path)} ({missing[0].where}), looked for in {root}"
        )
    return list(kept.values())


def _stat(root: str, path: str, copies: CopyFolder | None) -> os.stat_result:
    """Of the video, or where it is gone of its copy."""
    try:
        return os.stat(os.path.join(root, path))
    except OSError:
        if copies is None:
            raise
        return os.stat(copies.find(root, path))


def _has_copy(copies: CopyFolder, root: str, path: str) -> bool:
    try:
        return bool(copies.find(root, path))
    except VideoError:
        return False


def _classes(source: str, rows: list[_Row]) -> tuple[str, ...]:
    train, test = ({row.label for row in rows if row.side == side} for side in SIDES)
    if train != test:
        alone = {side: sorted(names) for side, names in (("train", train - test), ("test", test - train)) if names}
        shown = (
            f"only in {side}: {', '.join(map(repr, names[:5]))}{', …' if len(names) > 5 else ''}"
            for side, names in alone.items()
        )
        raise LabelsError(
            f"{source}: {len(train ^ test)} of {len(train | test)} classes are on one side of the split alone, "
            f"{'; '.join(shown)}"
        )
    names = sorted(train)
    if all(name.isdecimal() for name in names):  # numbered classes in the order of their numbers
        names.sort(key=int)
    return tuple(names)
