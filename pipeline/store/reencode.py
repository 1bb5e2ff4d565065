"""Choose the encoding of the rows of an exported store, and fit the basis of pca:D.

The basis is fitted on rows that a hash of the videos' digests selects, in the order of that hash.
So it does not depend on the order in which videos were listed, nor on shards or workers.

Shapes: n rows, K features, D components.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError
from .encoding import ENCODINGS, Codec
from .reader import TargetStore
from .store_options import Encoding, pca_components

ROWS_PER_COMPONENT = 20
MIN_ROWS_PER_COMPONENT = 2
# Rows read at a time.
BLOCK = 1024


def codecs_for(
    store: TargetStore,
    teachers: Sequence[str],
    encoding: Encoding | None,
    videos: NDArray[np.int64],
) -> dict[str, Codec]:
    """Return how the rows of each teacher are to be stored.

    Args:
        store: The source.
        teachers: Names of its teachers.
        encoding: The requested encoding; None keeps that of the store. `pca:D` is for features;
            logits keep their encoding.
        videos: The exported videos, on whose rows the basis of pca:D is fitted.

    Raises:
        UsageError: A teacher's rows cannot be stored in this encoding.
    """
    codecs = {name: store.teacher(name).codec for name in teachers}
    if encoding is None:
        return codecs
    components = pca_components(encoding)
    if components and all(codec.output == "logits" for codec in codecs.values()):
        raise UsageError(
            f"--encoding {encoding}: is for features, and {', '.join(codecs)} of {store.name} "
            f"have logits; allowed: {', '.join(ENCODINGS)}"
        )
    for name, codec in codecs.items():
        if codec.encoding == encoding or (components and codec.output == "logits"):
            continue
        if components and store.teacher(name).grid:
            raise UsageError(
                f"--encoding {encoding}: teacher {name!r} of {store.name} holds cells, which have no "
                f"pca:D; allowed: {', '.join(ENCODINGS)}"
            )
        if encoding == "float16" or pca_components(codec.encoding):
            raise UsageError(
                f"--encoding {encoding}: teacher {name!r} of {store.name} is stored in "
                f"{codec.encoding}, whose losses cannot be undone; leave --encoding out, or "
                "choose teachers by --teacher"
            )
        codecs[name] = (
            fit_pca(store, name, components, videos)
            if components
            else replace(codec, encoding=encoding)
        )
    return codecs


def fit_pca(store: TargetStore, teacher: str, components: int, videos: NDArray[np.int64]) -> Codec:
    """Return a codec for pca:D with the principal components of a teacher's features.

    The features are centred, but not divided by their standard deviations.

    Raises:
        UsageError: There are too few rows, or fewer features than components.
    """
    width = store.teacher(teacher).width
    rows = sample_rows(store, teacher, ROWS_PER_COMPONENT * components, videos)
    max_components = min(width, len(rows) // MIN_ROWS_PER_COMPONENT)
    if components > max_components:
        raise UsageError(
            f"--encoding pca:{components}: teacher {teacher!r} has {width} features and at least "
            f"{len(rows)} rows to fit on; at most pca:{max_components} is allowed "
            f"({MIN_ROWS_PER_COMPONENT} rows per component)"
            if max_components
            else f"--encoding pca:{components}: teacher {teacher!r} has no rows to fit on"
        )
    total, products = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(rows), BLOCK):
        x = store.outputs(teacher, rows[start : start + BLOCK]).astype(np.float64)
        total += x.sum(axis=0)
        products += x.T @ x
    mean = total / len(rows)
    covariance = products / len(rows) - np.outer(mean, mean)
    vectors = np.linalg.eigh(covariance)[1].T[::-1][:components]
    # The sign of an eigenvector is arbitrary; fix it by the largest component.
    sign = np.sign(vectors[np.arange(components), np.abs(vectors).argmax(axis=1)])
    basis = (vectors * sign[:, None]).astype(np.float32, order="C")
    return Codec("features", f"pca:{components}", width, basis, mean.astype(np.float32))


def sample_rows(
    store: TargetStore, teacher: str, count: int, videos: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return at least `count` rows of a teacher from many videos, or all if it has fewer.

    As few rows per video as suffice are taken, spread evenly over the video. The videos are in the
    order of a hash of their digests.
    """
    usable = np.intersect1d(store.usable([teacher]), videos)
    counts = store.row_counts[usable]
    max_rows = _rows_per_video(counts, count)
    keys = {int(v): _key(store, int(v)) for v in usable}
    chosen: list[NDArray[np.int64]] = []
    total = 0
    for video in sorted(keys, key=keys.__getitem__):
        rows = store.rows_of(np.array([video]))
        num_rows = min(len(rows), max_rows)
        chosen.append(rows[np.linspace(0, len(rows) - 1, num_rows).round().astype(np.int64)])
        total += num_rows
        if total >= count:
            break
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def _rows_per_video(counts: NDArray[np.int64], min_rows: int) -> int:
    """Return the smallest m with Σ min(counts, m) ≥ min_rows, or the largest count."""
    candidates = range(1, int(np.max(counts, initial=1)))
    return 1 + bisect_left(candidates, min_rows, key=lambda m: int(np.minimum(counts, m).sum()))


def _key(store: TargetStore, video: int) -> tuple[bytes, tuple[str, str]]:
    """Return the sort key of a video; its path decides between files with the same digest."""
    digest = hashlib.blake2b(store.digest(video).encode(), digest_size=16).digest()
    return digest, store.place(video)
