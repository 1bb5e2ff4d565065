"""predictions.h5: readable with plain h5py, enough to recompute every number, and refused when
damaged."""

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


def made(pending: bool = False) -> Predictions:
    found = Predictions.empty(
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
        found.set_scores(video, scores, np.arange(10), 40)
    if not pending:
        found.fail(2, "empty file")
    return found


def test_numbers_follow_from_the_tables_alone(tmp_path: Path) -> None:
    """Plain h5py and NumPy come to what metrics_from_file says."""
    made().write(tmp_path / "p.h5")
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
    found = metrics_from_file(tmp_path / "p.h5")
    assert found["top1"]["value"] == pytest.approx(top1 / 4)
    assert found["per_clip"]["value"] == pytest.approx(per_clip / 40)
    assert found["top5"]["value"] == 0.75, (
        "the unread video is wrong even among the best five of three"
    )
    assert [f["reason"] for f in found["failed"]] == ["empty file"]
    assert sum(c["videos"] for c in found["per_class"].values()) == found["videos"] == 4
    assert sum(c["right"] for c in found["per_class"].values()) == top1


def test_round_trip_and_continuation(tmp_path: Path) -> None:
    first = made(pending=True)
    first.write(tmp_path / "p.h5")
    read = Predictions.read(tmp_path / "p.h5")
    assert read.videos == VIDEOS
    assert read.classes == CLASSES
    np.testing.assert_array_equal(read.clip_scores, first.clip_scores)
    assert os.listdir(tmp_path) == ["p.h5"], "no partial file stays behind"
    with pytest.raises(PredictionsError, match="1 of 4 "):
        metrics_from_file(tmp_path / "p.h5")

    again = Predictions.empty(
        CLASSES,
        VIDEOS,
        [0, 1, 2, 0],
        10,
        protocol={"clips": 10, "resize": (128, 171)},
        identity={"weights": "w"},
    )
    assert again.resume_from(read) == 3
    assert again.pending == [2]
    other = Predictions.empty(
        CLASSES,
        VIDEOS,
        [0, 1, 2, 0],
        10,
        protocol={"clips": 10, "resize": (128, 171)},
        identity={"weights": "v"},
    )
    assert other.resume_from(read) == 0, "scores of other weights are never taken over"


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        Predictions.read(path)
    path.write_bytes(b"not hdf5 at all")
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        Predictions.read(path)
    made().write(path)
    with h5py.File(path, "r+") as file:
        file["clip_scores"][0, 0, 0] = 0.9
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        metrics_from_file(path)
    with Hdf5Writer(path) as writer:  # as distinit 0.1
        made()._fill(writer.file)
        writer.file["clip_scores"][0, 0, 0] = 0.9
    with pytest.raises(PredictionsError, match="clip_scores"):
        metrics_from_file(path)
    made().write(path)
    needle = made().clip_scores[1].tobytes()
    content = bytearray(path.read_bytes())
    at = content.find(needle)
    assert at > 0
    content[at + 5] ^= 0x40  # one flipped bit, found by the checksum
    path.write_bytes(content)
    with pytest.raises(PredictionsError, match=r"p\.h5"):
        metrics_from_file(path)


def test_class_lists_must_agree() -> None:
    require_classes(["a", "b"], ["a", "b"], origin="x", expected_origin="y")
    with pytest.raises(CheckpointError, match=r"x.* y.*'c'.*'b'"):
        require_classes(["a", "c"], ["a", "b"], origin="x", expected_origin="y")
    with pytest.raises(CheckpointError, match=r"3 .*2"):
        require_classes(["a", "b", "c"], ["a", "b"], origin="x", expected_origin="y")
