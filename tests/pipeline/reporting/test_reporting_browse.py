"""The page of a store: its content compared with the arrays, missing videos, and a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from PIL import Image
from pydantic import ValidationError

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.evaluation.evaluation_options import CompareConfig
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.reporting.store_page import EXTREMES, HEIGHT, STRIP, summarize_store
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import BrowseConfig
from distinit.pipeline.video.decoder import VideoReader
from distinit.stages.prepare import prepare
from distinit.stages.targets_browse import targets_browse
from distinit.stages.targets_compare import targets_compare
from distinit.tests import warm

QUIET = Console(quiet=True)


def decoded(path: Path, index: int) -> np.ndarray:
    with VideoReader(str(path)) as reader:
        frames = {i: frame.to_ndarray(format="rgb24") for i, _, frame in reader.decode_plain()}
    return frames[index]


def test_pictures_and_labels_are_those_of_the_frames(tiny_store: Any) -> None:
    summary = summarize_store(TargetStore.open(tiny_store.path), 3, seed=4)
    assert [teacher.teacher_stats.teacher for teacher in summary.teachers] == ["sure", "unsure"]
    root = zarr.open_group(tiny_store.path, mode="r")
    video_of_row, index = (np.asarray(root[f"frames/{name}"][:]) for name in ("video", "index"))
    paths = [str(path) for path in root["videos/path"][:]]
    for video in summary.videos:
        assert video.problem is None
        number = paths.index(video.path)
        assert 2 <= len(video.pictures) <= STRIP
        for picture in video.pictures:
            row = int(np.flatnonzero((video_of_row == number) & (index == picture.index))[0])
            assert picture.seconds == pytest.approx(picture.index / 25)
            for teacher, prediction in picture.predictions.items():
                logits = np.asarray(root[f"teachers/{teacher}/logits"][row], np.float64)
                probs = np.exp(logits) / np.exp(logits).sum()
                names = np.array([str(name) for name in root[f"teachers/{teacher}/class"][:]])
                assert [label for label, _ in prediction.labels] == names[
                    np.argsort(-probs)[:3]
                ].tolist()
                assert prediction.labels[0][1] == pytest.approx(probs.max())
                assert prediction.entropy == pytest.approx(-(probs * np.log(probs)).sum(), abs=0.02)
        picture = video.pictures[-1]
        jpeg = np.asarray(
            Image.open(io.BytesIO(base64.b64decode((picture.jpeg or "").split(",")[1])))
        )
        assert min(jpeg.shape[:2]) == HEIGHT
        frame = decoded(tiny_store.videos / video.path, picture.index)
        scaled = np.asarray(
            Image.fromarray(frame).resize(jpeg.shape[1::-1], Image.Resampling.BILINEAR)
        )
        assert np.abs(scaled.astype(float) - jpeg).mean() < 8


def test_extremes_are_of_different_videos_and_in_order(tiny_store: Any) -> None:
    (teacher, _) = summarize_store(TargetStore.open(tiny_store.path), 0).teachers
    root = zarr.open_group(tiny_store.path, mode="r")
    entropy, video = (
        np.asarray(root["teachers/sure/entropy"][:]),
        np.asarray(root["frames/video"][:]),
    )
    rows = video >= 0
    lowest = sorted(float(entropy[rows & (video == v)].min()) for v in np.unique(video[rows]))
    highest = sorted(
        (float(entropy[rows & (video == v)].max()) for v in np.unique(video[rows])), reverse=True
    )
    assert [p.predictions["sure"].entropy for p in teacher.lowest_entropy] == pytest.approx(
        lowest[:EXTREMES]
    )
    assert [p.predictions["sure"].entropy for p in teacher.highest_entropy] == pytest.approx(
        highest[:EXTREMES]
    )
    best = Counter(np.asarray(root["teachers/sure/logits"][:])[rows].argmax(1).tolist())
    assert teacher.teacher_stats.most_frequent(3)[0][1] == pytest.approx(
        best.most_common(1)[0][1] / rows.sum()
    )


def test_a_missing_and_a_changed_video_are_shown_as_missing(own_store: Any, tmp_path: Path) -> None:
    paths = sorted(own_store.videos.iterdir())
    paths[0].unlink()
    paths[1].write_bytes(paths[3].read_bytes())
    video_roots = {"videos": str(own_store.videos)}
    result = targets_browse(
        BrowseConfig(
            store=str(own_store.path), out=str(tmp_path / "out"), sample=99, video_roots=video_roots
        ),
        QUIET,
    )
    assert len(result["videos"]) == len(paths)
    assert "no such file" in result["missing"][paths[0].name]
    assert "the file has changed: its digest is" in result["missing"][paths[1].name]
    assert len(result["missing"]) == 2
    page = (tmp_path / "out" / "browse.html").read_text(encoding="utf-8")
    assert page.count("missing here: ") == 2
    assert paths[0].name in page
    with pytest.raises(UsageError, match="the store has the corpora videos"):
        targets_browse(
            BrowseConfig(
                store=str(own_store.path),
                out=str(tmp_path / "out"),
                video_roots={"other": str(tmp_path)},
            ),
            QUIET,
        )
    with pytest.raises(ValidationError, match="sample"):
        BrowseConfig(store=str(own_store.path), out=str(tmp_path / "out"), sample=-1)


@pytest.mark.slow
def test_pictures_come_from_copies_too(tiny_store: Any, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    prepare(
        PrepareConfig.model_validate({"sources": [str(tiny_store.videos)], "out": str(copies)}),
        QUIET,
    )
    store = TargetStore.open(tiny_store.path)
    from_copies, from_videos = (
        summarize_store(store, 2, video_roots={"videos": str(copies)}),
        summarize_store(store, 2),
    )
    for a, b in zip(from_copies.videos, from_videos.videos, strict=True):
        assert a.problem is None
        assert [p.index for p in a.pictures] == [p.index for p in b.pictures]
        assert a.pictures[0].jpeg != b.pictures[0].jpeg


@pytest.mark.slow
def test_the_command_and_its_page_in_a_browser(
    tiny_store: Any, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    words = ("targets", "browse", tiny_store.path, "--out", tmp_path, "--sample", 2, "--json")
    done = warm.run(*words)
    assert done.returncode == 0, done.stderr
    page = Path(json.loads(done.stdout)["page"])
    assert not re.search(r"<(script|iframe)|@import|url\(", page.read_text(encoding="utf-8"))
    options = CompareConfig(store=str(tiny_store.path), out=str(tmp_path / "compare"), videos=2)
    compared = Path(targets_compare(options, QUIET)["page"])
    for width in (1280, 400):
        opened = open_page(page, width)
        assert opened.holds()
        assert opened.width == width
        assert opened.images > 2 * 2 + 2 * 2 * EXTREMES
        opened = open_page(compared, width)
        assert opened.holds()
        assert opened.images == 2
