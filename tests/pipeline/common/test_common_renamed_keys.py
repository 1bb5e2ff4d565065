"""Configs and checkpoints of version 0.1 are read under the current names of their keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distinit.pipeline.common.config import (
    RENAMED_KEYS,
    current_keys,
    first_keys,
    known_keys,
    load_config,
    nested,
)
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.training.distillation_options import TrainConfig

STORED = """
train-student:
  store: targets.zarr
  out: run
  moved: {k400: /data/k400}
  leave_out: csv:labels.csv
  leave_out_split: 2
  clips: {length: 16, size: 112}
  targets: {filter: zero-weight, max_entropy: 2.7}
  loop: {gpu_batch_size: 24, lr_batch_size: 32}
"""


def test_a_stored_config_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(STORED)

    config = load_config(TrainConfig, "train-student", file=str(file))

    assert config.clips.clip_frames == 16
    assert config.targets.filter_mode == "zero-weight"
    assert (config.loop.micro_batch_size, config.loop.lr_base_batch_size) == (24, 32)
    assert config.video_roots == {"k400": "/data/k400"}
    assert (config.exclude, config.exclude_split) == ("csv:labels.csv", 2)


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_an_old_key_that_a_user_types_is_an_error(old: str) -> None:
    model: Any = TrainConfig
    required: dict[str, Any] = {"store": "s", "out": "o"}
    command = "train-student"
    if old == "accept_run":
        model, command = ExtractConfig, "extract-targets"
        required = {"out": "o", "teachers": [{"name": "resnet50"}]}
    elif old == "videos":
        model, command = FinetuneConfig, "finetune"
        required = {"out": "o", "dataset": "hmdb51"}

    assert RENAMED_KEYS[old] in known_keys(model)
    with pytest.raises(UsageError, match="unknown key"):
        load_config(model, command, options=required, settings=[f"{old}=1"])


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_names_translated_to_current_and_back_are_the_same(old: str) -> None:
    stored = nested(old, 3)

    assert current_keys(stored) == nested(RENAMED_KEYS[old], 3)
    assert first_keys(current_keys(stored)) == stored
    assert current_keys(current_keys(stored)) == current_keys(stored)


def test_digests_of_an_ablation_keep_the_first_names() -> None:
    dumped = TrainConfig(store="s", out="o").model_dump(mode="json")

    first = first_keys(dumped)

    assert set(RENAMED_KEYS) - {"accept_run", "videos"} <= {
        *first,
        *(f"{group}.{key}" for group in ("clips", "targets", "loop") for key in first[group]),
    }


def test_a_run_that_read_copies_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("finetune: {dataset: hmdb51, out: run, videos: small}\n")

    assert load_config(FinetuneConfig, "finetune", file=str(file)).copies == "small"


def test_names_with_dots_are_no_keys() -> None:
    """Teachers of features have such names, which are keys in the identities of runs."""
    stored = {"teachers": {"cells.features": {"name": "cells"}}, "heads": {"a.length": "1"}}
    assert current_keys(stored) == stored
