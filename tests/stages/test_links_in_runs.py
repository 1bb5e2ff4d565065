"""A run folder may come from anybody: nothing is read or written through a link in it that leads
out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import SourceError, UsageError
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig, PredictConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.video.encode import write_video
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.stages.predict import predict

QUIET = Console(quiet=True)
STUDENT = {"architecture": "r3d_18", "width": 0.0625}
LOOP = {"batch_size": 2, "epochs": 1, "epoch_clips": 2, "lr": 0.02, "workers": 0, "device": "cpu"}


def _finetune(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    values = {
        "student": STUDENT,
        "clips": {"size": 32, "clip_frames": 4},
        "loop": LOOP,
        "test": {"workers": 0, "clips": 1},
    }
    dataset = f"csv:{folder / 'labels.csv'}"
    config = FinetuneConfig.model_validate(
        {"dataset": dataset, "out": str(out), **values, **options}
    )
    return finetune(config, QUIET)


def _evaluate(run: Path, **options: Any) -> dict[str, Any]:
    return evaluate(EvaluateConfig(runs=[str(run)], device="cpu", **options), QUIET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, labels, the finished runs `one` (split 1) and `all` (both splits)."""
    root = tmp_path_factory.mktemp("links")
    rows = ["path,label,split1,split2"]
    for number in range(4):
        images = np.full((8, 48, 64, 3), 60 * number, np.uint8)
        write_video(root / f"{number}.mp4", images, fps=8)
        sides = ("train", "test") if number < 2 else ("test", "train")
        rows.append(f"{number}.mp4,{'ab'[number % 2]},{','.join(sides)}")
    (root / "labels.csv").write_text("\n".join([*rows, ""]))
    _finetune(root, root / "one")
    _finetune(root, root / "all", split="all")
    return root


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """Copy the finished run, for a test that changes it."""
    return Path(shutil.copytree(folder / "one", tmp_path / "given" / "run"))


def move_out(path: Path) -> Path:
    """Put a link in the place of a file or folder, to itself in another folder; its new place."""
    elsewhere = path.parents[len(path.parts) - 1 - path.parts.index("given")].parent / "private"
    elsewhere.mkdir(exist_ok=True)
    target = elsewhere / path.name
    os.replace(path, target)
    path.symlink_to(target)
    return target


def held(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


DOORS: dict[str, Callable[[Path, Path], Any]] = {
    "evaluate": lambda run, folder: _evaluate(run),
    "evaluate --out": lambda run, folder: _evaluate(run, out=str(run.parent.parent / "out")),
    "predict": lambda run, folder: predict(
        PredictConfig.model_validate(
            {"model": str(run), "sources": [str(folder / "0.mp4")], "test": {"workers": 0}}
        ),
        QUIET,
    ),
    "finetune --init": lambda run, folder: _finetune(
        folder, run.parent.parent / "out", init=str(run)
    ),
    "load_student": lambda run, folder: load_student(run),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("door", "name"),
    [
        *(
            ("evaluate", name)
            for name in ("config.yaml", "model.safetensors", "labels.json", "result.json")
        ),
        *(("evaluate", name) for name in ("predictions.h5", "checkpoints/last.pt", "checkpoints")),
        *(
            ("evaluate --out", name)
            for name in ("config.yaml", "model.safetensors", "labels.json", "seen_videos.npz")
        ),
        ("predict", "model.safetensors"),
        ("finetune --init", "model.safetensors"),
        ("finetune --init", "seen_videos.npz"),
        ("load_student", "model.safetensors"),
    ],
)
def test_links_out_of_a_run_are_not_followed(door: str, name: str, run: Path, folder: Path) -> None:
    """The file is named, nothing of it is used, and nothing is written; the run as a link to a
    folder is taken."""
    move_out(run / name)
    before = held(run.parents[1] / "private"), held(run)
    with pytest.raises(SourceError, match=name):
        DOORS[door](run, folder)
    assert (held(run.parents[1] / "private"), held(run)) == before
    assert not list(run.parent.glob("out/*.h5"))


@pytest.mark.slow
@pytest.mark.parametrize("door", list(DOORS))
def test_a_run_that_is_a_link_itself_and_links_within_it_are_taken(
    door: str, run: Path, folder: Path
) -> None:
    for name in ("model.safetensors", "labels.json"):
        os.replace(run / name, run / f"kept-{name}")
        (run / name).symlink_to(f"kept-{name}")
    linked = run.parents[1] / "runs" / "linked"
    linked.parent.mkdir()
    linked.symlink_to(run)
    DOORS[door](linked, folder)


@pytest.mark.parametrize(
    ("door", "name"),
    [
        *(
            ("evaluate", name)
            for name in ("model.safetensors", "labels.json", "config.yaml", "result.json")
        ),
        ("predict", "model.safetensors"),
        *(("finetune --init", name) for name in ("model.safetensors", "seen_videos.npz")),
    ],
)
def test_pipes_in_a_run_hold_nobody(door: str, name: str, run: Path, folder: Path) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(UsageError, match=name):
        DOORS[door](run, folder)


def test_a_split_that_is_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    runs = Path(shutil.copytree(folder / "all", tmp_path / "given" / "all"))
    target = move_out(runs / "split2")
    before = held(target)
    with pytest.raises(UsageError, match="split2"):
        _evaluate(runs)
    assert held(target) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predictions.h5", "predictions.partial.h5", "result.json"])
def test_nothing_is_written_through_a_link_that_was_placed(
    name: str, run: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / f".{name}.{os.getpid()}.partial").symlink_to(victim)
    _evaluate(run)
    assert victim.read_text() == "mine"
