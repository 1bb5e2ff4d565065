"""Write a page about a store that a browser opens from disk (`distinit targets browse`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__
from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.files import write_page
from ..pipeline.common.run_dir import check_page_dir
from ..pipeline.reporting.store_page import store_page, summarize_store
from ..pipeline.store.reader import TargetStore, check_video_roots
from ..pipeline.store.store_options import BrowseConfig

RECORD = "browse.yaml"


def targets_browse(options: BrowseConfig, console: Console) -> dict[str, Any]:
    """Write OUT/browse.html, and return its path and the paths of the shown videos.

    Raises:
        StoreError: The store cannot be read.
        UsageError: `video_roots` names a corpus that the store does not have, or `out` cannot be
            written.
    """
    store = TargetStore.open(options.store)
    check_video_roots(store, options.video_roots)
    page = Path(options.out) / "browse.html"
    check_page_dir(page, (RECORD,))
    content = summarize_store(
        store, options.sample, seed=options.seed, video_roots=options.video_roots
    )
    write_page(page, store_page(content, __version__))
    write_config(page.with_name(RECORD), "targets-browse", options)
    missing = {video.path: video.problem for video in content.videos if video.problem is not None}
    for path, problem in missing.items():
        console.warn(f"{path}: shown without pictures, {problem}")
    console.info(f"{len(content.videos)} videos of {store.n_videos}: {page}")
    return {
        "page": str(page),
        "videos": [video.path for video in content.videos],
        "missing": missing,
        "failures": len(content.failures),
    }
