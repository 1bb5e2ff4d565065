"""Learning curves compared with the records of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distinit.pipeline.reporting.figures.canvas import styled
from distinit.pipeline.reporting.figures.learning_curves import Curves, _limits, learning_curves
from distinit.pipeline.reporting.run_folders import read_run
from distinit.pipeline.reporting.runs import Run

HELD_OUT = [40.0, 2.0, 1.5, 1.2, 1.4, 1.3, 1.35, 1.32, 1.31, 1.36, 1.37, 1.38]


def run_of(folder: Path, kind: str = "finetune", **result: Any) -> Run:
    """Return a run of 12 epochs of 10 steps, validated after each epoch, best after the fourth."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({kind: {"init": "scratch"}}))
    records = []
    for epoch, loss in enumerate(HELD_OUT, start=1):
        step = 10 * epoch
        records.append({"kind": "train", "step": step, "loss": 3 / epoch, "accuracy": epoch / 20})
        held_out = {"held_out/loss": loss, "held_out/accuracy": epoch / 30}
        records.append(
            {"kind": "epoch", "step": step, "epoch": epoch, "loss": 3 / epoch, **held_out}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "result.json").write_text(json.dumps(result))
    return read_run(folder, folder.name)


def test_curves_are_those_of_the_log(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", exported="best", validation={"best_epoch": 4})
    loss, accuracy = Curves.of(run, "loss"), Curves.of(run, "accuracy")
    assert loss.training.x.tolist() == loss.held_out.x.tolist() == list(range(10, 130, 10))
    assert loss.held_out.y.tolist() == HELD_OUT
    assert loss.training.y.tolist() == pytest.approx([3 / epoch for epoch in range(1, 13)])
    assert accuracy.held_out.y.tolist() == pytest.approx([epoch / 30 for epoch in range(1, 13)])
    assert loss.end == (40.0, 1.2)
    assert accuracy.end == pytest.approx((40.0, 4 / 30))


@pytest.mark.parametrize(
    ("result", "step"),
    [
        ({"exported": "last", "validation": {"best_epoch": 4}}, 120),
        ({"exported": "best", "best_epoch": 3}, 30),
        ({"exported": "best", "validation": None}, None),
        ({"exported": "best", "validation": [1], "best_epoch": "x"}, None),
        ({}, None),
    ],
)
def test_the_star_is_the_exported_epoch(tmp_path: Path, result: Any, step: int | None) -> None:
    assert run_of(tmp_path / "run", **result).exported_step == step


def test_one_loss_of_the_first_epoch_does_not_flatten_the_others(tmp_path: Path) -> None:
    low, high, highest = _limits([Curves.of(run_of(tmp_path / "run"), "loss")])
    assert low == 0.25
    assert high == max(3.0, np.quantile(HELD_OUT, 0.9)) < highest == 40


@pytest.mark.slow
def test_runs_with_and_without_validation_are_drawn(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", exported="best", validation={"best_epoch": 4})
    plain = run_of(tmp_path / "plain")
    plain.history[:] = [{"kind": "train", "step": 5, "loss": 2.0}]
    empty = run_of(tmp_path / "empty")
    empty.history.clear()
    with styled():
        both = learning_curves([run, plain, empty], "finetune", "title")
        alone = learning_curves([plain], "finetune", "title")
        assert learning_curves([empty], "finetune", "title") is None
        assert learning_curves([run], "student", "title") is None
    assert both is not None
    assert alone is not None
    assert list(both.about) == ["run", "plain"]
    assert "held-out" in both.caption
    assert "40" in both.caption
    assert "held-out" not in alone.caption
    assert "star" not in alone.caption
