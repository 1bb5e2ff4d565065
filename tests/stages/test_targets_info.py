"""`targets info`: what it counts, against the arrays themselves."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zarr

from distinit.pipeline.common.console import Console
from distinit.pipeline.store.store_options import InfoConfig
from distinit.stages.targets_info import targets_info


@pytest.mark.slow
def test_files_that_an_extraction_moves_meanwhile_are_no_error(
    make_store: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = make_store()
    size = targets_info(InfoConfig(store=str(root)), Console(quiet=True))["bytes"]
    (root / "staging").mkdir()
    for name in ("before", "after"):
        (root / "staging" / name).write_bytes(b"12345")
    summarize_store = Path.stat

    def stat(path: Path, **how: Any) -> Any:
        """The file `before` goes before anybody looks at it, `after` when somebody has."""
        if path.name == "before":
            path.unlink(missing_ok=True)
        summary = summarize_store(path, **how)
        if path.name == "after":
            path.unlink()
        return summary

    monkeypatch.setattr(Path, "stat", stat)
    assert targets_info(InfoConfig(store=str(root)), Console(quiet=True))["bytes"] - size in (0, 5)


@pytest.mark.slow
def test_histogram_failures_and_bytes(make_store: Callable[..., tuple[Any, Path]]) -> None:
    recipe, root = make_store(teachers={"t": 10, "wide": 100})
    out, err = io.StringIO(), io.StringIO()
    info = targets_info(
        InfoConfig(store=str(root), list_failed=True), Console(stdout=out, stderr=err)
    )
    failed = [v for v in recipe.videos if recipe.rows(v) == 0]
    assert info["failures"] == {"no video stream (audio only)": len(failed)}
    assert [f["path"] for f in info["failed"]] == [
        recipe.path(v).replace("%FF", "\udcff") for v in failed
    ]
    rows = sum(map(recipe.rows, recipe.videos))
    for teacher in info["teachers"]:
        name, classes = teacher["name"], teacher["classes"]
        values = zarr.open_array(root / "teachers" / name / "entropy", mode="r")[:]
        counts, edges = (teacher["entropy_nats"]["histogram"][key] for key in ("counts", "edges"))
        assert edges[0] == 0
        assert math.isclose(edges[-1], math.log(classes))
        expected = [int(((values >= a) & (values < b)).sum()) for a, b in pairwise(edges)]
        assert counts == expected
        assert sum(counts) == rows == teacher["rows"]
        files = [
            p
            for p in (root / "teachers" / name).rglob("c/**/*")
            if p.is_file() and "class" not in p.parts
        ]
        assert teacher["bytes"] == sum(p.stat().st_size for p in files)
        assert teacher["bytes_a_row"] == round(teacher["bytes"] / rows, 1)
        assert 2 * classes + 4 < teacher["bytes_a_row"] < 2 * classes + 100
    text = out.getvalue()
    assert "no video stream (audio only)" in text
    assert "█" in text
    json.dumps(info)
