"""The last lines of a stage: where its result is, and the next command to type."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from distinit.cli import cli
from distinit.pipeline.common.console import Console
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.finetune import finetune
from distinit.stages.train_student import train_student

pytestmark = pytest.mark.slow

LOOP = {"batch_size": 4, "epoch_clips": 4, "workers": 0, "device": "cpu", "epochs": 1}
CLIPS = {"clip_frames": 8, "size": 32, "resize": [40, 60]}


class Recorder(Console):
    """A console whose lines can be read."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def options_of(line: str) -> dict[str, Any]:
    """Return the options of a command that is shown, as its own parser reads them."""
    program, name, *args = shlex.split(line)
    assert program == "distinit"
    return cli.commands[name].make_context(name, args, resilient_parsing=True).params


def final_scalars(run: Path) -> set[str]:
    """Return the names of the numbers that TensorBoard has of the end of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/lr", "train/clips_per_s", "epoch/loss"} <= set(tags)
    return {tag.removeprefix("final/") for tag in tags if tag.startswith("final/")}


def test_each_stage_names_its_result_and_a_next_command_that_parses(
    tiny_store: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "a student"
    values: dict[str, Any] = {
        "store": str(tiny_store.path),
        "out": str(run),
        "student": {"architecture": "r3d_18", "width": 0.0625},
        "clips": CLIPS,
        "targets": {"teachers": ["sure"]},
        "held_out": 0.4,
    }
    console = Recorder()
    result = train_student(TrainConfig.model_validate({**values, "loop": LOOP}), console)
    assert any(result["student"] in line for line in console.lines)
    assert result["held_out_videos"] > 1
    share = result["most_frequent_class"]["sure"]
    assert share * result["held_out_videos"] == pytest.approx(
        round(share * result["held_out_videos"])
    ), "of one clip per video"
    (shown,) = [line for line in console.lines if "most frequent class" in line]
    assert f"{100 * share:.1f} %" in shown
    assert f"{100 * result['held_out']['agreement/sure']:.1f} %" in shown
    (line,) = result["next"]
    assert options_of(line)["init"] == str(run)

    caplog.set_level("INFO", logger="distinit")
    longer = {**values, "loop": {**LOOP, "epochs": 3}, "resume": True}
    train_student(TrainConfig.model_validate(longer), Recorder())
    (resumed,) = [r.message for r in caplog.records if r.message.startswith("resumed")]
    assert resumed == "resumed at epoch 2 of 3, step 1 of 3"

    labels = tmp_path / "labels.csv"
    names = sorted(path for path in tiny_store.videos.iterdir())
    rows = [f"{name},{'ab'[i % 2]},{'test' if i >= 8 else 'train'}" for i, name in enumerate(names)]
    labels.write_text("\n".join(["path,label,split1", *rows]) + "\n")
    values = {"init": str(run), "dataset": f"csv:{labels}", "out": str(tmp_path / "tuned")}
    values |= {"loop": {**LOOP, "batch_size": "auto"}, "test": {"clips": 1, "workers": 0}}
    console = Recorder()
    tuned = finetune(FinetuneConfig.model_validate(values), console)
    assert tuned["batch_size"] == 32, "the fixed choice of a CPU"
    # The head of a student is not a part that failed to load.
    assert not any("not used" in line for line in console.lines)
    assert tuned["model"] in console.lines[-1]
    assert tuned["predictions"] in console.lines[-1]
    assert final_scalars(run) >= {"loss", "clips_per_second", "explained_fraction"}
    assert final_scalars(tmp_path / "tuned") >= {"test/top1", "test/class_mean"}
    report, predict = map(options_of, tuned["next"])
    assert report["folders"] == (str(tmp_path / "tuned"),)
    assert predict["model"] == str(tmp_path / "tuned")
