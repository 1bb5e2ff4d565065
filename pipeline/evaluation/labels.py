"""Labelled data sets: the videos of the sides of a split, and their classes.

Five forms are supported: `csv:FILE`, `folder:DIR`, `kinetics:FILE`, `hmdb51` and `ucf101`. All are
checked in the same way (see `label_checks`), so that no accuracy is computed on a list that leaks,
misses files or has a class that cannot be learned.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..common.errors import CheckpointError, UsageError, VideoError
from ..prepared.folders import CopyFolder, VideoFile, source_digest
from ..video.container import digest
from .label_checks import check_rows, class_names, note_shared_sources
from .label_files import csv_splits, read_csv, read_folder, read_kinetics
from .listing import SIDES, VAL, Listing, Row, first_few
from .official import READERS as OFFICIAL
from .official import SPLITS as OFFICIAL_SPLITS

FORMS = "csv:FILE, folder:DIR, kinetics:FILE, hmdb51 or ucf101 (these two with --root DIR)"
# Kinds of data sets with a path.
KINDS = ("csv", "folder", "kinetics")
# The value of an option for every split.
ALL = "all"


class Labelled(NamedTuple):
    """A labelled video.

    Attributes:
        path: Path relative to `Labels.root`.
        label: Index of its class.
        source: The recording that it was cut from, "" if unknown.
    """

    path: str
    label: int
    source: str = ""


@dataclass(frozen=True)
class Labels:
    """One split of a labelled data set.

    Attributes:
        dataset: The data set as given to `load_labels`.
        split: Number of the split.
        root: The folder that paths are relative to.
        classes: Names of the K classes.
        train: Videos to train on.
        test: Videos to test with.
        copies: Prepared copies that are read instead of the videos, if any.
        notes: Notes on the list for the user, one line each.
        shared_sources: Number of test videos cut from a recording of the train or validation side.
        val: Videos to choose options and checkpoints by.
        listed_train: The train side as listed, if `train` differs from it; see `hold_out` and
            `with_val_in_train`.
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
    val: tuple[Labelled, ...] = ()
    listed_train: tuple[Labelled, ...] | None = None

    @property
    def listed(self) -> tuple[Labelled, ...]:
        """The train side as listed, which identifies the labels of a run."""
        return self.train if self.listed_train is None else self.listed_train

    def with_val_in_train(self) -> Labels:
        """Return labels whose train side has the validation side too, for the end of a search."""
        held_out = set(self.listed).issuperset(self.val)
        train = self.listed if held_out else (*self.train, *self.val)
        return replace(self, train=train, val=(), listed_train=self.listed)

    def file(self, video: Labelled) -> VideoFile:
        """Return the file to read a video from.

        Raises:
            VideoError: The video has no prepared copy.
        """
        path = self.absolute(video)
        if self.copies is None:
            return VideoFile(path)
        return VideoFile(self.copies.find(self.root, video.path), self.copies.kind, path)

    def absolute(self, video: Labelled) -> str:
        """Return the absolute path of the original of a video."""
        return os.path.join(self.root, video.path)

    def digest(self, video: Labelled) -> str:
        """Return the digest of the original, which its copy has too; "" if both are unreadable."""
        try:
            path = self.absolute(video)
            original = self.copies is None or os.path.exists(path)
            return digest(path) if original else source_digest(self.file(video))
        except (VideoError, OSError):
            return ""

    def __repr__(self) -> str:
        return (
            f"Labels({self.dataset}, split {self.split}, classes[{len(self.classes)}], "
            f"train[{len(self.train)}], {f'val[{len(self.val)}], ' if self.val else ''}test[{len(self.test)}])"
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
    """Load and check one split of a data set.

    Args:
        dataset: `csv:FILE` with columns `path`, `label`, `splitN` (`train`, `val`, `test`, or
            empty: not used in this split) and optionally `source`; `folder:DIR` with
            `DIR/{train,test}/CLASS/…` and optionally `DIR/val/CLASS/…`; `kinetics:FILE`;
            `hmdb51`; `ucf101`.
        split: Number of the split, by default 1.
        copies: A folder of copies by `distinit prepare` to read instead of the videos, which may
            then be missing.
        root: The folder that paths are relative to, by default that of the csv; for hmdb51 and
            ucf101 the folder that holds them.
        partial: Whether labels without a video are accepted (dropped from the train side,
            unreadable on the test side), and videos without a label in HMDB-51 and UCF-101.
        classes: Classes of a model to test. Only the test side is then read and checked, and it may
            lack some of the classes.

    Raises:
        UsageError: The data set has another form, or none of its videos has a copy.
        LabelsError: A list is unusable: a side is empty, a class is on one side only, a file is on
            both sides (by name, link or content) or has two labels, or, unless `partial`, videos
            are missing.
        CheckpointError: A class is not among `classes`.
    """
    number = 1 if split is None else split
    folder = None if copies is None else CopyFolder.open(copies)
    listing = read_split(dataset, number, root, partial)
    if classes is not None:
        return _load_test_side(dataset, number, listing, folder, partial, tuple(classes))
    rows, notes = check_rows(number, listing, SIDES, folder, partial)
    names = class_names(listing, rows)
    shared = note_shared_sources(listing, rows, notes)
    train, test, val = (_labelled(rows, side, names) for side in (*SIDES, VAL))
    return Labels(
        dataset, number, listing.root, names, train, test, folder, tuple(notes), shared, val
    )


def read_all_sides(dataset: str, root: str | None = None) -> Listing:
    """List all labelled videos of a data set, whatever their side in any split.

    The files of the videos are neither checked nor compared, since a store records the videos that
    its teachers have processed. A csv requires no column `splitN`.

    Args:
        dataset: As for `load_labels`.
        root: As for `load_labels`.

    Raises:
        UsageError: The data set has another form.
        LabelsError: The list cannot be read.
    """
    kind, path = _parse(dataset, root)
    if kind == "csv":
        return read_csv(path, None, root)
    if kind not in OFFICIAL:
        return read_split(dataset, 1, root)
    # A video that one split leaves out is labelled in another.
    listings = [read_split(dataset, split, root) for split in OFFICIAL_SPLITS]
    rows = {row.path: row for listing in listings for row in listing.rows}
    return replace(listings[0], rows=list(rows.values()))


def available_splits(dataset: str, root: str | None = None) -> tuple[int, ...]:
    """Return the splits of a data set; the exceptions are those of `load_labels`."""
    kind, path = _parse(dataset, root)
    if kind in OFFICIAL:
        return OFFICIAL_SPLITS
    return csv_splits(path) if kind == "csv" else (1,)


def names_dataset(source: str) -> bool:
    """Return whether `source` is a data set, such as hmdb51:DIR, rather than a list of videos.

    An existing file of that name is a list.
    """
    kind, _, path = source.partition(":")
    return bool(path) and kind in (*KINDS, *OFFICIAL) and not os.path.exists(source)


def canonical(dataset: str) -> str:
    """Return the data set with its path made absolute."""
    kind, colon, path = dataset.partition(":")
    return f"{kind}:{os.path.abspath(path)}" if colon else dataset


def read_split(dataset: str, split: int, root: str | None = None, partial: bool = True) -> Listing:
    """Read one split as its files describe it, before any check; see `load_labels`."""
    kind, path = _parse(dataset, root)
    if kind == "csv":
        return read_csv(path, split, root)
    if kind == "folder":
        return read_folder(path, split)
    if kind == "kinetics":
        return read_kinetics(path, split, root, partial)
    return OFFICIAL[kind](root, split, partial)


def _parse(dataset: str, root: str | None) -> tuple[str, str]:
    """Return the kind of a data set and its absolute path ("" for hmdb51 and ucf101)."""
    kind, colon, path = dataset.partition(":")
    if kind in OFFICIAL and not colon:
        return kind, ""
    if kind not in KINDS or not path:
        raise UsageError(f"--dataset {dataset!r}: expected {FORMS}")
    if kind == "folder" and root is not None:
        raise UsageError(f"--root {root}: not allowed with --dataset folder:DIR, whose root is DIR")
    return kind, os.path.abspath(path)


def _load_test_side(
    dataset: str,
    split: int,
    listing: Listing,
    copies: CopyFolder | None,
    partial: bool,
    classes: tuple[str, ...],
) -> Labels:
    """Check the test side against the classes of a model, and return labels without other sides."""
    listing = replace(listing, rows=[row for row in listing.rows if row.side == "test"])
    rows, notes = check_rows(split, listing, ("test",), copies, partial)
    labels = {row.label for row in rows}
    if unknown := sorted(labels - set(classes)):
        raise CheckpointError(
            f"{listing.origin}: {len(unknown)} of its {len(labels)} classes are not known to the model, "
            f"{first_few(unknown, 5)}; the model has: {first_few(classes, 10)}"
        )
    if untested := [name for name in classes if name not in labels]:
        notes.append(
            f"{len(untested)} of {len(classes)} classes have no test video: {first_few(untested, 5)}"
        )
    test = _labelled(rows, "test", classes)
    return Labels(dataset, split, listing.root, classes, (), test, copies, tuple(notes))


def _labelled(rows: list[Row], side: str, classes: tuple[str, ...]) -> tuple[Labelled, ...]:
    index = {name: i for i, name in enumerate(classes)}
    return tuple(
        Labelled(row.path, index[row.label], row.source) for row in rows if row.side == side
    )


def hold_out(labels: Labels, share: float) -> Labels:
    """Move a share of the train side to the validation side.

    All videos of one recording (`source`) stay on one side, every class keeps a train video, and
    the share of each class is met as closely as recordings allow. The choice depends only on the
    names of recordings and videos, so that all seeds and options have the same validation side.

    Args:
        labels: A data set without a validation side.
        share: Share of the train videos to hold out; 0 returns `labels`.

    Raises:
        UsageError: The labels have a validation side already, or no recording can be held out.
    """
    if share == 0:
        return labels
    if labels.val:
        raise UsageError(
            f"--held-out {share:g}: {labels.dataset} has a validation side of {len(labels.val)} videos already"
        )
    held_out = _nearest_share(_recordings(labels.train), share)
    if not held_out:
        raise UsageError(
            f"--held-out {share:g}: takes none of the {len(labels.train)} train videos of {labels.dataset}; "
            "each class keeps one recording for training; give a larger share or more videos"
        )
    val = tuple(video for video in labels.train if video in held_out)
    train = tuple(video for video in labels.train if video not in held_out)
    return replace(labels, train=train, val=val, listed_train=labels.train)


def _recordings(videos: tuple[Labelled, ...]) -> list[list[Labelled]]:
    """Return the videos of each recording, sorted by the digest of the name of the recording."""
    groups: dict[tuple[bool, str], list[Labelled]] = {}
    for video in videos:
        groups.setdefault((bool(video.source), video.source or video.path), []).append(video)

    def key(name: tuple[bool, str]) -> bytes:
        return hashlib.sha256(name[1].encode(errors="surrogateescape")).digest()

    return [groups[name] for name in sorted(groups, key=key)]


def _nearest_share(recordings: list[list[Labelled]], share: float) -> set[Labelled]:
    """Return the videos of recordings that bring the classes closer to their shares."""
    remaining = Counter(video.label for recording in recordings for video in recording)
    # Small classes hold out one video, too, if another one remains to train on.
    num_wanted = {label: max(1, round(share * n)) for label, n in remaining.items()}
    held_out: set[Labelled] = set()
    for recording in recordings:
        counts = Counter(video.label for video in recording)
        is_closer = (
            sum(num_wanted[k] ** 2 - (num_wanted[k] - n) ** 2 for k, n in counts.items()) > 0
        )
        if is_closer and all(remaining[k] > n for k, n in counts.items()):
            held_out.update(recording)
            remaining.subtract(counts)
            for label, n in counts.items():
                num_wanted[label] -= n
    return held_out
