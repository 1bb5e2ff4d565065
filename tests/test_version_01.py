"""Artifacts of version 0.1: its rows, draws and scores are read, continued and recomputed exactly.

tests/data/v01.zip was made by tests/data/make_v01.py. Nothing is compared that depends on the
processor: of what is computed anew, names, shapes and counts alone.
"""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distinit import TargetStore, load_student, student_clips
from distinit.pipeline.common.config import CONF, load_config
from distinit.pipeline.common.console import Console
from distinit.pipeline.evaluation.predictions import Predictions, metrics_from_file
from distinit.pipeline.store.verify import verify
from distinit.stages.evaluate import EvaluateConfig, evaluate
from distinit.stages.train_student import TrainConfig, train_student

ARTIFACTS = Path(__file__).parent / "data" / "v01.zip"
DEMO = CONF / "demo_corpus"
QUIET = Console(quiet=True)
# Options of the draws in recorded.json; what was recorded has clips of 16 frames, 6 per epoch.
DRAWS: dict[str, dict[str, Any]] = {
    "random": {"picks": "random", "seed": 0},
    "random:2": {"picks": "random:2", "seed": 1},
    "uniform:2": {"picks": "uniform:2", "seed": 2},
    "filtered": {"picks": "random", "seed": 3, "max_entropy": {"tiny": 1.3}},
    "zero-weight": {
        "picks": "random",
        "seed": 3,
        "max_entropy": {"tiny": 1.3},
        "filter_mode": "zero-weight",
    },
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v01")
    with zipfile.ZipFile(ARTIFACTS) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(artifacts: Path) -> dict[str, Any]:
    return dict(json.loads((artifacts / "recorded.json").read_text()))


def test_rows_of_a_store(artifacts: Path, recorded: dict[str, Any]) -> None:
    store = TargetStore.open(artifacts / "store.zarr")
    assert store.n_videos == len(recorded["videos"])
    for number, video in enumerate(recorded["videos"]):
        frames, pts, rows = store.frames(number)
        assert store.video(number).path == video["path"]
        assert (frames.tolist(), pts.tolist()) == (video["frames"], video["pts"])
        assert store.logits("tiny", rows).tolist() == video["logits"]
        assert store.entropy("tiny", rows).tolist() == video["entropy"]
    assert list(verify(store.path, store.index)) == []


@pytest.mark.parametrize("name", DRAWS)
def test_draws(artifacts: Path, recorded: dict[str, Any], name: str) -> None:
    store = TargetStore.open(artifacts / "store.zarr")
    sampler = student_clips(store, frames=16, size=32, epoch_clips=6, **DRAWS[name]).sampler
    keys = [(epoch, sample) for epoch in (0, 1, 7) for sample in range(6)]
    for key, expected in zip(keys, recorded["draws"][name], strict=True):
        draw = sampler.draw(*key)
        assert draw.targets["tiny"].tolist() == expected["logits"]
        for field in expected.keys() - {"logits"}:
            value = getattr(draw, field)
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected[field]


def test_a_run_is_resumed_from_its_own_config(artifacts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(artifacts / "student", run)
    before = load_file(run / "student.safetensors")
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    options = {
        "store": str(artifacts / "store.zarr"),
        "out": str(run),
        "video_roots": {"demo": str(DEMO)},
        "loop.epochs": 2,
        "resume": True,
    }
    config = load_config(
        TrainConfig, "train-student", file=str(run / "config.yaml"), options=options
    )
    result = train_student(config, QUIET)
    assert (result["resumed_from_step"], result["steps"], result["videos"]) == (1, 2, 4)
    assert result["max_entropy"] == json.loads(saved["identity"])["filter"]["nats"]
    after = load_file(run / "student.safetensors")
    shapes = [{name: (t.shape, t.dtype) for name, t in each.items()} for each in (before, after)]
    assert shapes[0] == shapes[1]
    earlier = (artifacts / "student" / "metrics.jsonl").read_text()
    lines = (run / "metrics.jsonl").read_text()
    assert lines.startswith(earlier)
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 1, 2, 2]


def test_weights_of_a_student(artifacts: Path) -> None:
    stored = load_file(artifacts / "student" / "student.safetensors")
    checkpoint = torch.load(artifacts / "student" / "checkpoints" / "last.pt", weights_only=True)
    weights = load_student(artifacts / "student").state_dict()
    assert weights.keys() == checkpoint["model"].keys()
    assert all(torch.equal(weights[name], value) for name, value in checkpoint["model"].items())
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in weights.values())


def test_scores_of_a_saved_run(artifacts: Path, recorded: dict[str, Any]) -> None:
    file = artifacts / "finetuned" / "predictions.h5"
    metrics = metrics_from_file(file)
    for name in ("per_clip", "top1", "top5", "class_mean"):
        assert metrics[name]["value"] == recorded["metrics"][name]["value"]
    for name in ("videos", "failed", "clips_per_video", "per_class"):
        assert metrics[name] == recorded["metrics"][name]
    with h5py.File(file) as tables:
        video_scores = tables["video_scores"][()]
    assert np.array_equal(Predictions.read(file).video_scores, video_scores)


def test_a_run_is_tested_again_on_the_same_clips(artifacts: Path, tmp_path: Path) -> None:
    before = Predictions.read(artifacts / "finetuned" / "predictions.h5")
    labels = tmp_path / "split.csv"
    test = [
        ("test", video, before.classes[k])
        for video, k in zip(before.videos, before.labels, strict=True)
    ]
    with open(labels, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split1", "path", "label"])
        writer.writerows([*test, ("train", "Sitting/test_Sitting-000.mp4", "Sitting")])
        writer.writerow(["train", "Clapping/full-baseline_Clapping-002-s1002.mp4", "Clapping"])
    config = EvaluateConfig(
        runs=[str(artifacts / "finetuned")],
        dataset=f"csv:{labels}",
        root=str(DEMO),
        out=str(tmp_path / "again"),
    )
    evaluate(config, QUIET)
    after = Predictions.read(tmp_path / "again" / "predictions.h5")
    assert after.videos == before.videos
    for name in ("labels", "frames", "starts"):
        assert np.array_equal(getattr(after, name), getattr(before, name))
    assert after.clip_scores.shape == before.clip_scores.shape
    assert after.protocol == before.protocol
