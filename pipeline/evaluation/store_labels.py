"""Find labelled videos in a target store, to probe their targets or to exclude them."""

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
from ..training.seen_videos import SEEN_BY_RUN, SeenVideos
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

    Attributes:
        videos: Ids, ascending, [V].
        label: Index into `classes`, [V].
        group: A number that is equal for videos cut from one recording, or copies of one file, [V].
        classes: Names of the K classes.
        test: Whether a video is on the test side, bool [V]; None without a split.
        notes: Notes for the user, one line each.
    """

    videos: NDArray[np.int64]
    label: NDArray[np.int64]
    group: NDArray[np.int64]
    classes: tuple[str, ...]
    test: NDArray[np.bool_] | None
    notes: list[str] = field(default_factory=list)

    def choose(self, mask: NDArray[np.bool_]) -> StoreLabels:
        """Return the labels of the videos that are True in a mask [V]."""
        test = None if self.test is None else self.test[mask]
        return StoreLabels(
            self.videos[mask], self.label[mask], self.group[mask], self.classes, test, self.notes
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

    A labelled video is matched by its absolute path. If no video of the store has that path, it is
    matched by the digest of its file; if the file does not exist, by its path relative to the root
    of the labels, which must equal a path in a corpus.

    Args:
        store: An open store.
        dataset: As for `load_labels`.
        root: The folder that paths of the labels are relative to, as for `load_labels`.
        split: The split whose sides are returned in `test`; None takes every labelled video.
        video_roots: Map from a corpus to its current folder.

    Raises:
        UsageError: No labelled video is in the store, or those in it have fewer than two classes.
        LabelsError: The labels cannot be read, or a video has two labels.
    """
    listing = read_all_sides(dataset, root) if split is None else read_split(dataset, split, root)
    rows = listing.rows
    index, missing = _Index(store, video_roots or {}), list[Row]()
    row_of: dict[int, Row] = {}
    for row in rows:
        video = index.find(listing.root, row)
        if video is None:
            missing.append(row)
        elif (first := row_of.setdefault(video, row)).label != row.label:
            raise LabelsError(
                f"{dataset}: {escape_path(row.path)} has two labels, {first.label!r} "
                f"({first.location}) and {row.label!r} ({row.location})"
            )
    if not row_of:
        raise UsageError(
            f"--dataset {dataset}: none of its {len(rows)} videos is in {store.name}, the first is "
            f"{escape_path(rows[0].path) if rows else 'missing'}; --videos CORPUS=DIR gives the "
            f"current folder of a corpus"
        )
    usable = np.flatnonzero(store.row_counts > 0)
    videos = np.array(sorted(set(row_of) & set(usable.tolist())), np.int64)
    used_rows = [row_of[int(video)] for video in videos]
    classes = tuple(sorted({row.label for row in used_rows}))
    if len(classes) < 2:
        raise UsageError(
            f"--dataset {dataset}: {len(used_rows)} of its videos have cached frames in {store.name}, of "
            f"{len(classes)} classes; a probe requires at least 2 classes"
        )
    notes = []
    if missing:
        shown = first_few(row.path for row in missing)
        notes.append(f"{len(missing)} of {len(rows)} labelled videos are not in the store: {shown}")
    if len(used_rows) < len(row_of):
        notes.append(f"{len(row_of) - len(used_rows)} labelled videos have no cached frames")
    return StoreLabels(
        videos,
        np.array([classes.index(row.label) for row in used_rows]),
        _groups(store, videos, used_rows),
        classes,
        None if split is None else np.array([row.side == "test" for row in used_rows]),
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
            if content_digest := store.digest(i):
                self.by_digest.setdefault(content_digest, i)
            name = os.path.normpath(store.place(i)[1])
            self.by_name[name] = None if name in self.by_name else i

    def find(self, base: str, row: Row) -> int | None:
        """Return the id of a labelled video; None if it is not in the store."""
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
    """Return a group number per video [V], equal for videos of one source or of equal content."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    def keys(position: int, row: Row) -> Iterator[tuple[str, str]]:
        if row.source:
            yield "source", row.source
        if content_digest := store.digest(int(videos[position])):
            yield "digest", content_digest

    # The nodes of the graph are the videos, followed by the sources and digests that connect them.
    numbers: dict[tuple[str, str], int] = {}
    edges = [
        (position, len(rows) + numbers.setdefault(key, len(numbers)))
        for position, row in enumerate(rows)
        for key in keys(position, row)
    ]
    size = len(rows) + len(numbers)
    starts, ends = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(edges)), (starts, ends)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1][: len(rows)], np.int64)


def canonical_exclude(source: str) -> str:
    """Return a list file or data set with its path made absolute."""
    return canonical(source) if names_dataset(source) else os.path.abspath(source)


def exclude(
    store: TargetStore, source: str, split: int | str | None, video_roots: Mapping[str, str]
) -> Exclusion:
    """Find the videos of a store that are in a list, or that are test videos of a data set.

    Labelled videos are matched by content, so that labels may name copies or other paths.

    Args:
        store: The store.
        source: A list file, or a data set such as `csv:FILE`.
        split: Split of the data set, "all" for every split.
        video_roots: Map from a corpus to its current folder.

    Raises:
        UsageError: The list is empty, or a line or the data set matches no video of the store.
        LabelsError: A label file cannot be used.
    """
    if not names_dataset(source):
        if split is not None:
            raise UsageError(
                f"--split {split}: --exclude {source} is a list; a split requires --exclude csv:FILE"
            )
        return exclude_list(store, source)
    kind, _, path = source.partition(":")
    dataset, root = (kind, path) if kind in OFFICIAL else (source, None)
    splits = (
        available_splits(dataset, root)
        if split == ALL
        else (None if split is None else int(split),)
    )
    digests: list[str] = []
    paths: list[str] = []
    for number in splits:
        # Many videos of Kinetics are no longer online, so that no store has them either.
        labels = load_labels(dataset, number, root=root, partial=kind == "kinetics")
        digests += [labels.digest(video) for video in labels.test]
        paths += [labels.absolute(video) for video in labels.test]
    store_paths = [store.video_path(video, video_roots) for video in range(store.n_videos)]
    stored = SeenVideos(
        store.column("digest"), store_paths, np.full(store.n_videos, SEEN_BY_RUN, np.uint8)
    )
    by_path = {path: video for video, path in enumerate(map(os.path.abspath, store_paths))}
    excluded = {video for videos in stored.rows(digests, paths) for video in videos}
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
        UsageError: A split is given without a source, or as for `exclude`.
        LabelsError: A label file cannot be used.
    """
    if source is None:
        if split is not None:
            raise UsageError(
                f"--split {split}: requires --exclude csv:FILE, whose test videos are excluded"
            )
        return None
    return exclude(store, source, split, video_roots)
