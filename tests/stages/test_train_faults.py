"""Stage two on a disk that fills up: one line, the checkpoint before stays, and the run goes on
from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distinit.pipeline.common.console import Console
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.train_student import train_student

pytestmark = pytest.mark.slow

# The same command twice on a small disk of its own, the second time with room: one process, for the
# imports' sake.
DRIVER = """
import contextlib, io, json, shutil, subprocess, sys
import torch
from distinit.cli import main

disk, words, copy = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], check=True)
said = []
for again in (False, True):
    if again:
        step = torch.load(f"{disk}/run/checkpoints/last.pt", weights_only=True)["state"]["step"]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            main(words)
        except SystemExit as end:
            said.append([end.code, errors.getvalue().splitlines()])
shutil.copytree(f"{disk}/run", copy)
print(json.dumps([said, step]))
"""


def test_a_full_disk_leaves_a_checkpoint_that_the_run_goes_on_from(
    tiny_store: Any, tmp_path: Path
) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs root and mount namespaces: a small tmpfs is mounted")
    options = {
        "store": str(tiny_store.path), "student": {"width": 0.125}, "clips": {"size": 32, "resize": [40, 60]},
        "loop": {"batch_size": 4, "epochs": 1, "epoch_clips": 16, "workers": 0, "threads": 1, "device": "cpu",
                 "checkpoint_every": 1},
    }  # fmt: skip
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["train-student", "--out", f"{disk}/run", "--resume", "auto", "--quiet"]
    for group in ("store", "student", "clips", "loop"):
        words += ["--set", f"{group}={json.dumps(options[group])}"]
    process = subprocess.run(
        [
            "unshare",
            "-m",
            sys.executable,
            "-c",
            DRIVER,
            str(disk),
            json.dumps(words),
            str(tmp_path / "copy"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    ((first, lines), (second, _)), step = json.loads(process.stdout.splitlines()[-1])
    assert first == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"error: disk full while writing {disk}/run/checkpoints/last.pt")
    assert step == 1
    assert second == 0
    train_student(
        TrainConfig.model_validate(options | {"out": str(tmp_path / "whole")}), Console(quiet=True)
    )
    ours, theirs = (load_student(tmp_path / name).state_dict() for name in ("copy", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
