"""Mistakes of runs: confusions compared with scikit-learn, the gallery with frames decoded by PyAV,
and class changes with counts by hand."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.metrics import confusion_matrix

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.numerics import softmax
from distinit.pipeline.corpus.sources import escape_path
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.reporting.confusions import (
    MAX_DRAWN,
    RIGHT,
    confusion_counts,
    draw_matrix,
    frequent_confusions,
)
from distinit.pipeline.reporting.example_videos import POSITIONS, ExampleVideos
from distinit.pipeline.reporting.mistakes import find_changes, find_mistakes, wrong_videos
from distinit.pipeline.reporting.run_folders import find_runs
from distinit.pipeline.reporting.runs import Run
from distinit.stages.options import ReportConfig
from distinit.stages.prepare import prepare
from distinit.stages.report import report

QUIET = Console(quiet=True)
CLASSES = ["run & <b>jump</b>", "walk\x1b[31m", "sit", "stand"]


def run_of(
    folder: Path,
    videos: Path,
    seed: int,
    *,
    init: str = "scratch",
    failed: int = 1,
    backwards: bool = False,
    **config: Any,
) -> Run:
    """Return a finetuned run that was tested on the videos of a folder, with random scores."""
    names = sorted((path.name for path in videos.glob("*.mp4")), reverse=backwards)
    rng = np.random.default_rng(seed)
    labels = np.array([int(name[1:3]) for name in names]) % len(CLASSES)
    predictions = Predictions.empty(
        CLASSES, names, labels.tolist(), 2, protocol={"scores": "logits"}, identity={}
    )
    for number, name in enumerate(names):
        if number < failed:
            predictions.fail(number, "no <i>stream</i>")
            continue
        with av.open(str(videos / name)) as file:
            frames = sum(1 for _ in file.decode(video=0))
        scores = rng.normal(0, 2, (2, len(CLASSES))).astype(np.float32)
        predictions.set_scores(number, scores, np.zeros(2), frames)
    folder.mkdir(parents=True)
    options = {"init": init, "dataset": f"csv:{videos / 'labels.csv'}", "split": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({"finetune": options}))
    (folder / "result.json").write_text(json.dumps({"split": 1}))
    predictions.write(folder / "predictions.h5")
    return find_runs([folder])[0]


def wrong_by_hand(run: Run) -> set[str]:
    predictions = run.predictions
    assert predictions is not None
    scores = predictions.clip_scores.astype(np.float64).mean(axis=1)
    wrong = np.isnan(scores).any(axis=1) | (
        np.nan_to_num(scores).argmax(axis=1) != predictions.labels
    )
    return {video for video, is_wrong in zip(predictions.videos, wrong, strict=True) if is_wrong}


def test_confusions_are_those_of_scikit_learn(tmp_path: Path, tiny_store: Any) -> None:
    predictions = run_of(tmp_path / "run", tiny_store.videos, 3, failed=2).predictions
    assert predictions is not None
    readable = np.array([status == "ok" for status in predictions.status])
    guesses = predictions.video_scores[readable].argmax(axis=1)
    counts = confusion_counts(predictions)
    expected = confusion_matrix(predictions.labels[readable], guesses, labels=range(4))
    assert counts[:, :-1].tolist() == expected.tolist()
    assert (
        counts[:, -1].tolist() == np.bincount(predictions.labels[~readable], minlength=4).tolist()
    )
    table = frequent_confusions(counts, CLASSES)
    assert table is not None
    index = {name: number for number, name in enumerate(CLASSES)}
    np.fill_diagonal(expected, 0)
    for label, guess, videos, share in table.rows:
        row = index[label]
        assert int(videos) == expected[row, index[guess]]
        assert float(share) == pytest.approx(100 * int(videos) / counts[row].sum(), abs=0.5)
    listed = [int(row[2]) for row in table.rows]
    assert listed == sorted(expected[expected > 0].tolist(), reverse=True)[: len(listed)]


@pytest.mark.parametrize("classes", [7, 101])
def test_each_confused_pair_has_a_square_of_its_place(classes: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (classes, classes + 1)) * (rng.random((classes, classes + 1)) < 0.2)
    counts[:, -1] = 0
    names = [f"class {k}" for k in range(classes)]
    matrix = draw_matrix(counts, names)
    assert matrix is not None
    assert list(matrix.columns) == names
    corners = [
        (int(x), int(y))
        for each in matrix.squares
        for x, y in re.findall(r"M(\d+) (\d+)h", each.path)
    ]
    cells = {((y - matrix.top) / matrix.side, (x - matrix.left) / matrix.side) for x, y in corners}
    assert cells == {(r, c) for r, c in np.argwhere(counts > 0).tolist()}
    assert len(cells) == len(corners)
    diagonal = [each.path.count("M") for each in matrix.squares if each.colour == RIGHT]
    assert sum(diagonal) == (np.diag(counts) > 0).sum()
    assert len(matrix.counts) == (len(cells) if classes == 7 else 0)
    assert draw_matrix(np.zeros((MAX_DRAWN + 1,) * 2, int), ["x"] * (MAX_DRAWN + 1)) is None


def test_the_gallery_holds_the_wrong_videos_with_their_frames(
    tmp_path: Path, tiny_store: Any
) -> None:
    run = run_of(tmp_path / "run", tiny_store.videos, 5)
    reader = ExampleVideos()
    (mistakes,) = find_mistakes([run], reader, 100)
    assert {wrong.example.video for wrong in mistakes.shown} == wrong_by_hand(run)
    assert mistakes.num_wrong == len(mistakes.shown) < mistakes.num_videos == 12
    predictions = run.predictions
    assert predictions is not None
    probs = softmax(predictions.video_scores.astype(np.float64))
    for wrong in mistakes.shown[:-1]:
        video = predictions.videos.index(wrong.example.video)
        assert wrong.label == CLASSES[predictions.labels[video]]
        assert wrong.label_probability == pytest.approx(
            probs[video, predictions.labels[video]], abs=1e-6
        )
        assert [share for _, share in wrong.guesses] == pytest.approx(
            np.sort(probs[video])[::-1][:3].tolist(), abs=1e-6
        )
    confidences = [wrong.guesses[0][1] for wrong in mistakes.shown[:-1]]
    assert confidences == sorted(confidences, reverse=True)
    unreadable = mistakes.shown[-1]
    assert unreadable.problem == "no <i>stream</i>"
    assert unreadable.example.strip is None
    _assert_frames(reader, mistakes.shown[0].example, tiny_store.videos)
    _assert_frames(reader, mistakes.shown[3].example, tiny_store.videos)


def _assert_frames(reader: ExampleVideos, example: Any, videos: Path) -> None:
    """Check that a strip shows three frames of the video, as decoded by PyAV and scaled by PIL."""
    assert example.strip in reader.strips
    picture = Image.open(io.BytesIO(base64.b64decode(example.strip.jpeg.partition(",")[2])))
    assert picture.size == (example.strip.width, example.strip.height)
    with av.open(str(videos / example.video)) as file:
        images = [frame.to_image() for frame in file.decode(video=0)]
    size = (picture.width // 3, picture.height)
    expected = [
        images[int(position * len(images))].resize(size, Image.Resampling.BILINEAR)
        for position in POSITIONS
    ]
    joined = np.concatenate([np.asarray(image, float) for image in expected], axis=1)
    assert np.abs(np.asarray(picture, float) - joined).mean() < 8
    assert np.abs(np.asarray(picture, float) - joined[:, ::-1]).mean() > 15


@pytest.mark.slow
def test_videos_are_read_where_they_are_now_or_from_copies(tmp_path: Path, own_store: Any) -> None:
    sources = [str(own_store.videos)]
    prepare(
        PrepareConfig.model_validate({"sources": sources, "out": str(tmp_path / "copies")}), QUIET
    )
    run = run_of(tmp_path / "run", own_store.videos, 5)
    copied = replace(run, config={**run.config, "copies": str(tmp_path / "copies")})
    own_store.videos.rename(tmp_path / "moved")
    predictions = run.predictions
    assert predictions is not None
    video = wrong_videos(predictions)[0]
    for reader, tested, has_strip in (
        (ExampleVideos(), run, False),
        (ExampleVideos(str(tmp_path / "moved")), run, True),
        (ExampleVideos(), copied, True),
        (ExampleVideos(str(tmp_path / "moved"), 0), run, False),
    ):
        example = reader.example(tested, predictions, video)
        assert (example.strip is not None) == has_strip == (example.problem is None)
        assert reader.example(tested, predictions, video) == example
        assert len(reader.strips) == has_strip, "a video is read once"


@pytest.mark.parametrize("dataset", ["kinetics:PIPE", "hmdb51", "folder:/nowhere", "", "csv:\0"])
def test_other_data_sets_without_videos_have_a_reason(
    tmp_path: Path, tiny_store: Any, dataset: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    run = run_of(tmp_path / "run", tiny_store.videos, 5)
    config = {"dataset": dataset.replace("PIPE", str(tmp_path / "pipe"))}
    assert run.predictions is not None
    example = ExampleVideos().example(replace(run, config=config), run.predictions, 5)
    assert example.strip is None
    assert example.problem


def test_class_changes_are_counts_of_videos(tmp_path: Path, tiny_store: Any) -> None:
    run = run_of(tmp_path / "ours", tiny_store.videos, 0, init="/x/student")
    base = run_of(tmp_path / "base", tiny_store.videos, 5, failed=0, backwards=True)
    (changes,) = find_changes([(run, base)], ExampleVideos())
    wrong, wrong_before = wrong_by_hand(run), wrong_by_hand(base)
    predictions = run.predictions
    assert predictions is not None
    label = dict(zip(predictions.videos, predictions.labels.tolist(), strict=True))
    for name, total, before, after, change in changes.table.rows:
        in_class = {video for video, k in label.items() if CLASSES[k] == name}
        assert int(total) == len(in_class)
        assert int(before) == len(in_class - wrong_before)
        assert int(after) == len(in_class - wrong)
        assert int(change.replace("−", "-")) == int(after) - int(before) != 0
    gains = [int(row[4].replace("−", "-")) for row in changes.table.rows]
    assert max(gains) > 0 > min(gains)
    assert {each.example.video for each in changes.improved} <= wrong_before - wrong
    assert {each.example.video for each in changes.harmed} <= wrong - wrong_before
    assert changes.improved
    assert changes.harmed
    for each in changes.improved:
        assert each.guess[0][0] == each.label != (each.base_guess or [("", 0)])[0][0]


@pytest.mark.slow
def test_the_page_shows_and_escapes_them_and_no_video_is_opened_on_demand(
    tmp_path: Path, tiny_store: Any
) -> None:
    ours = run_of(tmp_path / "runs" / "ours", tiny_store.videos, 8, init="/x/student")
    base = run_of(tmp_path / "runs" / "base", tiny_store.videos, 2)
    out = tmp_path / "out"
    report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out), examples=4), QUIET)
    page = (out / "report.html").read_text(encoding="utf-8")
    strips = re.findall(r'<image id="([^"]+)" [^>]*href="data:image/jpeg;base64,([^"]+)"', page)
    for _, data in strips:
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    used = re.findall(r'<use href="#([^"]+)"', page)
    assert set(used) == {name for name, _ in strips}
    assert len(used) > len(strips) > 0, "a video of two runs is on the page once"
    assert "<b>jump" not in page
    assert "<i>stream" not in page
    assert "\x1b" not in page
    with open(out / "wrong-videos.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for run in (ours, base):
        assert {row["video"] for row in rows if row["run"] == run.name} == {
            escape_path(video) for video in wrong_by_hand(run)
        }
    report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out), examples=0), QUIET)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/jpeg" not in page
    assert "confusion matrix" in page


@pytest.mark.slow
def test_the_page_holds_in_a_browser(
    tmp_path: Path, tiny_store: Any, open_page: Callable[..., Any]
) -> None:
    run_of(tmp_path / "runs" / "ours", tiny_store.videos, 8, init="/x/student")
    run_of(tmp_path / "runs" / ("base" * 20), tiny_store.videos, 2)
    out = tmp_path / "out"
    report(ReportConfig(folders=[str(tmp_path / "runs")], out=str(out)), QUIET)
    for width in (1280, 400):
        opened = open_page(out / "report.html", width)
        assert opened.holds()
        assert opened.width == width
        assert opened.uses > 8
    spoiled = (
        (out / "report.html")
        .read_text()
        .replace("data:image/jpeg;base64,", "data:image/jpeg;base64,A", 1)
    )
    (out / "spoiled.html").write_text(spoiled.replace("</body>", "<p style='width:999px'>x</body>"))
    opened = open_page(out / "spoiled.html", 400)
    assert opened.loaded == opened.images - 1
    assert opened.wide > 0
