"""Stages two and three with a student of optical flow, end to end, on copies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from distinit.pipeline.errors import UsageError
from distinit.pipeline.students.export import load_student
from distinit.pipeline.video import flow
from distinit.stages.finetune import FinetuneConfig, finetune
from distinit.stages.prepare import PrepareConfig, prepare
from distinit.stages.screen import Screen
from distinit.stages.train_student import TrainConfig, train_student

QUIET = Screen(quiet=True)
LOOP = {"epochs": 1, "epoch_clips": 8, "batch_size": 4, "workers": 0, "device": "cpu"}


def config_of(tiny_store, tmp_path: Path, small: Path) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "store": os.fspath(tiny_store.path),
            "out": os.fspath(tmp_path / "student"),
            "student": {"width": 0.1, "channels": 2},
            "clips": {"length": 4, "size": 32},
            "loop": LOOP,
            "moved": {"videos": os.fspath(small)},
            "held_out": 0.3,
        }
    )


def test_a_student_of_flow_is_trained_and_finetuned(tiny_store, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    small = tmp_path / "small"
    prepare(PrepareConfig.model_validate({"sources": [os.fspath(tiny_store.videos)], "out": small}), QUIET)
    result = train_student(config_of(tiny_store, tmp_path, small), QUIET)
    assert result["steps"] == 2
    student = load_student(tmp_path / "student")
    assert student.options.channels == 2
    assert student.meta.mean == (0.0046635, 0.0046261)
    names = sorted(path.name for path in tiny_store.videos.iterdir())
    lines = [f"{tiny_store.videos / name},{'ab'[i % 2]},{'train' if i < 8 else 'test'}" for i, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split1", *lines]) + "\n")
    tuned = finetune(
        FinetuneConfig.model_validate(
            {
                "init": result["run"],
                "dataset": f"csv:{tmp_path / 'labels.csv'}",
                "out": os.fspath(tmp_path / "tuned"),
                "loop": LOOP,
                "test": {"clips": 2, "workers": 0},
            }
        ),
        QUIET,
    )
    assert tuned["test_videos"] == 4


def test_without_opencv_the_extra_is_named(tiny_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=r"student\.channels=2 .*distinit\[flow\]"):
        flow.require_opencv()
    config = config_of(tiny_store, tmp_path, tiny_store.videos)
    with pytest.raises(UsageError, match=r"distinit\[flow\]"):
        train_student(config, QUIET)
