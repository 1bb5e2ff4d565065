"""Schedules derived from the number of videos or from a limit of time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.settings import LONG_HOURS, check_hours
from distinit.pipeline.evaluation.finetune_options import FinetuneLoop
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.stages.train_student import train_student

QUIET = Console(quiet=True)


@pytest.mark.parametrize(("videos", "clips"), [(10, 24_000), (380, 38_000), (10**6, 45_000_000)])
def test_a_budget_follows_the_number_of_videos(videos: int, clips: int) -> None:
    options = LoopOptions(budget="auto", batch_size=24).for_videos(videos)
    assert clips <= options.epochs * options.clips_per_epoch < clips + 9 * 25
    assert (options.epochs, options.warmup_epochs, options.step_epochs) == (9, 2, 2)
    assert options.for_videos(videos + 5) == options, "a schedule is derived once"


def test_options_of_the_user_stay() -> None:
    options = FinetuneLoop(budget=1000, epochs=20, step_epochs=None).for_videos(50)
    assert (options.epochs, options.epoch_clips, options.step_epochs) == (20, 50, None)
    parts = FinetuneLoop(budget=1000, epoch_clips=100).for_videos(50)
    assert (parts.epochs, parts.epoch_clips, parts.step_epochs) == (10, 100, 2)
    assert FinetuneLoop(budget=10, epochs=1).for_videos(5).warmup_epochs == 0
    assert LoopOptions(epochs=3).for_videos(7).epoch_clips == 7, "no budget, no derivation"


@pytest.mark.parametrize(
    ("fields", "epochs", "epoch_clips", "step_epochs"),
    [
        # 90 clips of each of 100 videos, in 8 epochs.
        ({}, 8, 1125, 2),
        ({"epochs": 2}, 2, 1125, 1),
        ({"epochs": 16}, 16, 1125, 4),
        ({"epochs": 8, "step_epochs": 3}, 8, 1125, 3),
        ({"epoch_clips": 500}, 8, 500, 2),
        ({"epochs": 3, "epoch_clips": None}, 3, 100, 2),
        ({"budget": 80}, 8, 10, 2),
    ],
)
def test_clips_of_a_finetuning_depend_on_its_videos_unless_the_user_sets_them(
    fields: dict[str, Any], epochs: int, epoch_clips: int, step_epochs: int
) -> None:
    options = FinetuneLoop.model_validate(fields).with_derived_schedule().for_videos(100)
    assert (options.epochs, options.epoch_clips, options.step_epochs) == (
        epochs,
        epoch_clips,
        step_epochs,
    )


def test_epochs_of_a_student_without_a_budget_have_one_clip_per_video() -> None:
    options = LoopOptions(epochs=3).with_derived_schedule().for_videos(7)
    assert (options.epochs, options.epoch_clips) == (3, 7)


@pytest.mark.parametrize("options", [{"budget": 0}, {"budget": 5, "minutes": 1}, {"minutes": 0}])
def test_an_impossible_budget_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"budget|minutes"):
        LoopOptions.model_validate(options)


def test_many_hours_are_a_warning_without_a_limit_and_an_error_with_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_hours(LONG_HOURS, None, "it", "type this")
    check_hours(2, 2, "it", "type this")
    assert not caplog.records
    check_hours(LONG_HOURS + 1, None, "it", "type this")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "type this" in record.message
    with pytest.raises(UsageError, match="--max-hours 2: "):
        check_hours(2.1, 2, "it", "type this")


def config(store: Any, out: Path, **loop: Any) -> TrainConfig:
    machine = {"batch_size": 4, "workers": 0, "device": "cpu", "lr": 0.02}
    return TrainConfig.model_validate(
        {
            "store": str(store.path), "out": str(out), "student": {"architecture": "r3d_18", "width": 0.0625},
            "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]}, "loop": {**machine, **loop},
            "resume": "auto",
        }
    )  # fmt: skip


def recorded_schedule(run: Path, command: str = "train-student") -> dict[str, Any]:
    loop = yaml.safe_load((run / "config.yaml").read_text())[command]["loop"]
    return {key: loop[key] for key in ("epochs", "epoch_clips", "warmup_epochs", "step_epochs")}


@pytest.mark.slow
def test_a_run_records_the_schedule_of_a_budget_and_resumes_with_it(
    tiny_store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = train_student(config(tiny_store, tmp_path / "run", budget=16, epochs=2), QUIET)
    schedule = {"epochs": 2, "epoch_clips": 8, "warmup_epochs": 0, "step_epochs": 1}
    assert recorded_schedule(tmp_path / "run") == schedule
    assert (first["steps"], first["epochs"]) == (4, 2)
    resumed = train_student(config(tiny_store, tmp_path / "run"), QUIET)
    assert resumed["already_finished"]
    assert recorded_schedule(tmp_path / "run") == schedule
    for option, value in (("budget", 4000), ("minutes", 1.0)):
        caplog.clear()
        train_student(config(tiny_store, tmp_path / "run", **{option: value}), QUIET)
        (line,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
        assert line.startswith(f"--{option} {value}:")
        assert recorded_schedule(tmp_path / "run") == schedule, (
            "the option has no effect, which is logged"
        )
    explicit = train_student(config(tiny_store, tmp_path / "explicit", **schedule), QUIET)
    assert explicit["loss"] == first["loss"], "the derived schedule equals the explicit one"


@pytest.mark.slow
def test_minutes_are_measured_and_recorded(tiny_store: Any, tmp_path: Path) -> None:
    result = train_student(config(tiny_store, tmp_path / "run", minutes=0.01, epochs=1), QUIET)
    schedule = recorded_schedule(tmp_path / "run")
    assert result["steps"] == schedule["epochs"] * -(-schedule["epoch_clips"] // 4)
    assert result["seconds"] < 30


@pytest.mark.slow
def test_too_long_a_training_is_refused_before_it_starts(tiny_store: Any, tmp_path: Path) -> None:
    """Without a schedule it is that of a budget, and the message has a budget that fits."""
    with pytest.raises(UsageError, match=r"--max-hours 0\.0001.*--budget \d+"):
        train_student(config(tiny_store, tmp_path / "run", max_hours=0.0001), QUIET)
    assert not (tmp_path / "run/checkpoints").exists()
    assert recorded_schedule(tmp_path / "run")["epoch_clips"] == 2667
