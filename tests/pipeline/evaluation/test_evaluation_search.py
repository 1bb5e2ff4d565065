"""Successive halving with a training that returns given losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distinit.pipeline.common.distributed import SINGLE_PROCESS
from distinit.pipeline.common.errors import TrainingError
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.search import SearchRecord, search

FAILS = None


def run_search(run_dir: Path, losses: Mapping[float, list[float | None]]) -> SearchRecord:
    """Search learning rates, with the losses of each rung, or FAILS, by learning rate."""
    config = FinetuneConfig(dataset="csv:l.csv", out=str(run_dir), search={"lr": list(losses)})
    remaining = {rate: list(each) for rate, each in losses.items()}

    def train(options: FinetuneConfig, folder: Path, epochs: int) -> dict[str, Any]:
        loss = remaining[options.loop.lr].pop(0)
        if loss is FAILS:
            raise TrainingError("the loss is not finite")
        return {"loss": loss, "accuracy": 0.5, "best_epoch": epochs}

    run_dir.mkdir(exist_ok=True)
    return search(config, run_dir, {}, train, lambda line: None, SINGLE_PROCESS)


def test_the_lowest_loss_of_the_last_rung_is_chosen(tmp_path: Path) -> None:
    record = run_search(tmp_path, {0.1: [1.0, 0.9], 0.2: [2.0, 0.8], 0.3: [3.0]})
    assert record.best.options == {"loop.lr": 0.2}
    assert [each.epochs for each in record.candidates] == [8, 8, 4]
    assert SearchRecord.read(tmp_path) == record


def test_a_candidate_that_fails_late_is_not_chosen(tmp_path: Path) -> None:
    """Its loss of the first rung is lower than that of the candidate that finishes."""
    record = run_search(tmp_path, {0.1: [1.0, FAILS], 0.2: [2.0, 1.5], 0.3: [3.0]})
    assert record.best.options == {"loop.lr": 0.2}
    assert record.candidates[0].loss is None
    assert record.candidates[0].failed


def test_a_search_without_a_finished_candidate_fails(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"--search: .*not finite"):
        run_search(tmp_path, {0.1: [1.0, FAILS], 0.2: [2.0, FAILS], 0.3: [3.0]})
