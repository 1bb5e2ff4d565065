"""`--exclude`: find the videos of a list, or of the test side of labels, in a store."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from ..common.errors import UsageError
from ..store.exclude import Exclusion, exclude_list
from ..store.reader import TargetStore
from ..training.seen_videos import OWN, SeenVideos
from .labels import available_splits, canonical, load_labels
from .splits import ALL

OFFICIAL = ("hmdb51", "ucf101")
FORMS = ("csv", "folder", "kinetics", *OFFICIAL)


def names_labels(source: str) -> bool:
    """Return whether `source` is a data set such as `csv:FILE`; an existing file is a list."""
    kind, colon, where = source.partition(":")
    return bool(colon and where) and kind in FORMS and not os.path.exists(source)


def canonical_exclude(source: str) -> str:
    """Return the source with absolute paths."""
    return canonical(source) if names_labels(source) else os.path.abspath(source)


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
    if not names_labels(source):
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
