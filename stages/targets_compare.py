"""Compare the teachers of a store (`distinit targets compare`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__
from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.files import write_page
from ..pipeline.common.run_dir import check_page_dir
from ..pipeline.evaluation.evaluation_options import CompareConfig
from ..pipeline.evaluation.teacher_comparison import compare_teachers
from ..pipeline.reporting.teachers_page import (
    as_dict,
    disputed_table,
    disputed_videos,
    pairs_table,
    teachers_page,
    teachers_table,
)
from ..pipeline.store.reader import TargetStore, check_video_roots

RECORD = "compare.yaml"


def targets_compare(options: CompareConfig, console: Console) -> dict[str, Any]:
    """Show the agreement of teachers, and with `out` write OUT/compare.html.

    Raises:
        StoreError: The store cannot be read.
        UsageError: There are fewer than two teachers, or `out` cannot be written.
    """
    store = TargetStore.open(options.store)
    check_video_roots(store, options.video_roots)
    page = None if options.out is None else Path(options.out) / "compare.html"
    if page is not None:
        check_page_dir(page, (RECORD,))
    comparison = compare_teachers(store, options.teachers, sample=options.sample, seed=options.seed)
    roots = None if page is None else options.video_roots
    videos = disputed_videos(store, comparison, options.videos, roots)
    for table in (pairs_table(comparison), teachers_table(comparison), disputed_table(videos)):
        if table.rows:
            console.table(table.to_rich())
    if page is not None:
        write_page(page, teachers_page(store, comparison, videos, __version__))
        write_config(page.with_name(RECORD), "targets-compare", options)
        for video in videos:
            if video.problem is not None:
                console.warn(f"{video.path}: shown without a picture, {video.problem}")
        console.info(f"{page}")
    return {
        "store": store.name,
        "page": None if page is None else str(page),
        **as_dict(comparison, videos),
    }
