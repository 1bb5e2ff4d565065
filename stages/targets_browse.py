"""`distinit targets browse STORE --out DIR`: the store as a page that a browser opens from disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..pipeline.common.console import Console
from ..pipeline.common.errors import UsageError
from ..pipeline.common.files import write_page
from ..pipeline.common.run_dir import check_page_dir
from ..pipeline.reporting.browse import summarize_store
from ..pipeline.reporting.browse_page import browse_page
from ..pipeline.store.reader import TargetStore, check_moved


def targets_browse(
    store_path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    console: Console,
    *,
    sample: int = 12,
    seed: int = 0,
    moved: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes OUT/browse.html; the result says what is on it.

    sample: videos that are shown as strips of frames. moved: where a corpus lies now, the videos or
    copies of them. Raises StoreError, UsageError (a corpus that the store does not have, `out`
    cannot be written).
    """
    if sample < 0:
        raise UsageError(f"--sample {sample}: expected 0 or more videos")
    store = TargetStore.open(store_path)
    check_moved(store, moved or {})
    page = Path(out) / "browse.html"
    check_page_dir(page)
    found = summarize_store(store, sample, seed=seed, moved=moved)
    write_page(page, browse_page(found, __version__))
    missing = {video.path: video.problem for video in found.videos if video.problem is not None}
    for path, problem in missing.items():
        console.warn(f"{path}: shown without pictures, {problem}")
    console.say(f"{len(found.videos)} videos of {store.n_videos}: {page}")
    return {
        "page": str(page),
        "videos": [video.path for video in found.videos],
        "missing": missing,
        "failures": len(found.failures),
    }
