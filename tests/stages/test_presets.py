"""The paper's presets against the paper's numbers, number by number and epoch by epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.config import load_config, preset_section
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.pipeline.training.optimizer import learning_rate


def preset(name: str) -> TrainConfig:
    return load_config(
        TrainConfig, "train-student", preset=name, options={"store": "s", "out": "r"}
    )


def test_paper_is_the_papers_pre_training() -> None:
    config = preset("paper")
    loop = config.loop
    assert (config.student.architecture, config.student.variant, config.student.channels) == (
        "r2plus1d_18",
        "vmz",
        3,
    )
    assert (config.clips.clip_frames, config.clips.size, config.clips.frame_view().resize) == (
        8,
        112,
        (128, 171),
    )
    assert (loop.batch_size, loop.micro_batch_size) == (16 * 4 * 24, 24)
    assert (loop.accumulation_steps(64), loop.accumulation_steps(1)) == (1, 64)
    assert (loop.momentum, loop.nesterov, loop.weight_decay) == (0.9, True, 1e-4)
    assert (loop.epochs, loop.epoch_clips) == (45, 1_000_000)
    assert (config.targets.picks, config.targets.loss, config.targets.tau) == (
        "random",
        "cross-entropy",
        1.0,
    )
    assert config.targets.filter_mode == "zero-weight"
    ends = [learning_rate((epoch + 1) * loop.steps_per_epoch - 1, loop) for epoch in range(45)]
    expected = [0.001 * (e + 1) if e < 10 else 0.01 if e < 20 else 1e-3 if e < 30 else 1e-4 if e < 40 else 1e-5
                for e in range(45)]  # fmt: skip
    assert ends == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("paper-32", {"clips.clip_frames": 32}), ("flow", {"student.channels": 2})],
)
def test_the_papers_other_presets_change_one_number(name: str, changes: dict[str, Any]) -> None:
    def flat(values: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(values, dict):
            return {prefix: values}
        return {
            k: v
            for key, value in values.items()
            for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()
        }

    paper, other = flat(preset("paper").model_dump()), flat(preset(name).model_dump())
    assert {key: other[key] for key in other if other[key] != paper.get(key)} == changes
    assert preset_section(name, "extract-targets") == preset_section("paper", "extract-targets")


def test_small_warms_up_as_the_paper_does_and_ends_at_nothing() -> None:
    small, paper = preset("small").loop, preset("paper").loop
    small = small.with_derived_schedule().for_videos(240)
    rates = [
        learning_rate((epoch + 1) * small.steps_per_epoch - 1, small) / small.peak_lr
        for epoch in range(9)
    ]
    assert rates[:2] == pytest.approx([0.5, 1]), "2 of 9 epochs, as 10 of 45"
    share = (np.arange(3, 10) * small.steps_per_epoch - 1 - 2 * small.steps_per_epoch) / (
        7 * small.steps_per_epoch
    )
    assert rates[2:] == pytest.approx(0.5 * (1 + np.cos(np.pi * share)), abs=1e-3)
    assert (small.warmup_epochs, paper.warmup_epochs) == (2, 10)
