"""The page about a store without its videos: failures with reasons, missing pictures, odd names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.reporting.store_page import store_page, summarize_store
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import BrowseConfig
from distinit.stages.targets_browse import targets_browse


@pytest.mark.slow
def test_failures_and_missing_videos_are_named(
    make_store: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    recipe, root = make_store(teachers={"t": 10, "wide": 100})
    store = TargetStore.open(root)
    summary = summarize_store(store, 4)
    failed = [recipe.path(v).replace("%FF", "\udcff") for v in recipe.videos if recipe.rows(v) == 0]
    assert [f.path for f in summary.failures] == failed
    assert {f.reason for f in summary.failures} == {"no video stream (audio only)"}
    assert len(summary.videos) == 4
    for video in summary.videos:
        assert video.problem == "no such file"
        assert all(picture.jpeg is None for picture in video.pictures)
        assert {line.name for line in video.curves} == {"t", "wide"}
    page = store_page(summary, "<0>")
    assert "<0>" not in page
    assert page.count("no video stream (audio only)") == len(failed) + 1
    assert page.count("missing here: no such file") == 4
    assert "ü\\udcff.mp4" in page
    targets_browse(
        BrowseConfig(store=str(root), out=str(tmp_path / "out"), sample=4), Console(quiet=True)
    )
    assert "<img" not in (tmp_path / "out" / "browse.html").read_text(encoding="utf-8")
