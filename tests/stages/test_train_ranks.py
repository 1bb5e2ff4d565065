"""Several real processes train one student: the weights of one process, and one clear end when a
process fails."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.distributed import SINGLE_PROCESS, Ranks
from distinit.pipeline.common.errors import TrainingError, UsageError
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.pipeline.training.launch import run_distributed
from distinit.pipeline.training.loader import (
    DistributedBatchSampler,
    EpochBatchSampler,
    SequentialBatchSampler,
    SplitBatchSampler,
)
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.stages.train_student import train_student
from distinit.tests import warm

pytestmark = pytest.mark.cluster

# A module of its own: the processes import it by name.
JOB = '''
from pathlib import Path

import torch
from torch import nn

from distinit.pipeline.common.settings import Options
from distinit.pipeline.common.errors import TrainingError
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.students.student import build_student
from distinit.pipeline.clips import seeding
from distinit.pipeline.clips.transforms import normalize_clip
from distinit.pipeline.training.distillation import Distillation, evaluate_distillation
from distinit.pipeline.training.loop import LoopOptions, fit


class Job(Options):
    folder: str
    runs: dict[str, dict] = {}


class Clips:
    """Random clips and targets; the second teacher counts none of samples 0 to 2, no teacher sample 4."""

    def __init__(self, bad=None):
        self.bad = bad

    def __getitem__(self, key):
        if self.bad == ("gone", key[1]):
            raise TrainingError("v9.mp4: gone")
        random = seeding.rng(3, *key)
        clip = torch.from_numpy(random.integers(0, 256, (3, 4, 16, 16), dtype="uint8"))
        first = torch.from_numpy(random.normal(size=5).astype("float32"))
        second = torch.from_numpy(random.normal(size=3).astype("float32"))
        if self.bad == ("nan", key[1]):
            first = first * float("nan")
        return {
            "clip": clip,
            "targets": {"a": first, "b": second},
            "weight": {"a": torch.tensor(float(key[1] != 4)), "b": torch.tensor(float(key[1] not in (0, 1, 2, 4)))},
            "name": f"{key[0]}/{key[1]}",
            "rejected": 1,
            "unreadable": [(f"v{key[1]}.mp4", "no video stream")] if key[1] == 5 else [],
        }


class Frozen(Distillation):
    """Batch statistics are not changed."""

    def __call__(self, model, batch, counts):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()
        return super().__call__(model, batch, counts)

    def forward(self, model, batch, counted):
        kind = next(model.parameters()).dtype
        return model(normalize_clip(batch["clip"][counted], torch.float32).to(kind))


def job(config, screen, ranks):
    results = {}
    for name, changes in config.runs.items():
        bad, resume, double = (changes.pop(key, None) for key in ("bad", "resume", "double"))
        options = LoopOptions.model_validate(
            dict(batch_size=6, epochs=2, epoch_clips=12, lr=0.01, step_epochs=1, workers=0, threads=1, device="cpu",
                 log_every=2) | changes
        )
        torch.manual_seed(5 + ranks.rank)  # what the ranks begin with is that of rank 0
        student = build_student(StudentOptions(width=0.1), {"a": 5, "b": 3})
        student = student.double() if double else student
        objective = Frozen(("a", "b"))
        held_out = Clips()

        def validate():
            return evaluate_distillation(student, objective, held_out, 11, batch_size=3, workers=0,
                                         device=torch.device("cpu"), precision="fp32", ranks=ranks)

        try:
            result = fit(model=student, dataset=Clips(bad and tuple(bad)), objective=objective, options=options,
                         run_dir=Path(config.folder) / (resume or name), identity={}, validate=validate,
                         resume=resume is not None, ranks=ranks)
        except TrainingError as error:
            results[name] = str(error)
            continue
        every = ranks.gather({key: tensor.clone() for key, tensor in student.state_dict().items()})
        alike = all(torch.equal(tensor, other[key]) for other in every for key, tensor in every[0].items())
        results[name] = {"alike": alike, "weights": every[0], "loss": result.train_loss,
                         "unreadable": result.unreadable,
                         "held_out": result.validation, "clips": result.steps * options.batch_size,
                         "from": result.resumed_from}
    return results
'''


# It imports no more than it needs, which takes each process seconds.
ENDING = """
import os, signal, time
from pathlib import Path
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.settings import Options

class Ending(Options):
    how: str
    folder: str = ""

def job(config, console, ranks):
    if config.how == "sleep":
        (Path(config.folder) / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        time.sleep(600)
    if ranks.rank == 1:
        if config.how == "error":
            raise UsageError("--x: 3 is not allowed")
        if config.how == "bug":
            raise KeyError("x")
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.gather(None)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write the job's module, importable here and in the processes."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "ranks_job.py").write_text(JOB)
    (folder / "ending_job.py").write_text(ENDING)
    sys.path.insert(0, str(folder))
    import ranks_job  # type: ignore[import-not-found]

    yield ranks_job
    sys.path.remove(str(folder))


def metrics(run: Path) -> list[str]:
    return [
        line.split('"clips_per_s"')[0] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


# In float64: Adam divides each gradient by its own size, so that the rounding of a small one, which
# depends on the order of sums, would be as large a step as any.
MODERN = {
    "optimizer": "adamw", "ema": 0.5, "weights": "ema", "schedule": "cosine", "lr": 0.01,
    "checkpoint_every": 1, "double": True,
}  # fmt: skip


def saved(run: Path) -> dict[str, Any]:
    """Load the last checkpoint of a run."""
    return dict(torch.load(run / "checkpoints" / "last.pt", weights_only=True))


@pytest.mark.usefixtures("forked_ranks")
def test_two_processes_train_the_student_of_one_and_so_does_accumulation(
    work: Any, tmp_path: Path
) -> None:
    """With BatchNorm frozen. The second head counts none of rank 0's clips of the first batch; in
    pieces of two clips, rank 1's first piece holds none that counts at all."""
    runs = {
        "whole": {},
        "uneven": {"batch_size": 5},
        "pieces": {"micro_batch_size": 1, "clip_norm": 1.0},
        "average": {"ema": 0.5, "weights": "ema", "schedule": "cosine"},
        "adamw": MODERN,
    }
    bad = {
        "nan": {"bad": ["nan", 5]},
        "gone": {"bad": ["gone", 5]},
        # It ends in the second step, and is resumed after the first.
        "cut": {**MODERN, "bad": ["gone", 7]},
        "resumed": {**MODERN, "resume": "cut"},
    }
    both = run_distributed(
        work.job,
        work.Job(folder=str(tmp_path / "two"), runs=runs | bad),
        Console(quiet=True),
        LoopOptions(gpus=2),
    )
    runs["pieces"].pop("micro_batch_size")
    one = work.job(
        work.Job(folder=str(tmp_path / "one"), runs=runs), Console(quiet=True), SINGLE_PROCESS
    )
    started = work.build_student(work.StudentOptions(width=0.1), {"a": 5, "b": 3}).state_dict()
    for name in runs:
        assert both[name]["alike"]
        assert both[name]["unreadable"] == one[name]["unreadable"] == {"v5.mp4": "no video stream"}
        assert both[name]["held_out"] == pytest.approx(one[name]["held_out"], rel=1e-4)
        assert both[name]["loss"] == pytest.approx(one[name]["loss"], rel=1e-5)
        for key, tensor in one[name]["weights"].items():
            assert torch.allclose(both[name]["weights"][key], tensor, rtol=1e-3, atol=1e-5), (
                name,
                key,
            )
        weight = one[name]["weights"]["backbone.layer4.1.conv2.0.0.weight"].float()
        assert not torch.allclose(weight, started["backbone.layer4.1.conv2.0.0.weight"], atol=1e-2)
        # The log of rank 0 is that of all: steps, losses, clips.
        assert len(metrics(tmp_path / "two" / name)) == len(metrics(tmp_path / "one" / name))
    # What goes wrong on one rank is told alike on all.
    assert "the loss is not finite" in both["nan"]
    assert "0/5;" in both["nan"]
    assert both["gone"] == "rank 1: v9.mp4: gone"
    # To the bit.
    assert both["cut"].endswith("v9.mp4: gone")
    assert (both["resumed"]["alike"], both["resumed"]["from"]) == (True, 1)
    states = [saved(tmp_path / "two" / name) for name in ("adamw", "cut")]
    for part in ("model", "ema"):
        assert states[0][part].keys() == states[1][part].keys()
        for key, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][key]), (part, key)
    alone = saved(tmp_path / "one" / "adamw")
    for key, tensor in alone["ema"].items():
        assert torch.allclose(states[0]["ema"][key], tensor, rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("kill", TrainingError, r"rank 1 of 2 .*SIGKILL; .*"),
        ("error", UsageError, r"rank 1: --x: 3 is not allowed"),
        pytest.param("bug", TrainingError, r"rank 1: KeyError: 'x'", marks=pytest.mark.slow),
    ],
)
def test_the_end_of_one_process_ends_all_with_one_error(
    work: Any,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    how: str,
    kind: Any,
    says: str,
) -> None:
    import ending_job  # type: ignore[import-not-found]

    # Started as a user does where the end is that of the process itself.
    if how != "kill":
        request.getfixturevalue("forked_ranks")
    options = LoopOptions(gpus=2, device="cpu")
    with pytest.raises(kind) as failed:
        run_distributed(ending_job.job, ending_job.Ending(how=how), Console(quiet=True), options)
    assert re.fullmatch(says, str(failed.value))
    assert not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "signal_", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_no_process_outlives_the_one_that_started_it(
    work: Any, tmp_path: Path, signal_: int
) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(work.__file__).parent)!r})
import ending_job
from distinit.pipeline.common.console import Console
from distinit.pipeline.training.launch import run_distributed
from distinit.pipeline.training.loop_options import LoopOptions

if __name__ == "__main__":
    config = ending_job.Ending(how="sleep", folder={str(tmp_path)!r})
    run_distributed(ending_job.job, config, Console(quiet=True), LoopOptions(gpus=2, device="cpu"))
"""
    (tmp_path / "program.py").write_text(program)
    pids = [tmp_path / "0.pid", tmp_path / "1.pid"]
    words = [sys.executable, str(tmp_path / "program.py")]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while not all(path.exists() and path.read_text() for path in pids):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal_)
        process.wait(timeout=60)
    for _ in range(600):
        if not any(Path("/proc", path.read_text()).exists() for path in pids):
            return
        time.sleep(0.05)
    pytest.fail("a process is still running 30 s after its parent")


def test_sigterm_reaches_all_processes_and_fewer_go_on(tiny_store: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    used = {
        "store": str(tiny_store.path), "out": str(run), "student": {"width": 0.125},
        "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]}, "resume": "auto",
        "loop": {"batch_size": 4, "epochs": 400, "epoch_clips": 12, "workers": 0, "device": "cpu", "log_every": 1,
                 "checkpoint_every": 1},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"train-student": used}))
    words = ("train-student", "--config", tmp_path / "plan.yaml", "--gpus", 2)
    process = warm.Process(*words, env={"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (run / "checkpoints" / "last.pt").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.stderr
    lines = process.stderr.decode().splitlines()
    errors = [line for line in lines if line.startswith("error")]
    assert len(errors) == 1
    assert "interrupted at step" in errors[0]
    assert any(
        all(word in line for word in ("2 processes", "1 piece", "2 clips")) for line in lines
    )
    last_step = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["state"]["step"]
    used["loop"]["epochs"] = last_step // 3 + 1
    result = train_student(TrainConfig.model_validate(used), Console(quiet=True))
    assert result["resumed_from_step"] == last_step
    assert result["steps"] == (last_step // 3 + 1) * 3


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_every_batch_and_every_sample_without_padding(world: int) -> None:
    whole = list(EpochBatchSampler(batch_size=7, steps_per_epoch=2, epochs=2, start=1))
    shares = [
        list(
            SplitBatchSampler(
                EpochBatchSampler(batch_size=7, steps_per_epoch=2, epochs=2, start=1),
                Ranks(rank, world),
            )
        )
        for rank in range(world)
    ]
    assert [[key for share in shares for key in share[step]] for step in range(len(whole))] == whole
    each = [
        DistributedBatchSampler(SequentialBatchSampler(11, 3), Ranks(rank, world))
        for rank in range(world)
    ]
    assert sorted(key for share in each for batch in share for key in batch) == [
        (0, i) for i in range(11)
    ]
    assert [len(share) for share in each] == [len(list(share)) for share in each]
