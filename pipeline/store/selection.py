"""Which videos of a store are meant: by corpus, and by a list of paths."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError
from ..corpus.sources import strip_label, unescape_path
from .reader import TargetStore


def choose_videos(
    store: TargetStore, corpora: Sequence[str] = (), videos_from: str | Path | None = None
) -> NDArray[np.int64]:
    """Return ids of the videos of these corpora that the list names, ascending; by default all.

    A line of the list is a path in a corpus, `CORPUS=PATH` if several have that path, or the
    absolute path of the file when it was extracted. `#` begins a comment line; a label after the
    path, as in `a.mp4 3`, is ignored.

    Raises:
        UsageError: A corpus or a line names nothing in the store.
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
        listed[_listed(store, Path(videos_from))] = True
        chosen &= listed
        if not chosen.any():
            raise UsageError(
                f"--videos-from {videos_from}: names no video of --corpus {', '.join(corpora)}"
            )
    return np.flatnonzero(chosen)


def _listed(store: TargetStore, file: Path) -> list[int]:
    try:
        lines = [line.strip() for line in os.fsdecode(file.read_bytes()).splitlines()]
    except OSError as error:
        raise UsageError(f"--videos-from {file}: {error.strerror}") from error
    lines = [line for line in lines if line and not line.startswith("#")]
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
    """Return ids by every way to name a video."""
    names = list(store.corpora.items())
    videos: dict[str, list[int]] = {}
    paths = zip(store.column("corpus").tolist(), store.column("path").tolist(), strict=True)
    for i, (corpus, escaped) in enumerate(paths):
        path = unescape_path(str(escaped))
        name, root = names[corpus]
        for key in {path, f"{name}={path}", os.path.join(root, path)}:
            videos.setdefault(key, []).append(i)
    return videos
