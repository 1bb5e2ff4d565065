"""Exit codes of `distinit`, one line on standard error, and a clean standard output."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from distinit.cli import cli, run
from distinit.pipeline.common.errors import StoreError, UsageError, explain
from distinit.pipeline.video.encode import write_video
from distinit.tests import warm
from distinit.tests.commands import command_that_raises


def distinit(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm.run(*args, cwd=cwd)


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["extrct"], ["extrct"]),
        (["train-student", "--stroe", "x"], ["--stroe", "--store"]),
        (["targets", "info"], ["STORE"]),
        (["finetune", "--epochs", "many"], ["--epochs", "many"]),
        (
            ["train-student", "--videos", "nowhere", "--store", "s", "--out", "r"],
            ["--videos", "nowhere", "NAME=VALUE"],
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_2(
    args: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exited:
        run(cli, args)
    assert exited.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    for part in parts:
        assert part in shown.err


@pytest.mark.slow
def test_a_system_without_a_required_module_is_one_line(tmp_path: Path) -> None:
    """Run without two modules that Windows lacks; --help works without them."""
    code = "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\nfrom distinit.cli import main\nmain()"
    process = warm.run("report", ".", "--out", "r", code=code, cwd=tmp_path)
    assert (process.returncode, process.stdout, process.stderr.count("\n")) == (1, "", 1)
    assert process.stderr.startswith("error: ")
    assert "Linux" in process.stderr
    assert "fcntl" in process.stderr
    assert warm.run("--help", code=code, cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_another_system_gets_a_warning_about_missing_limits(tmp_path: Path) -> None:
    code = "import sys, distinit.stages.targets_info\nfrom distinit.cli import main\nsys.platform = 'darwin'\nmain()"
    process = warm.run("targets", "info", "nowhere.zarr", code=code, cwd=tmp_path)
    assert process.returncode == 1
    *warning, error = process.stderr.splitlines()
    assert "memory limit" in " ".join(warning)
    assert error.startswith("error: ")


@pytest.mark.slow
def test_errors_of_the_job_are_one_line_and_debug_shows_where(tmp_path: Path) -> None:
    (tmp_path / "other.zarr").mkdir()
    process = distinit("targets", "info", "other.zarr", "--json", cwd=tmp_path)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("error: ")
    assert "other.zarr" in process.stderr
    assert process.stderr.count("\n") == 1
    process = distinit("targets", "info", "other.zarr", "--debug", cwd=tmp_path)
    assert "Traceback" in process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_no_videos_and_an_unknown_teacher(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.mp4").write_bytes(b"not a video")
    process = distinit(
        "extract-targets", "empty", "--out", "s", "--teacher", "resnet50", cwd=tmp_path
    )
    assert process.returncode == 2
    assert "empty" in process.stderr
    process = distinit(
        "extract-targets", "full", "--out", "s", "--teacher", "resnet5000", cwd=tmp_path
    )
    assert process.returncode == 2
    line = process.stderr.splitlines()[-1]
    for word in ("resnet5000", "efficientnet_lite0", "torchvision:NAME", "package.module:factory"):
        assert word in line
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("--x: got 3"), 2, "error: --x: got 3"),
        (StoreError("s.zarr: cor\nrupt \udcff"), 1, "error: s.zarr: cor rupt \\udcff"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x/y"),
            1,
            "error: /x/y: Permission denied",
        ),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), 1, "error: disk full while writing /x/y"),
        (ZeroDivisionError("by\nzero"), 1, "error: ZeroDivisionError: by (--debug shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; again"),
    ],
)
def test_exceptions_become_exit_codes(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        run(command_that_raises(error), ["go"], resume_hints={"go": "interrupted; again"})
    assert exited.value.code == code
    shown = capsys.readouterr()
    assert shown.out == ""
    # After ^C it begins with a line feed.
    assert shown.err.strip("\n").startswith(line)
    assert shown.err.strip("\n").count("\n") == 0


def test_a_full_disk_is_recognized_as_the_cause_of_another_error() -> None:
    error = StoreError("runs/a.zarr: cannot write")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    line = "disk full while writing: runs/a.zarr: cannot write; free some space and run it again"
    assert explain(error) == (line, 1)


@pytest.mark.slow
def test_ctrl_c_exits_with_130_and_prints_how_to_resume(tmp_path: Path) -> None:
    """Interrupt a command while it builds a teacher."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\ndef build():\n    pathlib.Path('begun').touch()\n    time.sleep(600)\n"
    )
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    args = ("extract-targets", "a.mp4", "--out", "s", "--teacher", "slow:build")
    process = warm.Process(*args, cwd=tmp_path)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    shown = process.stderr.decode()
    assert shown.splitlines()[-1] == "interrupted; the same command resumes where it stopped"
    assert "Traceback" not in shown


@pytest.mark.slow
def test_json_stays_alone_on_standard_output(tmp_path: Path) -> None:
    """Load a teacher whose module prints, which must not appear on standard output."""
    (tmp_path / "chatty.py").write_text(
        "import torch\nprint('importing')\n"
        "def build():\n    print('building')\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))\n"
    )
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"not a video")
    write_video(tmp_path / "videos" / "good.mp4", np.zeros((8, 32, 32, 3), np.uint8))
    process = distinit(
        *("extract-targets", "videos", "--out", "s.zarr", "--teacher", "chatty:build", "--json"),
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert (result["videos"], result["failed"]) == (2, 1)
    assert "building" in process.stderr
