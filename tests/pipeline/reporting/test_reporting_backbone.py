"""Figure 5 of the paper: features of a run's training videos, in files of `distinit embed`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from distinit.pipeline.common.errors import SourceError, UsageError
from distinit.pipeline.evaluation.feature_files import read_features
from distinit.pipeline.evaluation.run_labels import RunLabels
from distinit.pipeline.reporting.figures import features as drawing
from distinit.pipeline.reporting.figures.canvas import styled
from distinit.pipeline.reporting.figures.features import backbone_features
from distinit.pipeline.reporting.run_folders import find_runs

CLASSES = [f"class {k}" for k in range(14)]
TRAIN = [(f"c{k}/v{i}.mp4", k) for k in range(14) for i in range(3)]


def feature_file(path: Path, videos: Sequence[str], model: Path, *, clips: int = 0) -> np.ndarray:
    """Write a file with the documented layout by h5py; return its features."""
    shape = (len(videos), clips, 6) if clips else (len(videos), 6)
    features = np.random.default_rng(clips).normal(size=shape).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.attrs["format"], file.attrs["format_version"] = "distinit-features", 1
        file.attrs["about"] = json.dumps({"model": str(model)})
        for name, column in (
            ("videos", list(videos)),
            ("status", ["ok"] * len(videos)),
            ("reasons", [""] * len(videos)),
        ):
            file.create_dataset(name, data=column, dtype=h5py.string_dtype())
        file["features"] = features
        file["starts"] = np.zeros((len(videos), max(1, clips)), np.int64)
        file["frames"] = np.full(len(videos), 9)
    return features


@pytest.fixture
def runs(tmp_path: Path) -> list[Any]:
    """A student, and a run finetuned on TRAIN."""
    folders = {"student": "train-student", "tuned": "finetune"}
    for name, command in folders.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(yaml.safe_dump({command: {}}))
    RunLabels("csv:x", 1, CLASSES, TRAIN, [], "").write(tmp_path / "runs" / "tuned")
    return find_runs([tmp_path / "runs"])


@pytest.mark.slow
def test_the_map_is_of_the_features_of_ten_classes_of_training_videos(
    tmp_path: Path, runs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = [f"/data/anywhere/{path}" for path, _ in TRAIN] + ["/data/anywhere/test.mp4"]
    student_features = feature_file(tmp_path / "a.h5", videos, tmp_path / "runs" / "student")
    kinetics_features = feature_file(
        tmp_path / "b.h5", videos[::-1], tmp_path / "kinetics.pth", clips=2
    )
    embedded = []

    def embed(features: np.ndarray) -> np.ndarray:
        embedded.append(features)
        return features[:, :2]

    monkeypatch.setattr(drawing, "embed", embed)
    with styled():
        figure = backbone_features([str(tmp_path / "a.h5"), str(tmp_path / "b.h5")], runs)
    assert figure is not None
    assert figure.name == "figure-5-backbone"
    assert "30 training videos of 10 random classes" in figure.caption
    assert "student: distilled" in figure.caption
    assert list(figure.about) == ["student", "kinetics.pth"]
    rows = {row.tobytes(): index for index, row in enumerate(student_features.astype(np.float64))}
    shown = [rows[row.tobytes()] for row in embedded[0]]
    assert len({TRAIN[index][1] for index in shown}) == 10
    expected = kinetics_features.astype(np.float64).mean(axis=1)[::-1]
    assert np.array_equal(embedded[1], expected[shown]), "the same videos, means over clips"


def test_files_of_other_videos_and_other_files_are_refused(tmp_path: Path, runs: list[Any]) -> None:
    assert backbone_features([], runs) is None
    path = tmp_path / "a.h5"
    feature_file(path, [f"/test/{i}.mp4" for i in range(50)], tmp_path)
    with pytest.raises(UsageError, match=r"--features .*a\.h5"):
        backbone_features([str(path)], runs)
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = 2
    path.with_suffix(".npz").write_bytes(b"PK")
    for bad in (path, path.with_suffix(".npz"), tmp_path / "none.h5"):
        with pytest.raises(SourceError, match=bad.name):
            read_features(bad)
