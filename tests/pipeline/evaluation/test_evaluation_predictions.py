"""predictions.h5: readable with plain h5py, sufficient for every metric, refused when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from distinit.pipeline.common.errors import CheckpointError
from distinit.pipeline.common.hdf5 import Hdf5Writer
from distinit.pipeline.evaluation.predictions import (
    Predictions,
    PredictionsError,
    metrics_from_file,
    require_classes,
)

CLASSES = ["clap", "run, fast", "sit"]
VIDEOS = ["a/1.mp4", "b 2.mp4", os.fsdecode(b"\xff.mp4"), "-d%.mp4"]


def make_predictions(pending: bool = False) -> Predictions:
    predictions = Predictions.empty(
        CLASSES,
        VIDEOS,
        [0, 1, 2, 0],
        10,
        protocol={"clips": 10, "resize": (128, 171)},
        identity={"weights": "w"},
    )
    rng = np.random.default_rng(0)
    for video in (0, 1, 3):
        scores = rng.dirichlet(np.ones(3), size=10).astype(np.float32)
        predictions.set_scores(video, scores, np.arange(10), 40)
    if not pending:
        predictions.fail(2, "empty file")
    return predictions


def test_metrics_follow_from_the_tables(tmp_path: Path) -> None:
    """Plain h5py and NumPy give the results of metrics_from_file."""
    make_predictions().write(tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5") as file:
        scores, labels = file["clip_scores"][:], file["labels"][:]
        video_scores = file["video_scores"][:]
        assert file["videos"].asstr()[:].tolist()[:2] == ["a/1.mp4", "b 2.mp4"]
        assert file["status"].asstr()[:].tolist() == ["ok", "ok", "failed", "ok"]
    np.testing.assert_allclose(video_scores, scores.mean(axis=1), atol=1e-6)
    assert np.isnan(scores[2]).all()
    readable = [0, 1, 3]
    top1 = sum(int(scores[v].mean(axis=0).argmax() == labels[v]) for v in readable)
    per_clip = sum(int(c.argmax() == labels[v]) for v in readable for c in scores[v])
    metrics = metrics_from_file(tmp_path / "p.h5")
    assert metrics["top1"]["value"] == pytest.approx(top1 / 4)
    assert metrics["per_clip"]["value"] == pytest.approx(per_clip / 40)
    assert metrics["top5"]["value"] == 0.75, (
        "the unreadable video is wrong, although top 5 of 3 classes is always correct"
    )
    assert [f["reason"] for f in metrics["failed"]] == ["empty file"]
    assert sum(c["videos"] for c in metrics["per_class"].values()) == metrics["videos"] == 4
    assert sum(c["right"] for c in metrics["per_class"].values()) == top1


def test_round_trip_and_resume(tmp_path: Path) -> None:
    first = make_predictions(pending=True)
    first.write(tmp_path / "p.h5")
    read = Predictions.read(tmp_path / "p.h5")
    assert read.videos == VIDEOS
    assert read.classes == CLASSES
    np.testing.assert_array_equal(read.clip_scores, first.clip_scores)
    assert os.listdir(tmp_path) == ["p.h5"], "no partial file stays behind"
    with pytest.raises(PredictionsError, match="1 of 4 "):
        metrics_from_file(tmp_path / "p.h5")

    resumed = Predictions.empty(
        CLASSES,
        VIDEOS,
        [0, 1, 2, 0],
        10,
        protocol={"clips": 10, "resize": (128, 171)},
        identity={"weights": "w"},
    )
    assert resumed.resume_from(read) == 3
    assert resumed.pending == [2]
    other = Predictions.empty(
        CLASSES,
        VIDEOS,
        [0, 1, 2, 0],
        10,
        protocol={"clips": 10, "resize": (128, 171)},
        identity={"weights": "v"},
    )
    assert other.resume_from(read) == 0, "scores of other weights are never copied"


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        Predictions.read(path)
    path.write_bytes(b"not hdf5 at all")
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        Predictions.read(path)
    make_predictions().write(path)
    with h5py.File(path, "r+") as file:
        file["clip_scores"][0, 0, 0] = 0.9
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        metrics_from_file(path)
    # A file of distinit 0.1 has no digest.
    with Hdf5Writer(path) as writer:
        make_predictions()._fill(writer.file)
        writer.file["clip_scores"][0, 0, 0] = 0.9
    with pytest.raises(PredictionsError, match="clip_scores"):
        metrics_from_file(path)
    make_predictions().write(path)
    needle = make_predictions().clip_scores[1].tobytes()
    content = bytearray(path.read_bytes())
    position = content.find(needle)
    assert position > 0
    # The checksum detects one flipped bit.
    content[position + 5] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        metrics_from_file(path)


def test_class_lists_must_agree() -> None:
    require_classes(["a", "b"], ["a", "b"], origin="x", expected_origin="y")
    with pytest.raises(CheckpointError, match=r"x.* y.*'c'.*'b'"):
        require_classes(["a", "c"], ["a", "b"], origin="x", expected_origin="y")
    with pytest.raises(CheckpointError, match=r"3 .*2"):
        require_classes(["a", "b", "c"], ["a", "b"], origin="x", expected_origin="y")
