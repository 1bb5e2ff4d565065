"""Videos of a store that a student must not see, above all those it will be tested on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.documents import read_text
from ..common.errors import UsageError
from .reader import TargetStore


@dataclass(frozen=True)
class Exclusion:
    """Videos of a store that are excluded, ids ascending.

    wanted: how many `source` names; digest: SHA-256 of the set of videos, which a resumed run must
    share.
    """

    store: TargetStore
    source: str
    videos: NDArray[np.int64]
    wanted: int
    digest: str

    @classmethod
    def of(cls, store: TargetStore, source: str, videos: Iterable[int], wanted: int) -> Exclusion:
        """Return the exclusion of these videos."""
        ids = np.array(sorted(set(videos)), np.int64)
        lines = "\n".join(sorted("/".join(store.place(int(video))) for video in ids))
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        return cls(store, source, ids, wanted, digest)

    def describe(self) -> str:
        """For the log: how many of how many."""
        among = f", which names {self.wanted}" if self.wanted != len(self.videos) else ""
        never = f"{len(self.videos)} of {self.store.n_videos} videos are never drawn"
        return f"exclude: {never} (named by {self.source}{among})"

    def remove_from(self, videos: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the videos that are not excluded; UsageError if none is left."""
        kept = videos[~np.isin(videos, self.videos)]
        if len(kept) == 0:
            raise UsageError(
                f"exclude: {self.source} names every video of {self.store.name} that could be drawn"
            )
        return kept


def exclude_list(store: TargetStore, path: str) -> Exclusion:
    """Return the videos that a list names, as CORPUS/PATH.

    A line that begins with # is a comment unless the store has that video.

    Raises:
        UsageError: The list names nothing, or a line names no video of the store: a list with a
            typing error would leave a test video in.
    """
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except OSError as error:
        raise UsageError(f"exclude: {path} cannot be read: {error.strerror}") from error
    named = dict.fromkeys(line for line in lines if line)
    videos = []
    for video in range(store.n_videos):
        name = "/".join(store.place(video))
        if name in named:
            videos.append(video)
            del named[name]
    unknown = [line for line in named if not line.startswith("#")]
    example = "/".join(store.place(0)) if store.n_videos else "CORPUS/PATH"
    if unknown:
        raise UsageError(
            f"exclude: {path}: {unknown[0]!r} ({len(unknown)} such) is not in {store.name}; "
            f"a line is CORPUS/PATH, as in {example!r}; for a file of labels use csv:{path}"
        )
    if not videos:
        raise UsageError(
            f"exclude: {path} names no video; a line is CORPUS/PATH, as in {example!r}"
        )
    return Exclusion.of(store, path, videos, len(videos))
