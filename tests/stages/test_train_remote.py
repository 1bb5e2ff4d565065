"""Stage two on a store behind a URL: the losses of the local store, and a run that resumes from
there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from distinit.pipeline.common import urls
from distinit.pipeline.common.console import Console
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.train_student import train_student

pytestmark = pytest.mark.slow


def test_training_from_a_url_equals_training_from_the_folder(
    tiny_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTINIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urls, "PROTOCOLS", (*urls.PROTOCOLS, "memory"))
    fsspec.filesystem("memory").put(str(tiny_store.path), "/train/targets.zarr", recursive=True)
    loop = {
        "batch_size": 4,
        "epochs": 1,
        "epoch_clips": 8,
        "lr": 0.02,
        "workers": 0,
        "threads": 1,
        "device": "cpu",
    }
    base = {
        "student": {"width": 0.125},
        "loop": loop,
        "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]},
    }

    def run(store: str, out: str, **changes: Any) -> dict[str, Any]:
        config = TrainConfig.model_validate(
            {**base, "store": store, "out": str(tmp_path / out), **changes}
        )
        return train_student(config, Console(quiet=True))

    url = "memory://train/targets.zarr"
    remote_run, local_run = run(url, "there"), run(str(tiny_store.path), "here")
    assert remote_run["loss"] == local_run["loss"]
    assert list((tmp_path / "cache/stores").glob("*/shards/*/*"))
    used = yaml.safe_load((tmp_path / "there/config.yaml").read_text())["train-student"]
    assert used["store"] == url
    assert run(url, "there", resume=True)["already_finished"]
