"""Select videos of a store: those to export, and those that a student must not see."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.documents import read_text
from ..common.errors import UsageError
from ..corpus.sources import strip_label, unescape_path
from .reader import TargetStore


def choose_videos(
    store: TargetStore, corpora: Sequence[str] = (), videos_from: str | None = None
) -> NDArray[np.int64]:
    """Return the ids of the videos of these corpora that the list names, ascending; default all.

    A line of the list is a path in a corpus, `CORPUS=PATH` if several corpora have that path, or
    the absolute path that the file had when it was extracted. `#` begins a comment line; a label
    after the path, as in `a.mp4 3`, is ignored.

    Raises:
        UsageError: A corpus or a line is not in the store.
    """
    chosen = np.ones(store.n_videos, bool)
    if corpora:
        for name in corpora:
            if name not in store.corpora:
                raise UsageError(f"--corpus {name}: the store has {', '.join(store.corpora)}")
        numbers = [list(store.corpora).index(c) for c in corpora]
        chosen &= np.isin(store.column("corpus"), numbers)
    if videos_from is not None:
        listed = np.zeros(store.n_videos, bool)
        listed[_listed(store, videos_from)] = True
        chosen &= listed
        if not chosen.any():
            raise UsageError(
                f"--videos-from {videos_from}: names no video of --corpus {', '.join(corpora)}"
            )
    return np.flatnonzero(chosen)


def _listed(store: TargetStore, file: str) -> list[int]:
    lines = [line for line in _lines("--videos-from", file) if not line.startswith("#")]
    by_name = _by_name(store)
    videos: list[int] = []
    missing: list[str] = []
    for line in lines:
        ids = by_name.get(line) or by_name.get(strip_label(line))
        videos += ids or ()
        if not ids:
            missing.append(line)
    if missing:
        raise UsageError(
            f"--videos-from {file}: {len(missing)} of {len(lines)} lines name no video of {store.name}; "
            f"the first: {missing[0]!r}"
        )
    if not lines:
        raise UsageError(f"--videos-from {file}: names no video")
    return videos


def _by_name(store: TargetStore) -> dict[str, list[int]]:
    """Return video ids by every name that a list can use."""
    names = list(store.corpora.items())
    videos: dict[str, list[int]] = {}
    paths = zip(store.column("corpus").tolist(), store.column("path").tolist(), strict=True)
    for i, (corpus, escaped) in enumerate(paths):
        path = unescape_path(str(escaped))
        name, root = names[corpus]
        for key in {path, f"{name}={path}", os.path.join(root, path)}:
            videos.setdefault(key, []).append(i)
    return videos


@dataclass(frozen=True)
class Exclusion:
    """Videos of a store that are excluded, ids ascending.

    num_named: number of videos that `source` names. digest: SHA-256 of the set of videos, which
    must be the same in a resumed run.
    """

    store: TargetStore
    source: str
    videos: NDArray[np.int64]
    num_named: int
    digest: str

    @classmethod
    def of(
        cls, store: TargetStore, source: str, videos: Iterable[int], num_named: int
    ) -> Exclusion:
        """Exclude these videos."""
        ids = np.array(sorted(set(videos)), np.int64)
        lines = "\n".join(sorted("/".join(store.place(int(video))) for video in ids))
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        return cls(store, source, ids, num_named, digest)

    def describe(self) -> str:
        """Return the numbers of excluded and of all videos as text for the log."""
        listed = f", which names {self.num_named}" if self.num_named != len(self.videos) else ""
        excluded = f"{len(self.videos)} of {self.store.n_videos} videos are never drawn"
        return f"exclude: {excluded} (named by {self.source}{listed})"

    def remove_from(self, videos: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the videos that are not excluded; UsageError if none is left."""
        remaining = videos[~np.isin(videos, self.videos)]
        if len(remaining) == 0:
            raise UsageError(
                f"exclude: {self.source} names every video of {self.store.name} that could be drawn"
            )
        return remaining


def exclude_list(store: TargetStore, path: str) -> Exclusion:
    """Return the exclusion of the videos that a list names as CORPUS/PATH.

    A line that begins with # is a comment unless the store has that video.

    Raises:
        UsageError: The list is empty, or a line names no video of the store. Otherwise a typing
            error would let a student see a test video.
    """
    unmatched = dict.fromkeys(_lines("exclude:", path))
    videos = []
    for video in range(store.n_videos):
        name = "/".join(store.place(video))
        if name in unmatched:
            videos.append(video)
            del unmatched[name]
    unknown = [line for line in unmatched if not line.startswith("#")]
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


def _lines(option: str, path: str) -> list[str]:
    """Return the non-blank lines of a list; UsageError if it cannot be read."""
    try:
        return [line for text in read_text(path).split("\n") if (line := text.strip())]
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be read: {error.strerror}") from error
