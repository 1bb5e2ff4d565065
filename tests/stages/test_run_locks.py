"""One command at a time writes into a folder; commands that read it take no lock."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distinit.pipeline.ablation.ablate_options import AblateConfig
from distinit.pipeline.common import locks
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.locks import folder_lock
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.ablate import ablate
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.stages.options import ReportConfig
from distinit.stages.prepare import prepare
from distinit.stages.report import report
from distinit.stages.train_student import train_student

QUIET = Console(quiet=True)
LOOP = {"batch_size": 4, "epochs": 1, "epoch_clips": 4, "workers": 0, "threads": 1, "device": "cpu"}


class Folder:
    """A corpus, its labels, and a finished run to start from."""

    def __init__(self, store: Any, root: Path) -> None:
        self.store, self.root = store, root
        names = sorted(path.name for path in store.videos.iterdir())
        sides = ["train", "test"] * len(names)
        rows = [
            f"{store.videos / name},{'ab'[i // 2 % 2]},{sides[i]},{sides[i + 1]}"
            for i, name in enumerate(names)
        ]
        self.labels = root / "labels.csv"
        self.labels.write_text("\n".join(["path,label,split1,split2", *rows]) + "\n")
        self.dataset = f"csv:{self.labels}"

    def finetune(self, out: Path, **more: Any) -> None:
        values = {
            "dataset": self.dataset,
            "root": str(self.store.videos),
            "out": str(out),
            "loop": LOOP,
            **more,
        }
        student = {
            "student": {"architecture": "r3d_18", "width": 0.0625},
            "clips": {"size": 32, "clip_frames": 4},
        }
        test = {"test": {"clips": 1, "workers": 0}}
        finetune(FinetuneConfig.model_validate({**values, **student, **test}), QUIET)

    def train(self, out: Path, **more: Any) -> None:
        clips = {"clip_frames": 8, "size": 32, "resize": [40, 60]}
        values = {
            "store": str(self.store.path),
            "out": str(out),
            "student": {"width": 0.125},
            "clips": clips,
        }
        train_student(TrainConfig.model_validate({**values, "loop": LOOP, **more}), QUIET)

    def ablate(self, out: Path) -> None:
        plan = {"title": "t", "axes": {"what": {"scratch": {"finetune.init": "scratch"}}}}
        (self.root / "plan.yaml").write_text(yaml.safe_dump(plan))
        values = {
            "plan": str(self.root / "plan.yaml"),
            "store": str(self.store.path),
            "out": str(out),
        }
        ablate(AblateConfig.model_validate({**values, "datasets": [f"{self.dataset}"]}), QUIET)

    def prepare(self, out: Path) -> None:
        prepare(PrepareConfig(sources=[str(self.store.videos)], out=out), QUIET)


@pytest.fixture(scope="module")
def folder(tiny_store: Any, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = Folder(tiny_store, tmp_path_factory.mktemp("locks"))
    made.finetune(made.root / "run")
    return made


def evaluated(folder: Folder, runs: list[Path], **more: Any) -> None:
    evaluate(EvaluateConfig.model_validate({"runs": [str(run) for run in runs], **more}), QUIET)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


WRITERS: dict[str, Callable[[Folder, Path], None]] = {
    "train-student": lambda folder, out: folder.train(out),
    "train-student --resume": lambda folder, out: folder.train(out, resume="auto"),
    "finetune": lambda folder, out: folder.finetune(out),
    "finetune --split all": lambda folder, out: folder.finetune(out, split="all"),
    "finetune --resume": lambda folder, out: folder.finetune(out, resume="auto"),
    "evaluate --out": lambda folder, out: evaluated(folder, [folder.root / "run"], out=str(out)),
    "evaluate --fuse": lambda folder, out: evaluated(
        folder, [folder.root / "run"] * 2, out=str(out), fuse=True
    ),
    "evaluate --compare": lambda folder, out: evaluated(
        folder, [folder.root / "run"] * 2, out=str(out), compare=True
    ),
    "ablate": lambda folder, out: folder.ablate(out),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITERS)
def test_a_second_writer_is_refused_and_names_the_folder(
    command: str, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.3)
    out = tmp_path / "busy"
    with folder_lock(out), pytest.raises(UsageError) as refused:
        WRITERS[command](folder, out)
    assert str(out) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert contents(out) == {}


@pytest.mark.slow
def test_a_run_that_is_written_can_be_read_and_not_be_tested(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.3)
    run = tmp_path / "run"
    shutil.copytree(folder.root / "run", run)
    before = contents(run)
    with folder_lock(run):
        for refused in (
            lambda: evaluated(folder, [run]),
            lambda: folder.finetune(run, resume="auto"),
        ):
            with pytest.raises(UsageError, match="run"):
                refused()
        assert contents(run) == before
        report(ReportConfig(folders=[str(run)], out=str(tmp_path / "report")), QUIET)
        evaluated(folder, [run], out=str(tmp_path / "elsewhere"))
        folder.finetune(tmp_path / "next", init=str(run))
    evaluated(folder, [run])


def test_a_file_system_without_locks_is_warned_about_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with folder_lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert str(tmp_path / "run") in caplog.text
