"""Checks of listed videos: missing files, leaks between the sides, double labels, classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ..common.documents import is_utf8
from ..common.errors import LabelsError, UsageError, VideoError
from ..common.streams import counted
from ..corpus.sources import escape_path
from ..prepared.folders import CopyFolder
from ..video.container import digest, same_content
from .listing import SIDES, VAL, Listing, Row, first_few, videos_in


class _File(NamedTuple):
    """The file of a listed video: the video itself, or its copy if it no longer exists."""

    row: Row
    path: str
    status: os.stat_result


def check_rows(
    split: int, listing: Listing, sides: tuple[str, ...], copies: CopyFolder | None, partial: bool
) -> tuple[list[Row], list[str]]:
    """Check the rows of a listing.

    Args:
        split: Number of the split, for messages.
        listing: The listing.
        sides: The sides that must not be empty.
        copies: Prepared copies to read instead of the videos, if any.
        partial: Whether videos or labels may be missing.

    Returns:
        The rows to use, each file once, and notes for the user.

    Raises:
        LabelsError: The listing cannot be used.
        UsageError: None of the videos has a copy.
    """
    origin, notes = listing.origin, list(listing.notes)
    for side in sides:
        if not any(row.side == side for row in listing.rows):
            raise LabelsError(
                "; ".join(
                    [
                        f"{origin}: split {split} has no {side} videos ({len(listing.rows)} rows)",
                        *notes,
                    ]
                )
            )
    files, missing = _find_files(listing, copies)
    _check_missing(listing, missing, partial, notes)
    unique_files = _one_row_per_file(origin, files)
    _check_contents(listing, unique_files, notes)
    # A missing test video stays in the list, so that it counts as wrong like any unreadable one.
    rows = [file.row for file in unique_files] + [row for row in missing if row.side == "test"]
    if copies is not None and not any(_has_copy(copies, listing.root, row.path) for row in rows):
        raise UsageError(
            f"--copies {copies.folder}: has no copy of any of the {len(rows)} videos of {origin}"
        )
    return rows, notes


def class_names(listing: Listing, rows: list[Row]) -> tuple[str, ...]:
    """Return the class names in the order of their indices.

    Raises:
        LabelsError: A class is on one side only; the validation side may lack some.
    """
    train, test, val = ({row.label for row in rows if row.side == side} for side in (*SIDES, VAL))
    if unknown := sorted(val - train):
        raise LabelsError(
            f"{listing.origin}: {len(unknown)} of {len(val)} classes of the validation side have no training video: "
            f"{first_few(unknown, 5)}"
        )
    if train != test:
        unpaired = {"train": sorted(train - test), "test": sorted(test - train)}
        shown = (
            f"only in {side}: {first_few(names, 5)}" for side, names in unpaired.items() if names
        )
        raise LabelsError(
            f"{listing.origin}: {len(train ^ test)} of {len(train | test)} classes are on one side of the split only, "
            f"{'; '.join((*shown, *listing.notes))}"
        )
    if listing.classes is not None:
        return listing.classes
    # Classes that are all numbers are sorted by value.
    numeric = all(re.fullmatch(r"[0-9]+", name) for name in train)
    return tuple(sorted(sorted(train), key=int) if numeric else sorted(train))


def note_shared_sources(listing: Listing, rows: list[Row], notes: list[str]) -> int:
    """Count test videos cut from recordings of the other sides, and add notes on shared recordings.

    Published lists are used as they are, since their recordings are guessed from names of files.
    """
    if listing.official:
        return 0
    sources = {
        side: {row.source for row in rows if row.side == side and row.source}
        for side in (*SIDES, VAL)
    }
    if shared := sources["train"] & sources[VAL]:
        notes.append(
            f"{len(shared)} of {len(sources[VAL])} recordings of the validation side are also on the train side "
            f"({first_few(sorted(shared))}); choices by validation loss may not hold for unseen recordings"
        )
    # The last training of a search uses the validation videos, too.
    train_sources = sources["train"] | sources[VAL]
    test_rows = [row for row in rows if row.side == "test" and row.source]
    shared_rows = [row for row in test_rows if row.source in train_sources]
    if shared_rows:
        shared = {row.source for row in shared_rows}
        notes.append(
            f"{len(shared_rows)} of {len(test_rows)} test videos are cut from recordings of training videos "
            f"({len(shared)} of {len(sources['test'])} test recordings: {first_few(sorted(shared))}); "
            "accuracies are not those of unseen recordings"
        )
    return len(shared_rows)


def _find_files(listing: Listing, copies: CopyFolder | None) -> tuple[list[_File], list[Row]]:
    """Return the existing files of the listed videos, and the rows without one."""
    files, missing = [], []
    for row in listing.rows:
        for path in _paths(listing.root, row.path, copies):
            try:
                files.append(_File(row, path, os.stat(path)))
                break
            except (OSError, ValueError):
                # ValueError: the name has a null byte.
                continue
        else:
            missing.append(row)
    return files, missing


def _paths(root: str, path: str, copies: CopyFolder | None) -> Iterator[str]:
    yield os.path.join(root, path)
    if copies is not None and _has_copy(copies, root, path):
        yield copies.find(root, path)


def _has_copy(copies: CopyFolder, root: str, path: str) -> bool:
    try:
        return bool(copies.find(root, path))
    except VideoError:
        return False


def _check_missing(listing: Listing, missing: list[Row], partial: bool, notes: list[str]) -> None:
    """Refuse labels without videos and videos without labels; with `partial` add notes instead.

    Videos that a user's list does not name are always a note, since the list may cover a part of a
    folder on purpose.
    """
    if missing and not partial:
        raise LabelsError(
            f"{listing.origin}: {len(missing)} of {len(listing.rows)} paths do not exist; the first is "
            f"{escape_path(missing[0].path)} ({missing[0].location}), expected in {listing.root}"
            f"{_hint(listing.root, missing[0].path)}"
        )
    if listing.unlabelled and listing.official and not partial:
        raise LabelsError(
            f"{listing.origin}: {len(listing.unlabelled)} videos next to the listed ones have no label, "
            f"{first_few(listing.unlabelled)}; {listing.download_hint}, or give --partial"
        )
    effects = {
        "train": "they are not used",
        VAL: "they are not used",
        "test": "each counts as wrong",
    }
    for side, effect in effects.items():
        if count := sum(row.side == side for row in missing):
            notes.append(f"{count} {side} videos of {listing.origin} do not exist: {effect}")
    if listing.unlabelled:
        notes.append(
            f"{counted(len(listing.unlabelled), 'video')} next to those of {listing.origin} without a label, not used: "
            f"{first_few(listing.unlabelled)}"
        )


def _hint(root: str, path: str) -> str:
    """Return a likely reason why a path does not exist, "" if none is known."""
    if not is_utf8(path):
        return "; the name is not UTF-8: save the list in UTF-8 if the file's name is"
    stem = os.path.splitext(path)[0]
    similar = [
        name
        for name in videos_in(root, [os.path.dirname(path)])
        if os.path.splitext(name)[0] == stem
    ]
    return f"; did you mean {escape_path(similar[0])}" if similar else ""


def _one_row_per_file(origin: str, files: list[_File]) -> list[_File]:
    """Drop repeated rows, and refuse files with two labels or on both sides."""
    unique_files: dict[tuple[int, int], _File] = {}
    for file in files:
        # Files are identified by device and inode, since a link to a training video is a leak too.
        first = unique_files.setdefault((file.status.st_dev, file.status.st_ino), file).row
        row = file.row
        if first.label != row.label:
            raise LabelsError(
                f"{origin}: {escape_path(row.path)} has two labels, "
                f"{first.label!r} ({first.location}) and {row.label!r} ({row.location})"
            )
        if first.side != row.side:
            raise LabelsError(_leak(origin, first, row))
    return list(unique_files.values())


def _check_contents(listing: Listing, files: list[_File], notes: list[str]) -> None:
    """Refuse files of equal content on both sides or with two labels.

    A published split is used as it is; its leaks are notes.
    """
    leaks, relabelled = [], []
    for first, row in _repeated_contents(files):
        if first.side != row.side:
            leaks.append(_leak(listing.origin, first, row))
        elif first.label != row.label:
            relabelled.append(
                f"{listing.origin}: the same file has two labels, {escape_path(first.path)} is "
                f"{first.label!r} ({first.location}) and {escape_path(row.path)} is {row.label!r} ({row.location})"
            )
    for kind, problems in (("leaks", leaks), ("files with two labels", relabelled)):
        if not problems:
            continue
        if not listing.official:
            suffix = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise LabelsError(problems[0] + suffix)
        notes.append(
            f"{len(problems)} {kind} of the official split, unique_files as published; the first: {problems[0]}"
        )


def _repeated_contents(files: list[_File]) -> Iterator[tuple[Row, Row]]:
    """Yield (row of the first file, row of a later file) for every later file of equal content.

    Only files of equal size are read.
    """
    sizes = Counter(file.status.st_size for file in files)
    by_digest: dict[str, list[_File]] = {}
    for file in files:
        if sizes[file.status.st_size] == 1:
            continue
        try:
            candidates = by_digest.setdefault(digest(file.path), [])
        except VideoError:
            # An unreadable file is reported when it is decoded.
            continue
        first = next((other for other in candidates if same_content(other.path, file.path)), None)
        if first is None:
            candidates.append(file)
        else:
            yield first.row, file.row


def _leak(origin: str, first: Row, row: Row) -> str:
    return (
        f"{origin}: the same file is on both sides of the split, {escape_path(first.path)} "
        f"({first.location}, {first.side}) and {escape_path(row.path)} ({row.location}, {row.side})"
    )
