"""Stage three in two real processes: the scores of one, whatever the batch size, and nothing
counted twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.video.encode import write_video
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("forked_ranks")]

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven test videos, one of them broken, from four sources: no even share for two processes."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(1)
    rows = ["path,label,source,split1"]
    for i in range(12):
        label = "red" if i % 2 else "blue"
        images = (
            random.integers(0, 60, (9 + 2 * i, 5, 7, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        )
        images[..., i % 2 * 2] += 100
        write_video(root / f"{i}.mp4", images, fps=8)
        rows.append(
            f"{i}.mp4,{label},{'train' if i < 6 else 's'}{i // 2},{'train' if i < 6 else 'test'}"
        )
    (root / "broken.mp4").write_bytes(b"this is no video")
    (root / "labels.csv").write_text("\n".join([*rows, "broken.mp4,red,s9,test"]) + "\n")
    return f"csv:{root / 'labels.csv'}"


def config(dataset: str, out: Path, freeze: str = "backbone", **loop: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {
            "dataset": dataset,
            "out": str(out),
            "student": {"architecture": "r3d_18", "width": 0.0625},
            "clips": {"size": 32, "clip_frames": 4},
            "freeze": freeze,
            "loop": {
                "batch_size": 4,
                "epochs": 2,
                "epoch_clips": 8,
                "lr": 0.05,
                "workers": 0,
                "device": "cpu",
            }
            | loop,
            "test": {"batch_size": 7, "workers": 0, "crops": 3, "clips": 2},
        }
    )


def test_two_processes_train_and_test_as_one(dataset: str, tmp_path: Path) -> None:
    """The frozen backbone has no batch statistics, so the head that both arrive at is the same."""
    alone = finetune(config(dataset, tmp_path / "alone"), QUIET)
    together = finetune(config(dataset, tmp_path / "together", gpus=2), QUIET)
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    one, two = (
        Predictions.read(tmp_path / name / "predictions.h5") for name in ("alone", "together")
    )
    assert one.videos == two.videos
    assert (one.status, one.reasons, one.sources) == (two.status, two.reasons, two.sources)
    assert one.status.count("failed") == 1
    np.testing.assert_allclose(two.clip_scores, one.clip_scores, atol=1e-4)
    np.testing.assert_allclose(two.features, one.features, atol=1e-4)
    np.testing.assert_array_equal(two.starts, one.starts)
    assert together["metrics"]["videos"] == 7, "each video once, none to fill up a share"
    assert together["metrics"]["intervals"] == {"resampled": "sources", "units": 4}
    assert (
        json.loads((tmp_path / "together/result.json").read_text())["metrics"]
        == together["metrics"]
    )

    again = evaluate(
        EvaluateConfig.model_validate(
            {
                "runs": [str(tmp_path / "alone")],
                "out": str(tmp_path / "again"),
                "gpus": 2,
                "device": "cpu",
                "test": {"batch_size": 1},
            }
        ),
        QUIET,
    )
    three = Predictions.read(tmp_path / "again/predictions.h5")
    np.testing.assert_allclose(three.clip_scores, one.clip_scores, atol=1e-4)
    assert again["metrics"]["top1"] == alone["metrics"]["top1"]


def test_every_process_tests_the_model_that_is_saved(dataset: str, tmp_path: Path) -> None:
    """Batch statistics differ between processes until those of the first are everybody's."""
    finetune(config(dataset, tmp_path / "run", freeze="none", gpus=2), QUIET)
    values = {"runs": [str(tmp_path / "run")], "out": str(tmp_path / "again"), "device": "cpu"}
    evaluate(EvaluateConfig.model_validate(values), QUIET)
    two, one = (Predictions.read(tmp_path / name / "predictions.h5") for name in ("run", "again"))
    assert two.identity["weights"] == one.identity["weights"]
    np.testing.assert_allclose(two.clip_scores, one.clip_scores, atol=1e-6)
