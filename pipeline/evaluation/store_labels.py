"""Labelled videos of a target store, wherever they are now: to probe them, or to exclude them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..common.errors import LabelsError, UsageError, VideoError
from ..corpus.sources import escape_path
from ..store.reader import TargetStore
from ..store.selection import Exclusion, exclude_list
from ..training.seen_videos import OWN, SeenVideos
from ..video.container import digest
from .labels import (
    ALL,
    available_splits,
    canonical,
    load_labels,
    names_dataset,
    read_all_sides,
    read_split,
)
from .listing import Row, first_few
from .official import READERS as OFFICIAL


@dataclass(frozen=True)
class StoreLabels:
    """The labelled videos of a store that have cached frames.

    videos: ids [V], ascending. label [V]: index into classes [K]. group [V]: videos with equal
    numbers are cut from one recording, or are copies of one file. test: bool [V], the test side of
    a split, or None where no split was asked for. notes: what a user should know, a line each.
    """

    videos: NDArray[np.int64]
    label: NDArray[np.int64]
    group: NDArray[np.int64]
    classes: tuple[str, ...]
    test: NDArray[np.bool_] | None
    notes: list[str] = field(default_factory=list)

    def choose(self, keep: NDArray[np.bool_]) -> StoreLabels:
        """Return the labels of some of the videos [V]."""
        test = None if self.test is None else self.test[keep]
        return StoreLabels(
            self.videos[keep], self.label[keep], self.group[keep], self.classes, test, self.notes
        )


def match_labels(
    store: TargetStore,
    dataset: str,
    *,
    root: str | None = None,
    split: int | None = None,
    video_roots: Mapping[str, str] | None = None,
) -> StoreLabels:
    """Find the labelled videos of a data set in a store.

    A labelled video is known by its absolute path; where that is in no corpus, by the digest of its
    file; where there is no such file, by its path relative to the root of the labels, which is then
    its path in a corpus.

    Args:
        store: An open store.
        dataset: As for `load_labels`.
        root: What the paths of the labels are relative to, as for `load_labels`.
        split: Whose sides to keep apart; None takes every labelled video.
        video_roots: corpus → its current folder.

    Raises:
        UsageError: No labelled video is in the store, or they are of one class.
        LabelsError: The labels cannot be read, or a video has two.
    """
    listing = read_all_sides(dataset, root) if split is None else read_split(dataset, split, root)
    rows = listing.rows
    index, missing = _Index(store, video_roots or {}), list[Row]()
    found: dict[int, Row] = {}
    for row in rows:
        video = index.find(listing.root, row)
        if video is None:
            missing.append(row)
        elif (first := found.setdefault(video, row)).label != row.label:
            raise LabelsError(
                f"{dataset}: {escape_path(row.path)} has two labels, {first.label!r} "
                f"({first.where}) and {row.label!r} ({row.where})"
            )
    if not found:
        raise UsageError(
            f"--dataset {dataset}: none of its {len(rows)} videos is in {store.name}, the first is "
            f"{escape_path(rows[0].path) if rows else 'missing'}; --videos CORPUS=DIR gives the "
            f"current folder of a corpus"
        )
    usable = np.flatnonzero(store.row_counts > 0)
    videos = np.array(sorted(set(found) & set(usable.tolist())), np.int64)
    used = [found[int(video)] for video in videos]
    classes = tuple(sorted({row.label for row in used}))
    if len(classes) < 2:
        raise UsageError(
            f"--dataset {dataset}: {len(used)} of its videos have cached frames in {store.name}, of "
            f"{len(classes)} classes; a probe requires at least 2 classes"
        )
    notes = []
    if missing:
        shown = first_few(row.path for row in missing)
        notes.append(f"{len(missing)} of {len(rows)} labelled videos are not in the store: {shown}")
    if len(used) < len(found):
        notes.append(f"{len(found) - len(used)} labelled videos have no cached frames")
    return StoreLabels(
        videos,
        np.array([classes.index(row.label) for row in used]),
        _groups(store, videos, used),
        classes,
        None if split is None else np.array([row.side == "test" for row in used]),
        notes,
    )


class _Index:
    """Videos of a store by path, by digest and by path in their corpus."""

    def __init__(self, store: TargetStore, video_roots: Mapping[str, str]) -> None:
        ids = range(store.n_videos)
        self.by_path = {os.path.abspath(store.video_path(i, video_roots)): i for i in ids}
        self.by_digest: dict[str, int] = {}
        self.by_name: dict[str, int | None] = {}
        for i in ids:
            if known := store.digest(i):
                self.by_digest.setdefault(known, i)
            name = os.path.normpath(store.place(i)[1])
            self.by_name[name] = None if name in self.by_name else i

    def find(self, base: str, row: Row) -> int | None:
        """Return the id of a labelled video; None where the store does not have it."""
        path = os.path.abspath(os.path.join(base, row.path))
        if path in self.by_path:
            return self.by_path[path]
        if os.path.exists(path):
            try:
                return self.by_digest.get(digest(path))
            except (VideoError, OSError):
                return None
        return self.by_name.get(os.path.normpath(row.path))


def _groups(
    store: TargetStore, videos: NDArray[np.int64], rows: Sequence[Row]
) -> NDArray[np.int64]:
    """Assign numbers to recordings: videos of one source, or of equal content, are in one group."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    def keys(at: int, row: Row) -> Iterator[tuple[str, str]]:
        if row.source:
            yield "source", row.source
        if known := store.digest(int(videos[at])):
            yield "digest", known

    number: dict[tuple[str, str], int] = {}
    pairs = [
        (at, len(rows) + number.setdefault(key, len(number)))
        for at, row in enumerate(rows)
        for key in keys(at, row)
    ]
    size = len(rows) + len(number)
    at, key = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(at)), (at, key)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][: len(rows)], np.int64)


def canonical_exclude(source: str) -> str:
    """Return the source with absolute paths."""
    return canonical(source) if names_dataset(source) else os.path.abspath(source)


def exclude(
    store: TargetStore, source: str, split: int | str | None, video_roots: Mapping[str, str]
) -> Exclusion:
    """Find the videos of a store that a list names, or that are test videos of labels.

    Labelled videos are recognised by content, so labels may name copies or other paths.

    Args:
        store: The store.
        source: A list file, or a data set such as `csv:FILE`.
        split: Split of the data set, "all" for every split.
        video_roots: Corpus → folder where it is located now.

    Raises:
        UsageError: A list is empty, or a line or data set names no video of the store.
        LabelsError: A label file cannot be used.
    """
    if not names_dataset(source):
        if split is not None:
            raise UsageError(
                f"--split {split}: --exclude {source} is a list; a split requires --exclude csv:FILE"
            )
        return exclude_list(store, source)
    kind, _, where = source.partition(":")
    dataset, root = (kind, where) if kind in OFFICIAL else (source, None)
    numbers = (
        available_splits(dataset, root)
        if split == ALL
        else (None if split is None else int(split),)
    )
    digests: list[str] = []
    paths: list[str] = []
    for number in numbers:
        # Many of Kinetics' videos are no longer on the web; a store cannot have them either.
        labels = load_labels(dataset, number, root=root, partial=kind == "kinetics")
        digests += [labels.digest(video) for video in labels.test]
        paths += [labels.absolute(video) for video in labels.test]
    store_paths = [store.video_path(video, video_roots) for video in range(store.n_videos)]
    stored = SeenVideos(store.column("digest"), store_paths, np.full(store.n_videos, OWN, np.uint8))
    by_path = {path: video for video, path in enumerate(map(os.path.abspath, store_paths))}
    excluded = {row for rows in stored.rows(digests, paths) for row in rows}
    excluded |= {by_path[path] for path in map(os.path.abspath, paths) if path in by_path}
    if not excluded:
        raise UsageError(
            f"--exclude {source}: none of its {len(set(paths))} test videos is in {store.name}"
        )
    return Exclusion.of(store, source, excluded, len(set(paths)))


def optional_exclusion(
    store: TargetStore, source: str | None, split: int | str | None, video_roots: Mapping[str, str]
) -> Exclusion | None:
    """Return the result of `exclude`, None without a source.

    Raises:
        UsageError: There is a split without a source; and as `exclude`.
    """
    if source is None:
        if split is not None:
            raise UsageError(
                f"--split {split}: requires --exclude csv:FILE, whose test videos are excluded"
            )
        return None
    return exclude(store, source, split, video_roots)
