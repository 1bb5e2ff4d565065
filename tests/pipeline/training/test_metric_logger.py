"""Metrics of a run in TensorBoard, W&B and trackio, read with the readers of each."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.training.loop_options import LoopOptions, TrackerName, parse_loggers
from distinit.pipeline.training.metric_logger import (
    Metrics,
    flat_config,
    log_final,
    require_trackers,
)

pytestmark = pytest.mark.slow

# The run is killed after step 3 and its last checkpoint is of step 2, so a resume repeats step 3.
SESSIONS = ((0, (1, 2, 3)), (2, (3, 4)))
EXPECTED = {
    "train/loss": [(n, 1 / n) for n in (1, 2, 3, 4)],
    "epoch/held_out/loss": [(2, 2), (4, 4)],
}
FINAL = {"final/test/top1": [(4, 0.25)]}


def logged_twice(run: Path, name: TrackerName) -> None:
    run.mkdir()
    config = {"train-student": {"out": str(run), "loop": {"lr": 0.5, "betas": [0.9, 0.99]}}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for start, steps in SESSIONS:
        with Metrics(run, start, [name]) as metrics:
            for step in steps:
                metrics.write("train", step, {"loss": 1 / step, "worst": float("nan")})
                if step % 2 == 0:
                    metrics.write("epoch", step, {"held_out/loss": float(step)})
    # A resume of a finished run logs nothing.
    for _ in range(2):
        log_final([name], run, 4, {"test/top1": 0.25, "note": "no number", "none": None})


def rounded(logged: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {
        name: [(step, round(value, 5)) for step, value in points] for name, points in logged.items()
    }


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    logged_twice(run, "tensorboard")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert rounded(logged) == rounded(EXPECTED | FINAL)
    session = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    options = HParamsPluginData.FromString(session).session_start_info.hparams
    assert options["loop.lr"].number_value == 0.5


def offline_histories(run: Path) -> Iterator[tuple[str, int, Any]]:
    """Yield key, step and value from W&B's offline files, which consist of LevelDB log blocks."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        data, position, record = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            block_rest = 32768 - position % 32768
            if block_rest < 7:
                position += block_rest
                continue
            size, kind = struct.unpack("<HB", data[position + 4 : position + 7])
            record += data[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):
                content = wandb_internal_pb2.Record.FromString(record)
                record = b""
                items = content.history.item
                for item in items:
                    key = item.key or "/".join(item.nested_key)
                    yield key, content.history.step.num, yaml.safe_load(item.value_json)


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    logged_twice(run, "wandb")
    logged: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in offline_histories(run):
        if not key.startswith("_"):
            logged.setdefault(key, []).append((step, value))
    assert [value for _, value in logged.pop("final/test/top1")] == [0.25]
    assert rounded(logged) == rounded(EXPECTED)
    folders = list((run / "wandb").glob("offline-run-*"))
    assert len({folder.name.split("-")[3] for folder in folders}) == 1, "one run, resumed"


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "run"
    logged_twice(run, "trackio")
    (tracked,) = trackio.Api().runs("distinit")
    logged: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("distinit", tracked.name):
        for key in set(row) - {"timestamp", "step"}:
            logged.setdefault(key, []).append((row["step"], row[key]))
    assert [value for _, value in logged.pop("final/test/top1")] == [0.25]
    assert rounded(logged) == rounded(EXPECTED)


def test_names_of_loggers_are_checked_and_none_is_allowed() -> None:
    assert parse_loggers(("wandb,tensorboard", "wandb")) == ["wandb", "tensorboard"]
    assert parse_loggers(("none",)) == []
    for wrong in (("tensorbord",), ("none,wandb",), ("",)):
        with pytest.raises(ValueError, match=r"tensorboard|none"):
            parse_loggers(wrong)
    options = LoopOptions(loggers=("wandb",), epoch_clips=1)
    assert options.identity() == LoopOptions(epoch_clips=1).identity(), "a resume may change it"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UsageError, match=r'--logger trackio .*"distinit\[trackio\]"'):
        require_trackers(["tensorboard", "trackio"])


def test_options_are_flattened_to_scalars(tmp_path: Path) -> None:
    values = {"loop": {"lr": 0.5, "betas": [0.9, 0.99], "ema": None}, "search": {}, "on": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"finetune": values}))
    assert flat_config(tmp_path) == {
        "loop.lr": 0.5, "loop.betas": "[0.9, 0.99]", "search": "{}", "on": True,
    }  # fmt: skip
