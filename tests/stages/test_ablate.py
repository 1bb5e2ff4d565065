"""Ablations share equal runs, resume after a kill, load no teacher and do not change the store."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from distinit.pipeline.ablation.ablate_options import AblateConfig
from distinit.pipeline.ablation.cost import measure_rate
from distinit.pipeline.ablation.execution import derives_schedules
from distinit.pipeline.ablation.plan import list_cells, read_plan, shipped_plans
from distinit.pipeline.ablation.steps import StepMaker
from distinit.pipeline.common.config import load_config, write_config
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DistInitError, UsageError
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.ablate import ablate
from distinit.tests import warm

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
LOOP = {
    "batch_size": 4, "epochs": 2, "epoch_clips": 8, "lr": 0.02, "workers": 0, "threads": 1, "device": "cpu",
    "checkpoint_every": 1,
}  # fmt: skip
PLAN: dict[str, Any] = {
    "title": "picks and starts",
    "paper": {"table": "2", "rows": {"random": {"hmdb51": 43.2}, "slow": {"hmdb51": {"top5": 73.9}}}},
    "base": {
        "train-student": {
            "student": {"width": 0.125}, "loop": LOOP, "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]},
            "targets": {"teachers": ["sure"]},
        },
        "finetune": {"loop": LOOP, "test": {"clips": 2, "workers": 0}},
    },
    "axes": {
        "variant": {
            "random": {"train-student.targets.picks": "random"},
            "slow": {"train-student.targets.picks": "random", "finetune.loop.lr": 0.001},
            "2 random": {"train-student.targets.picks": "random:2"},
            "scratch": {"finetune.init": "scratch"},
        }
    },
}  # fmt: skip
NO_TEACHERS = """
import sys
for name in ("distinit.pipeline.teachers", "distinit.stages.extract_targets", "efficientnet_lite_pytorch", "timm"):
    sys.modules[name] = None  # import raises ImportError
from distinit.cli import main
sys.argv[0] = "distinit"
main()
"""


@pytest.fixture
def home(tiny_store, tmp_path: Path) -> Path:
    """Write a plan and labels of the store's videos."""
    names = sorted(p.name for p in tiny_store.videos.iterdir())
    lines = [
        f"{tiny_store.videos / name},{'ab'[i % 2]},{'test' if i >= 8 else 'train'}"
        for i, name in enumerate(names)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split1", *lines]) + "\n")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    return tmp_path


def config(home: Path, store: Any, out: str, **options: Any) -> AblateConfig:
    required = {"plan": str(home / "plan.yaml"), "store": str(store.path), "out": str(home / out)}
    return AblateConfig.model_validate(
        {**required, "datasets": [f"csv:{home / 'labels.csv'}"], **options}
    )


def start(home: Path, store: Any, out: str) -> warm.Process:
    dataset = f"csv:{home / 'labels.csv'}"
    options = ("--store", store.path, "--dataset", dataset, "--out", home / out)
    return warm.Process("ablate", home / "plan.yaml", *options, code=NO_TEACHERS)


def digests_of(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def scores(out: Path) -> dict[str, np.ndarray]:
    """Return the clip scores of every cell by its row."""
    scores_by_row = {}
    for record in json.loads((out / "cells.json").read_text())["cells"]:
        with h5py.File(out / record["finetune"] / "predictions.h5") as file:
            scores_by_row[record["row"]] = np.asarray(file["clip_scores"])
    return scores_by_row


def test_an_ablation_killed_twice_ends_as_an_undisturbed_one_without_teachers(tiny_store, home):
    digests = digests_of(tiny_store.path)
    result = ablate(config(home, tiny_store, "whole"), QUIET)
    assert [c["status"] for c in result["cells"]] == ["done"] * 4
    paper = json.loads((home / "whole/cells.json").read_text())["paper"]
    assert paper["rows"] == {
        "random": {"hmdb51": {"top1": 43.2}},
        "slow": {"hmdb51": {"top5": 73.9}},
    }
    assert paper["splits"] == [1], "the plan's"
    # The first two rows differ in stage three alone: one student serves both.
    assert len(list((home / "whole/students").iterdir())) == 2
    assert len(list((home / "whole/finetunes").iterdir())) == 4
    # It is killed once it has written so many checkpoints.
    for num_checkpoints in (1, 3):
        process = start(home, tiny_store, "killed")
        while len(list((home / "killed").glob("*/*/checkpoints/last.pt"))) < num_checkpoints:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(home, tiny_store, "killed")
    assert process.wait() == 0, process.stderr
    whole, killed = scores(home / "whole"), scores(home / "killed")
    assert list(whole) == ["random", "slow", "2 random", "scratch"]
    for row in whole:
        np.testing.assert_array_equal(whole[row], killed[row])
    assert not np.array_equal(whole["random"], whole["2 random"])
    assert digests_of(tiny_store.path) == digests


@pytest.mark.usefixtures("forked_workers")
def test_workers_give_the_same_scores_and_a_failed_cell_stops_no_other(tiny_store, home):
    plan = {**PLAN, "axes": {"variant": {
        "random": {"train-student.targets.picks": "random"},
        "nothing left": {"train-student.targets.max_entropy": 1e-9, "train-student.targets.teachers": ["unsure"]},
    }}}  # fmt: skip
    (home / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    clip_scores = []
    for out, options in (("alone", {}), ("workers", {"workers": 1})):
        with pytest.raises(DistInitError, match="1 of 2 "):
            ablate(config(home, tiny_store, out, **options), QUIET)
        records = json.loads((home / out / "cells.json").read_text())["cells"]
        assert [r["status"] for r in records] == ["done", "failed"]
        assert "keeps none" in records[1]["reason"]
        with h5py.File(home / out / records[0]["finetune"] / "predictions.h5") as file:
            clip_scores.append(np.asarray(file["clip_scores"]))
    # Both use loop.threads of the plan.
    np.testing.assert_array_equal(*clip_scores)


def test_a_dry_run_lists_the_cells_and_writes_nothing(tiny_store, home):
    result = ablate(config(home, tiny_store, "out", seeds=[0, 1], dry_run=True), QUIET)
    assert len(result["cells"]) == 8
    assert result["hours_left"] > 0
    assert result["measured_on_noise"]
    assert not (home / "out").exists()


def test_keys_depend_on_everything_that_changes_a_result(tiny_store, home):
    maker = StepMaker(TargetStore.open(tiny_store.path), {})

    def keys(seeds: tuple[int, ...] = (0,), base: Mapping[str, Any] | None = None) -> list[str]:
        maker._labels.clear()
        plan = read_plan(str(home / "plan.yaml"), base or {})
        dataset = f"csv:{home / 'labels.csv'}"
        return [
            maker.finetuning(cell, maker.student(cell) if cell.needs_student else None).key
            for cell in list_cells(plan, datasets=[dataset], seeds=list(seeds), splits=[1])
        ]

    first = keys()
    assert len(set(first)) == 4
    assert (
        keys(
            base={"train-student": {"loop": {"log_every": 7}}, "finetune": {"loop": {"threads": 2}}}
        )
        == first
    )
    assert set(keys(seeds=(1,))).isdisjoint(first)
    warmer = keys(base={"train-student": {"targets": {"tau": 2.0}}})
    # Scratch has no targets.
    assert warmer[3] == first[3]
    assert set(warmer[:3]).isdisjoint(first)
    named = {
        "train-student": {"targets": {"teachers": list(TargetStore.open(tiny_store.path).teachers)}}
    }
    both = keys(base={"train-student": {"targets": {"teachers": None}}})
    # The plan itself names one of two teachers.
    assert set(both[:3]).isdisjoint(first)
    assert keys(base=named) == both
    labels = (home / "labels.csv").read_text()
    (home / "labels.csv").write_text(labels.replace(",b,train", ",a,train", 1))
    assert set(keys()).isdisjoint(first)


def test_cells_without_a_schedule_derive_one_and_stored_ablations_keep_their_schedules(
    tiny_store, home
):
    """12 videos have the 24 000 clips of the shortest student, 8 labelled ones 3 000."""
    base = {
        section: {**PLAN["base"][section], "loop": {"batch_size": 4, "device": "cpu"}}
        for section in ("train-student", "finetune")
    }
    plan = {**PLAN, "base": base}
    (home / "plan.yaml").write_text(yaml.safe_dump(plan))

    def clips(derive: bool, base: Mapping[str, Any] | None = None) -> tuple[list[int], list[str]]:
        maker = StepMaker(TargetStore.open(tiny_store.path), {}, derive=derive)
        read = read_plan(str(home / "plan.yaml"), base or {})
        cell = list_cells(read, datasets=[f"csv:{home / 'labels.csv'}"], seeds=[0], splits=[1])[0]
        student = maker.student(cell)
        steps = [student, maker.finetuning(cell, student)]
        return [step.clips for step in steps], [step.key for step in steps]

    derived, keys = clips(True)
    assert derived == [9 * 2668, 8 * 376]  # 24 000 / 9 and 3 000 / 8, in whole batches of 4
    schedule = {"epochs": 9, "epoch_clips": 2667, "warmup_epochs": 2, "step_epochs": 2}
    assert clips(True, {"train-student": {"loop": schedule}})[1][0] == keys[0], "one run"
    assert clips(False)[0] == [45 * 12, 8 * 40_000], "as in version 0.1"
    budget = {"preset": "paper", "loop": {"budget": 900}}
    assert clips(True, {"train-student": budget})[0][0] == 900, "in place of the preset's"
    # The folder decides: cells.json of version 0.1 does not record it.
    assert derives_schedules(home / "out")
    (home / "out").mkdir()
    write_config(home / "out/config.yaml", "ablate", config(home, tiny_store, "out"))
    (home / "out/cells.json").write_text(json.dumps({"title": "", "axes": [], "cells": []}))
    assert not derives_schedules(home / "out")
    result = ablate(config(home, tiny_store, "out", dry_run=True), QUIET)
    assert result["cells"][0]["student"] == f"students/{clips(False)[1][0]}"


def test_each_cell_chooses_on_its_validation_side_and_never_on_the_test_side(tiny_store, home):
    """With the classes of the test videos swapped, each cell makes the same choice."""
    loop = {**LOOP, "epochs": 1, "epoch_clips": 4}
    tuned = {
        "init": "scratch", "loop": loop, "test": {"clips": 1, "workers": 0},
        "held_out": 0.25, "search": {"lr": [0.05, 1e-9]},
    }  # fmt: skip
    base = {"train-student": PLAN["base"]["train-student"], "finetune": tuned}
    plan = {**PLAN, "base": base, "axes": {"finetune.dropout": [0.0, 0.5]}, "paper": None}
    (home / "plan.yaml").write_text(yaml.safe_dump(plan))

    def choices(out: str) -> dict[str, tuple[dict[str, Any], list[float], float]]:
        by_row = {}
        for record in ablate(config(home, tiny_store, out), QUIET)["cells"]:
            run = home / out / record["finetune"]
            result = json.loads((run / "result.json").read_text())
            search = result["search"]
            assert (result["test_looks"], result["validation_videos"]) == (1, 0), (
                "the last training uses all videos"
            )
            assert not (run / "search").exists()
            losses = {each["options"]["loop.lr"]: each["loss"] for each in search["candidates"]}
            assert search["chosen"] == {"loop.lr": min(losses, key=lambda lr: losses[lr])}
            used = yaml.safe_load((run / "config.yaml").read_text())["finetune"]["loop"]["lr"]
            assert used == search["chosen"]["loop.lr"], "the chosen rate is tested"
            top1 = result["metrics"]["top1"]["value"]
            by_row[record["row"]] = search["chosen"], list(losses.values()), top1
        return by_row

    first = choices("one")
    assert list(first) == ["0.0", "0.5"]
    maker = StepMaker(TargetStore.open(tiny_store.path), {})
    cell = list_cells(
        read_plan(str(home / "plan.yaml"), {}),
        datasets=[f"csv:{home / 'labels.csv'}"],
        seeds=[0],
        splits=[1],
    )[0]
    assert maker.finetuning(cell, None).clips == 3 * 4, "two candidates, and the last training"
    text = (home / "labels.csv").read_text()
    swapped = text.replace(",a,test", ",x,test").replace(",b,test", ",a,test")
    (home / "labels.csv").write_text(swapped.replace(",x,test", ",b,test"))
    second = choices("two")
    for row, (options, losses, top1) in first.items():
        assert second[row][:2] == (options, losses)
        assert second[row][2] == pytest.approx(1 - top1), "two classes: right becomes wrong"


def test_more_than_the_allowed_hours_are_refused_before_anything_runs(tiny_store, home):
    plan = {**PLAN, "axes": {"finetune.init": ["scratch"]}}
    (home / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(UsageError, match=r"--max-hours 1e-06.*--set base\.train-student"):
        ablate(config(home, tiny_store, "out", max_hours=1e-6), QUIET)
    assert not (home / "out").exists()


def test_students_of_a_split_leave_out_its_test_videos(tiny_store, home):
    store = TargetStore.open(str(tiny_store.path))
    for split in (1, 2):
        (home / f"test{split}.txt").write_text(
            "".join(f"{'/'.join(store.place(v))}\n" for v in range(3 * split))
        )
    base = PLAN["base"]
    train = {
        **base["train-student"],
        "exclude": str(home / "test{split}.txt"),
        "loop": {**LOOP, "epoch_clips": None},
    }
    plan = {**PLAN, "base": {**base, "train-student": train}}
    (home / "plan.yaml").write_text(yaml.safe_dump(plan))
    read = read_plan(str(home / "plan.yaml"), {})
    maker = StepMaker(store, {})
    first_row = list_cells(read, datasets=[f"csv:{home / 'labels.csv'}"], seeds=[0], splits=[1, 2])[
        :2
    ]
    steps = [maker.student(cell) for cell in first_row]
    assert [step.config["exclude"] for step in steps] == [
        str(home / f"test{split}.txt") for split in (1, 2)
    ]
    assert steps[0].key != steps[1].key
    # 12 - 3 and 12 - 6 videos, in whole batches of 4.
    assert [step.clips for step in steps] == [2 * 12, 2 * 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"picks": ["center"]}}, "'picks': a key begins with its section"),
        (
            {"axes": {"variant": {"a": {"train-student.targets.picked": "x"}}}},
            "unknown key 'targets.picked'",
        ),
        ({"axes": {"train-student.targets.tau": [1, 1]}}, "'1'"),
        ({"axes": {"train-student.targets.tau": []}}, "train-student.targets.tau"),
        ({"seed": [1]}, "seed"),
        ({"base": {"train-student": {"preset": "papr"}}}, "'papr'"),
        (
            {"paper": {"table": "2", "rows": {"a": {"hmdb51": 143}}}},
            r"paper\.rows\.a\.hmdb51\.top1",
        ),
        (
            {"paper": {"table": "2", "rows": {"a": {"hmdb51": {"top_1": 43}}}}},
            r"paper\.rows\.a\.hmdb51\.top_1",
        ),
        (
            {"paper": {"table": "2", "rows": {"a": {"hmdb51": {}}}}},
            "hmdb51.*top1, per",
        ),
    ],
)
def test_wrong_plans_are_refused_in_one_line(tiny_store, home, change, message):
    (home / "plan.yaml").write_text(yaml.safe_dump({**PLAN, **change}, sort_keys=False))
    with pytest.raises(UsageError, match=message):
        ablate(config(home, tiny_store, "out"), QUIET)
    assert not (home / "out").exists()


def test_one_ablation_at_a_time_in_a_folder(tiny_store, home):
    import fcntl

    (home / "out").mkdir()
    lock = os.open(home / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="out"):
        ablate(config(home, tiny_store, "out"), QUIET)
    os.close(lock)


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_are_complete(name):
    plan = read_plan(name, {})
    plan_cells = list_cells(plan, datasets=plan.datasets, seeds=plan.seeds, splits=plan.splits)
    assert plan.paper is None or set(plan.paper.rows) <= {cell.row for cell in plan_cells}
    assert plan.datasets
    for cell in plan_cells:
        for model, command, required in (
            (TrainConfig, "train-student", {"store": "s", "out": "o"}),
            (FinetuneConfig, "finetune", {"dataset": cell.dataset, "out": "o"}),
        ):
            section = dict(cell.sections[command])
            load_config(
                model,
                command,
                preset=section.pop("preset"),
                layers=[(name, section), ("", required)],
            )


def test_a_run_in_several_of_the_papers_tables_has_the_same_numbers_in_each():
    """R(2+1)D-18, Kinetics, ImageNet's teacher, the center frame, cross-entropy; HMDB-51, split
    1."""
    rows = {
        "table1-initialisation": "R(2+1)D-18, DistInit", "table2-picks": "center", "table3-loss": "cross-entropy",
        "table4-corpora": "Kinetics", "teachers": "ImageNet",
    }  # fmt: skip
    papers = {name: read_plan(name, {}).paper for name in rows}
    numbers = [
        paper.rows[rows[name]]["hmdb51"] for name, paper in papers.items() if paper is not None
    ]
    assert [each.model_dump(exclude_none=True) for each in numbers] == [
        {"per_clip": 37.8, "top1": 40.3, "top5": 74.4}
    ] * len(rows)


def test_the_cost_of_a_large_batch_is_measured_on_a_batch_that_fits() -> None:
    """The batch of 1536 clips of the paper exceeds many memories; one of a million exceeds all."""
    network = {"student": {"architecture": "r3d_18", "width": 0.0625}, "clip_frames": 4, "size": 32}
    assert (
        measure_rate({**network, "micro_batch_size": 10**6, "precision": "fp32", "device": "cpu"})
        > 0
    )
