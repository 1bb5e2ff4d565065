"""Labelled data sets: which videos train, which test, and of which class.

Five forms are read: `csv:FILE`, `folder:DIR`, `kinetics:FILE`, `hmdb51` and `ucf101`. Whatever the
form, the result is checked in the same way, so that no number is ever computed on a list that
leaks, misses files or names a class it cannot learn.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..clips.content import VideoFile, same_content, source_digest
from ..common.errors import CheckpointError, LabelsError, UsageError, VideoError
from ..corpus.sources import escape_path
from ..corpus.textfiles import is_utf8
from ..prepared.folders import CopyFolder
from ..video.container import digest
from .kinetics import read_kinetics
from .listing import SIDES, Listing, Row, first_few, videos_in
from .official import READERS as OFFICIAL
from .official import SPLITS as OFFICIAL_SPLITS
from .user_labels import csv_splits, read_csv, read_folder

FORMS = "csv:FILE, folder:DIR, kinetics:FILE, hmdb51 or ucf101 (these two with --root DIR)"


class Labelled(NamedTuple):
    """One labelled video: its path relative to `Labels.root`, the index of its class, and the
    recording it was cut from ("" where that is not known)."""

    path: str
    label: int
    source: str = ""


@dataclass(frozen=True)
class Labels:
    """One split of a labelled data set: classes[K], train and test videos.

    copies: where the videos are read from, if not from their own files. notes: what a user should
    know of the list, a line each. shared_sources: test videos cut from a recording that training
    videos are cut from too.
    """

    dataset: str
    split: int
    root: str
    classes: tuple[str, ...]
    train: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    copies: CopyFolder | None = None
    notes: tuple[str, ...] = ()
    shared_sources: int = 0

    def file(self, video: Labelled) -> VideoFile:
        """Where a video is read. VideoError where it has no copy."""
        path = self.absolute(video)
        if self.copies is None:
            return VideoFile(path)
        return VideoFile(self.copies.find(self.root, video.path), self.copies.kind, path)

    def absolute(self, video: Labelled) -> str:
        return os.path.join(self.root, video.path)

    def digest(self, video: Labelled) -> str:
        """Of the video's own file, or where that is gone what its copy says of it; "" where neither
        can be read."""
        try:
            path = self.absolute(video)
            own = self.copies is None or os.path.exists(path)
            return digest(path) if own else source_digest(self.file(video))
        except (VideoError, OSError):
            return ""

    def __repr__(self) -> str:
        return (
            f"Labels({self.dataset}, split {self.split}, classes[{len(self.classes)}], "
            f"train[{len(self.train)}], test[{len(self.test)}])"
        )


def load_labels(
    dataset: str,
    split: int | None = None,
    *,
    copies: str | None = None,
    root: str | None = None,
    partial: bool = False,
    classes: Sequence[str] | None = None,
) -> Labels:
    """One split of a data set; the split is 1 where it is left out.

    dataset: `csv:FILE` with columns `path`, `label`, `splitN` (`train`, `test`, empty: not used in
    this split) and perhaps `source`; `folder:DIR` with `DIR/{train,test}/CLASS/…`; `kinetics:FILE`;
    `hmdb51`, `ucf101`.
    root: what the paths are relative to, default the csv's folder; for the last two, where they
        lie.
    copies: a folder of copies by `distinit prepare` to read in place of the videos, which then need
        not be there.
    partial: go on where labels have no video (left out of training; wrong in the test, for it
    cannot be read) or videos among those of HMDB-51 or UCF-101 have no label (left out).
    classes: those of a model that the test side is for. The train side is then neither needed nor
    read, and classes without a test video are no error; one that the model does not have is.

    Raises UsageError for another form, and LabelsError (one line, naming the file and what was
    found) for what the readers refuse, an empty side, a class on one side only, a file of two
    classes, a file on both sides of the split, by name, link or content, a file with two labels,
    rows without a label, and, unless `partial`, for paths without videos and for videos that
    official lists do not name; CheckpointError for a class that is not among `classes`. Of videos
    that a user's own list does not name there is a note.
    """
    number = 1 if split is None else split
    prepared = None if copies is None else CopyFolder.open(copies)
    listing = read_split(dataset, number, root, partial)
    if classes is not None:
        return _check_test(dataset, number, listing, prepared, partial, tuple(classes))
    return _check(dataset, number, listing, prepared, partial)


def read_all_sides(dataset: str, root: str | None = None) -> Listing:
    """Return every labelled video of a data set, whatever its side in whichever split.

    Videos are neither looked for nor compared: a store knows what its teachers saw. A csv needs no
    column `splitN` for this.

    Args:
        dataset: As for `load_labels`.
        root: What the paths are relative to, as for `load_labels`.

    Raises:
        UsageError: Another form of data set.
        LabelsError: What the readers refuse.
    """
    kind, where = _parse(dataset, root)
    if kind == "csv":
        return read_csv(where, None, root)
    if kind not in OFFICIAL:
        return read_split(dataset, 1, root)
    # A video that one split leaves out is labelled in another.
    listings = [read_split(dataset, split, root) for split in OFFICIAL_SPLITS]
    rows = {row.path: row for listing in listings for row in listing.rows}
    return replace(listings[0], rows=list(rows.values()))


def available_splits(dataset: str, root: str | None = None) -> tuple[int, ...]:
    """The splits that a data set has. Raises as `load_labels`."""
    kind, where = _parse(dataset, root)
    if kind in OFFICIAL:
        return OFFICIAL_SPLITS
    return csv_splits(where) if kind == "csv" else (1,)


def canonical(dataset: str) -> str:
    """The data set under a name that holds from any folder."""
    kind, colon, where = dataset.partition(":")
    return f"{kind}:{os.path.abspath(where)}" if colon else dataset


def read_split(dataset: str, split: int, root: str | None = None, partial: bool = True) -> Listing:
    """Read one split as its files describe it, before any check; see `load_labels`."""
    kind, where = _parse(dataset, root)
    if kind == "csv":
        return read_csv(where, split, root)
    if kind == "folder":
        return read_folder(where, split)
    if kind == "kinetics":
        return read_kinetics(where, split, root, partial)
    return OFFICIAL[kind](root, split, partial)


def _parse(dataset: str, root: str | None) -> tuple[str, str]:
    """Kind and absolute place ("" for hmdb51 and ucf101)."""
    kind, colon, where = dataset.partition(":")
    if kind in OFFICIAL and not colon:
        return kind, ""
    if kind not in ("csv", "folder", "kinetics") or not where:
        raise UsageError(f"--dataset {dataset!r}: expected {FORMS}")
    if kind == "folder" and root is not None:
        raise UsageError(
            f"--root {root}: a folder:DIR has its own, it goes with the other data sets"
        )
    return kind, os.path.abspath(where)


class _File(NamedTuple):
    """A listed video that is there: itself, or where it is gone its copy."""

    row: Row
    path: str
    status: os.stat_result


def _check(
    dataset: str, split: int, listing: Listing, copies: CopyFolder | None, partial: bool
) -> Labels:
    rows, notes = _checked_rows(split, listing, SIDES, copies, partial)
    classes = _classes(listing, rows)
    shared = _shared_sources(listing, rows, notes)
    train, test = (_labelled(rows, side, classes) for side in SIDES)
    return Labels(
        dataset,
        split,
        listing.root,
        classes,
        train,
        test,
        copies,
        tuple(notes),
        shared_sources=shared,
    )


def _check_test(
    dataset: str,
    split: int,
    listing: Listing,
    copies: CopyFolder | None,
    partial: bool,
    classes: tuple[str, ...],
) -> Labels:
    """The test side alone, with the classes of the model that is tested."""
    listing = replace(listing, rows=[row for row in listing.rows if row.side == "test"])
    rows, notes = _checked_rows(split, listing, ("test",), copies, partial)
    labels = {row.label for row in rows}
    if unknown := sorted(labels - set(classes)):
        raise CheckpointError(
            f"the class list of {listing.origin} is not the model's: {len(unknown)} of its {len(labels)} classes are "
            f"not known, {first_few(unknown, 5)}; the model has: {first_few(classes, 10)}"
        )
    if without := [name for name in classes if name not in labels]:
        notes.append(
            f"{len(without)} of {len(classes)} classes have no test video: {first_few(without, 5)}"
        )
    return Labels(
        dataset,
        split,
        listing.root,
        classes,
        (),
        _labelled(rows, "test", classes),
        copies,
        tuple(notes),
    )


def _checked_rows(
    split: int, listing: Listing, sides: tuple[str, ...], copies: CopyFolder | None, partial: bool
) -> tuple[list[Row], list[str]]:
    """The rows that are used, a file once, and what to know of them."""
    origin, notes = listing.origin, list(listing.notes)
    for side in sides:
        if not any(row.side == side for row in listing.rows):
            why = f"; {'; '.join(notes)}" if notes else ""
            raise LabelsError(
                f"{origin}: split {split} has no {side} videos ({len(listing.rows)} rows are used){why}"
            )
    files, missing = _found(listing, copies)
    _say_or_refuse(listing, missing, partial, notes)
    kept = _one_row_per_file(origin, files)
    _refuse_same_content(listing, kept, notes)
    # A test video that is not there stays: it cannot be read, and so it counts as wrong.
    rows = [file.row for file in kept] + [row for row in missing if row.side == "test"]
    if copies is not None and not any(_has_copy(copies, listing.root, row.path) for row in rows):
        raise UsageError(
            f"--copies {copies.folder}: holds a copy of none of the {len(rows)} videos of {origin}"
        )
    return rows, notes


def _labelled(rows: list[Row], side: str, classes: tuple[str, ...]) -> tuple[Labelled, ...]:
    index = {name: i for i, name in enumerate(classes)}
    return tuple(
        Labelled(row.path, index[row.label], row.source) for row in rows if row.side == side
    )


def _found(listing: Listing, copies: CopyFolder | None) -> tuple[list[_File], list[Row]]:
    """The listed videos that are there, and the rows of those that are not."""
    files, missing = [], []
    for row in listing.rows:
        for path in _places(listing.root, row.path, copies):
            try:
                files.append(_File(row, path, os.stat(path)))
                break
            except (OSError, ValueError):  # ValueError: a null byte in the name
                continue
        else:
            missing.append(row)
    return files, missing


def _places(root: str, path: str, copies: CopyFolder | None) -> Iterator[str]:
    yield os.path.join(root, path)
    if copies is not None and _has_copy(copies, root, path):
        yield copies.find(root, path)


def _has_copy(copies: CopyFolder, root: str, path: str) -> bool:
    try:
        return bool(copies.find(root, path))
    except VideoError:
        return False


def _say_or_refuse(listing: Listing, missing: list[Row], partial: bool, notes: list[str]) -> None:
    """Labels without videos and videos without labels: an error, or with `partial` a note.

    A user's own list may name a part of a folder on purpose: what it leaves out is always a note.
    """
    if missing and not partial:
        raise LabelsError(
            f"{listing.origin}: {len(missing)} of {len(listing.rows)} paths do not exist; the first is "
            f"{escape_path(missing[0].path)} ({missing[0].where}), looked for in {listing.root}"
            f"{_hint(listing.root, missing[0].path)}"
        )
    if listing.unlabelled and listing.official and not partial:
        raise LabelsError(
            f"{listing.origin}: {len(listing.unlabelled)} videos beside the listed ones have no label, "
            f"{first_few(listing.unlabelled)}; {listing.get}, or take --partial"
        )
    for side, what in (("train", "left out"), ("test", "each counts as wrong")):
        if count := sum(row.side == side for row in missing):
            notes.append(f"{count} {side} videos of {listing.origin} are not there: {what}")
    if listing.unlabelled:
        notes.append(
            f"{len(listing.unlabelled)} videos beside those of {listing.origin} have no label and are left out: "
            f"{first_few(listing.unlabelled)}"
        )


def _hint(root: str, path: str) -> str:
    """What may be wrong with a path that is not there."""
    if not is_utf8(path):
        return "; the name is not UTF-8: save the file in UTF-8 if the video's name on the disk is"
    stem = os.path.splitext(path)[0]
    near = [
        name
        for name in videos_in(root, [os.path.dirname(path)])
        if os.path.splitext(name)[0] == stem
    ]
    return f"; it is there as {escape_path(near[0])}" if near else ""


def _one_row_per_file(origin: str, files: list[_File]) -> list[_File]:
    """Drops plain repetitions; refuses files with two labels or sides."""
    kept: dict[tuple[int, int], _File] = {}
    for file in files:
        # Device and inode, not the name: a link to a training video in the test list leaks as well.
        first = kept.setdefault((file.status.st_dev, file.status.st_ino), file).row
        row = file.row
        if first.label != row.label:
            raise LabelsError(
                f"{origin}: {escape_path(row.path)} has two labels, "
                f"{first.label!r} ({first.where}) and {row.label!r} ({row.where})"
            )
        if first.side != row.side:
            raise LabelsError(_leak(origin, first, row))
    return list(kept.values())


def _refuse_same_content(listing: Listing, files: list[_File], notes: list[str]) -> None:
    """Copies of a file on both sides, or with two labels. Only files of one size are read to
    compare them.

    A published split is used as it is, and what it leaks is said.
    """
    sizes = Counter(file.status.st_size for file in files)
    seen: dict[str, list[_File]] = {}
    leaks, relabelled = [], []
    for file in files:
        if sizes[file.status.st_size] == 1:
            continue
        try:
            alike = seen.setdefault(digest(file.path), [])
        except VideoError:
            continue  # an unreadable file has its own message later
        first = next((other for other in alike if same_content(other.path, file.path)), None)
        if first is None:
            alike.append(file)
        elif first.row.side != file.row.side:
            leaks.append(_leak(listing.origin, first.row, file.row))
        elif first.row.label != file.row.label:
            relabelled.append(
                f"{listing.origin}: the same file has two labels, {escape_path(first.row.path)} is "
                f"{first.row.label!r} ({first.row.where}) and {escape_path(file.row.path)} is {file.row.label!r} "
                f"({file.row.where})"
            )
    for what, found in (("leaks", leaks), ("files with two labels", relabelled)):
        if found and not listing.official:
            raise LabelsError(
                found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
            )
        if found:
            notes.append(
                f"{len(found)} {what} of the official split, kept as published; the first: {found[0]}"
            )


def _shared_sources(listing: Listing, rows: list[Row], notes: list[str]) -> int:
    """How many test videos are cut from a recording that training videos are cut from too; a note
    where there are any.

    What published lists say by the names of their files is a guess, and they are used as they are.
    """
    if listing.official:
        return 0
    train = {row.source for row in rows if row.side == "train" and row.source}
    test = [row for row in rows if row.side == "test" and row.source]
    shared = [row for row in test if row.source in train]
    if shared:
        both, every = {row.source for row in shared}, {row.source for row in test}
        notes.append(
            f"{len(shared)} of {len(test)} test videos are cut from recordings that training videos are cut from too "
            f"({len(both)} of {len(every)} test recordings: {first_few(sorted(both))}); "
            "accuracies are not those of unseen recordings"
        )
    return len(shared)


def _leak(origin: str, first: Row, again: Row) -> str:
    return (
        f"{origin}: the same file is on both sides of the split, {escape_path(first.path)} "
        f"({first.where}, {first.side}) and {escape_path(again.path)} ({again.where}, {again.side})"
    )


def _classes(listing: Listing, rows: list[Row]) -> tuple[str, ...]:
    train, test = ({row.label for row in rows if row.side == side} for side in SIDES)
    if train != test:
        alone = {
            side: sorted(names)
            for side, names in (("train", train - test), ("test", test - train))
            if names
        }
        shown = (
            f"only in {side}: {', '.join(map(repr, names[:5]))}{', …' if len(names) > 5 else ''}"
            for side, names in alone.items()
        )
        raise LabelsError(
            f"{listing.origin}: {len(train ^ test)} of {len(train | test)} classes are on one side of the split alone, "
            f"{'; '.join((*shown, *listing.notes))}"
        )
    if listing.classes is not None:
        return listing.classes
    names = sorted(train)
    if all(
        re.fullmatch(r"[0-9]+", name) for name in names
    ):  # numbered classes in the order of their numbers
        names.sort(key=int)
    return tuple(names)
