"""No command takes a folder for its own by the names in it: what somebody else put there stays as
it is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.ablation.ablate_options import AblateConfig
from distinit.pipeline.common.config import write_config
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DistInitError, UsageError
from distinit.pipeline.common.run_dir import check_output_dir
from distinit.pipeline.common.run_dir import check_page_dir as require_own_page
from distinit.pipeline.common.urls import check_local
from distinit.pipeline.corpus.sources import MARKER
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.evaluation.protocol import check_result_dir
from distinit.pipeline.evaluation.splits import split_folders
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import BrowseConfig, ExportConfig, MergeConfig
from distinit.pipeline.store.writer import StoreWriter
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.pipeline.video.encode import write_video
from distinit.stages.ablate import ablate
from distinit.stages.demo import demo
from distinit.stages.evaluate import evaluate
from distinit.stages.extract_targets import extract_targets
from distinit.stages.finetune import finetune
from distinit.stages.options import DemoConfig, ReportConfig
from distinit.stages.prepare import prepare
from distinit.stages.report import report
from distinit.stages.targets_browse import targets_browse
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_merge import targets_merge
from distinit.stages.train_student import train_student

QUIET = Console(quiet=True)
THEIRS = b"model: resnet18\n"
TEACHER = {
    "name": "random_teachers:teacher",
    "options": {"name": "some", "k": "3", "input_size": "32"},
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of the commands, in addition to the folder."""

    store: Path
    videos: Path
    labels: Path
    plan: Path


@pytest.fixture
def inputs(tiny_store: Any, random_teachers: None, tmp_path: Path) -> Inputs:
    labels, plan = tmp_path / "labels.csv", tmp_path / "plan.yaml"
    names = sorted(path.name for path in tiny_store.videos.iterdir())[:4]
    rows = zip(names, "abab", ("train", "train", "test", "test"), strict=True)
    lines = [f"{tiny_store.videos / name},{label},{side}" for name, label, side in rows]
    labels.write_text("\n".join(["path,label,split1", *lines, ""]))
    plan.write_text(
        f"title: t\ndatasets: ['csv:{labels}']\naxes:\n  picks:\n    center: {{train-student.targets.picks: center}}\n"
    )
    return Inputs(tiny_store.path, tiny_store.videos, labels, plan)


def _train(given: Inputs, out: Path, **options: Any) -> object:
    return train_student(
        TrainConfig.model_validate({"store": str(given.store), "out": str(out), **options}), QUIET
    )


def _finetune(given: Inputs, out: Path, **options: Any) -> object:
    config = {
        "dataset": f"csv:{given.labels}",
        "out": str(out),
        "student": {"width": 0.125},
        **options,
    }
    return finetune(FinetuneConfig.model_validate(config), QUIET)


def _ablate(given: Inputs, out: Path) -> object:
    config = {"plan": str(given.plan), "store": str(given.store), "out": str(out)}
    return ablate(AblateConfig.model_validate(config), QUIET)


COMMANDS: dict[str, Callable[[Inputs, Path], object]] = {
    "prepare": lambda given, out: prepare(
        PrepareConfig.model_validate({"sources": [str(given.videos)], "out": out}), QUIET
    ),
    "extract-targets": lambda given, out: extract_targets(
        ExtractConfig.model_validate(
            {"sources": [str(given.videos)], "out": out, "teachers": [TEACHER]}
        ),
        QUIET,
    ),
    "train-student": _train,
    "train-student --resume auto": lambda given, out: _train(given, out, resume="auto"),
    "finetune": _finetune,
    "finetune --resume": lambda given, out: _finetune(given, out, resume=True),
    "finetune --split all": lambda given, out: _finetune(given, out, split="all"),
    "ablate": _ablate,
    "report": lambda given, out: report(
        ReportConfig(folders=[str(_finished_run(given))], out=str(out)), QUIET
    ),
    "targets browse": lambda given, out: targets_browse(
        BrowseConfig(store=str(given.store), out=str(out), sample=0), QUIET
    ),
    "targets export": lambda given, out: targets_export(
        ExportConfig(store=str(given.store), out=f"{out}.zarr"), QUIET
    ),
    "targets merge": lambda given, out: targets_merge(
        MergeConfig(parts=[str(given.store)], out=str(out)), QUIET
    ),
    "demo": lambda given, out: demo(DemoConfig.model_validate({"out": out}), QUIET),
}


def _finished_run(given: Inputs) -> Path:
    """Make a folder that a report accepts: the record of a student, without results."""
    run = given.labels.parent / "run"
    write_config(
        run / "config.yaml", "train-student", TrainConfig(store=str(given.store), out=str(run))
    )
    return run


def held(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("prepare", ".partial/notes.txt"),
        ("prepare", ".partial/a/lock"),
        ("prepare", "config.yaml"),
        ("prepare", "status.csv"),
        ("extract-targets", "staging/a.txt"),
        ("extract-targets", "commits/frames/000000/zarr.json"),
        ("train-student", "config.yaml"),
        ("train-student", "result.json"),
        ("train-student", "metrics.jsonl"),
        ("train-student --resume auto", "metrics.jsonl"),
        ("train-student --resume auto", "student.safetensors"),
        ("train-student --resume auto", "checkpoints/last.pt"),
        ("finetune", "config.yaml"),
        ("finetune", "predictions.h5"),
        ("finetune", "predictions.partial.h5"),
        ("finetune --resume", "metrics.jsonl"),
        ("finetune --split all", "result.json"),
        ("finetune --split all", "split1/config.yaml"),
        ("finetune --split all", "split1/predictions.h5"),
        ("ablate", "config.yaml"),
        ("ablate", "cells.json"),
        ("ablate", "seconds.json"),
        ("report", "report.html"),
        ("report", "report.md"),
        ("report", "accuracy.csv"),
        ("targets browse", "browse.html"),
        ("targets merge", "staging/a.txt"),
        ("demo", "demo.yaml"),
        ("demo", "targets.zarr/zarr.json"),
    ],
)
def test_names_like_ours_prove_nothing(
    command: str, name: str, inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "theirs"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(THEIRS)
    with pytest.raises(DistInitError) as refused:
        COMMANDS[command](inputs, out)
    assert str(out) in str(refused.value)
    assert held(out) == {name: THEIRS}


URL_COMMANDS: dict[str, Callable[[Inputs, Path], object]] = COMMANDS | {
    "train-student --dry-run": lambda given, out: _train(given, out, dry_run=True),
    "evaluate": lambda given, out: evaluate(EvaluateConfig(runs=["run"], out=str(out)), QUIET),
    "evaluate --fuse": lambda given, out: evaluate(
        EvaluateConfig(runs=["a", "b"], fuse=True, out=str(out)), QUIET
    ),
    "evaluate --compare": lambda given, out: evaluate(
        EvaluateConfig(runs=["a", "b"], compare=True, out=str(out)), QUIET
    ),
    "StoreWriter": lambda given, out: StoreWriter(out, sampling={"every": 4}),
}


@pytest.mark.parametrize("url", ["http://host/x", Path("gs://bucket/x")], ids=str)
@pytest.mark.parametrize("command", list(URL_COMMANDS))
def test_a_url_is_no_place_to_write(
    command: str, url: Any, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder is made that is called `http:`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError) as refused:
        URL_COMMANDS[command](inputs, url)
    assert f"--out {str(url).replace('gs:/', 'gs://')}" in str(refused.value)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    "url", ["file:///x", "s3://bucket/x", "reference::http://h/x", "hf://a/b", "S3:/b"]
)
def test_what_is_a_url(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--out"):
        check_local(url)
    monkeypatch.chdir(tmp_path)
    for path in (url, "C:/runs", "a::b", "a:b/c", "./http:/x"):
        Path(path).mkdir(parents=True)
        check_local(path)


def test_folders_next_to_a_store_are_left_alone(inputs: Inputs, tmp_path: Path) -> None:
    part, new = (
        tmp_path / f".theirs.zarr.{ending}" / "a.txt" for ending in ("part", f"new-{os.getpid()}")
    )
    for path in (part, new):
        path.parent.mkdir()
        path.write_bytes(THEIRS)
    with pytest.raises(DistInitError, match=r"\.theirs\.zarr\."):
        COMMANDS["targets export"](inputs, tmp_path / "theirs")
    COMMANDS["targets merge"](inputs, tmp_path / "theirs.zarr")
    assert [path.read_bytes() for path in (part, new)] == [THEIRS, THEIRS]


def test_the_demo_leaves_a_store_of_other_videos_alone(inputs: Inputs, tmp_path: Path) -> None:
    target = tmp_path / "mine" / "targets.zarr"
    targets_export(ExportConfig(store=str(inputs.store), out=str(target)), QUIET)
    before = held(target.parent)
    with pytest.raises(UsageError, match=r"targets\.zarr"):
        demo(DemoConfig(out=target.parent), QUIET)
    assert held(target.parent) == before
    assert TargetStore.open(target).n_videos == TargetStore.open(inputs.store).n_videos


def test_predictions_are_kept_unless_a_test_of_ours_wrote_them(tmp_path: Path) -> None:
    mine: dict[str, str | list[str]] = {"run": str(tmp_path / "run")}
    for name in ("predictions.h5", "predictions.partial.h5", "result.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(THEIRS)
        with pytest.raises(UsageError, match="--out"):
            check_result_dir(folder, mine)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    Predictions.empty(["a"], ["v.mp4"], [0], 1, protocol={}, identity={}).write(
        interrupted / "predictions.partial.h5"
    )
    check_result_dir(interrupted, mine)


def test_a_folder_of_copies_is_known_by_its_marker_and_one_that_was_only_claimed(
    tmp_path: Path,
) -> None:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    out = tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    (out / ".partial" / "lock").touch()
    (out / ".partial" / MARKER).write_text("{")  # killed before it was moved into place
    folder_inputs = Inputs(tmp_path, tmp_path / "videos", tmp_path, tmp_path)
    COMMANDS["prepare"](folder_inputs, out)
    (out / ".partial" / "123-0").write_bytes(b"half a copy")
    COMMANDS["prepare"](folder_inputs, out)
    assert {path.name for path in (out / ".partial").iterdir()} == {"lock"}
    assert (out / "videos" / "v.mp4.mp4").is_file()


def test_what_version_0_1_wrote_is_known(tmp_path: Path) -> None:
    record = tmp_path / "run" / "config.yaml"
    record.parent.mkdir()
    record.write_text(
        "# The config as used; `distinit finetune --config FILE` reads it.\nfinetune:\n  dataset: csv:a.csv\n"
    )
    (record.parent / "result.json").write_text("{}")
    check_output_dir(record.parent, "finetune", ["result.json"])
    with pytest.raises(UsageError, match="train-student"):
        check_output_dir(record.parent, "train-student")
    (tmp_path / "all" / "split2").mkdir(parents=True)
    record.rename(tmp_path / "all" / "split2" / "config.yaml")
    assert list(split_folders(tmp_path / "all")) == [2]

    for name, lead in (
        (
            "report.html",
            "2 runs, distinit 0.1.0. Every accuracy is recomputed from the run’s predictions.",
        ),
        (
            "browse.html",
            "teachers: none. distinit 0.1.0. Entropies are in nats, of the softmax at τ = 1",
        ),
    ):
        page = tmp_path / "report" / name
        page.parent.mkdir(exist_ok=True)
        page.write_text(
            f"<!doctype html>\n<html lang=en><head></head><body><p class=lead>{lead}</p></body></html>"
        )
        (page.parent / "report.md").write_text("a report")
        require_own_page(page, ["report.md"])
    page.write_text("<p>distinit 0.1.0 is a tool</p>")
    with pytest.raises(UsageError, match=r"browse\.html"):
        require_own_page(page)


@pytest.mark.slow
def test_pages_are_written_again_into_the_folder_they_made(inputs: Inputs, tmp_path: Path) -> None:
    for command in ("targets browse", "report"):
        COMMANDS[command](inputs, tmp_path / "pages")
        COMMANDS[command](inputs, tmp_path / "pages")
