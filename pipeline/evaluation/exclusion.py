"""`--exclude`: a list of videos, or the test side of labels, as videos of a store."""

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
    """Whether `source` is `csv:FILE` or another form of labels, and no list; a file of that very
    name is a list."""
    kind, colon, where = source.partition(":")
    return bool(colon and where) and kind in FORMS and not os.path.exists(source)


def canonical_exclude(source: str) -> str:
    """The source under a name that holds from any folder."""
    return canonical(source) if names_labels(source) else os.path.abspath(source)


def exclude(
    store: TargetStore, source: str, split: int | str | None, video_roots: Mapping[str, str]
) -> Exclusion:
    """The videos of the store that a list names, or that are among the test videos of labels.

    Labelled videos are known by content, so the labels may name copies or other paths. video_roots:
    where corpora lie now. Raises UsageError: an empty list, a line or a label file that names no
    video of the store; LabelsError.
    """
    if not names_labels(source):
        if split is not None:
            raise UsageError(
                f"--split {split}: {source} is a list; a split goes with --exclude csv:FILE"
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
        # Many of Kinetics' videos are gone from the web: what is nowhere is in no store either.
        labels = load_labels(dataset, number, root=root, partial=kind == "kinetics")
        digests += [labels.digest(video) for video in labels.test]
        paths += [labels.absolute(video) for video in labels.test]
    places = [store.video_path(video, video_roots) for video in range(store.n_videos)]
    listed = SeenVideos(store.column("digest"), places, np.full(store.n_videos, OWN, np.uint8))
    by_path = {place: video for video, place in enumerate(map(os.path.abspath, places))}
    found = {row for rows in listed.rows(digests, paths) for row in rows}
    found |= {by_path[path] for path in map(os.path.abspath, paths) if path in by_path}
    if not found:
        raise UsageError(
            f"exclude: none of the {len(set(paths))} test videos of {source} is in {store.name}"
        )
    return Exclusion.of(store, source, found, len(set(paths)))


def left_out_of(
    store: TargetStore, source: str | None, split: int | str | None, video_roots: Mapping[str, str]
) -> Exclusion | None:
    """What `exclude` gives; None where nothing is left out. UsageError for a split of nothing."""
    if source is None:
        if split is not None:
            raise UsageError(
                f"--split {split}: goes with --exclude csv:FILE, whose test videos are left out"
            )
        return None
    return exclude(store, source, split, video_roots)
