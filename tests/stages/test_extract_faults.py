"""Stage one among faults: what is killed, hangs, fills up, vanishes or is forbidden, and the store
afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zarr

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.verify import verify
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.tests import warm
from distinit.tests.thorough import some

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
NAME = "fault_teachers:teacher"
OPTIONS = {"name": "tiny", "input_size": "32", "resize": "32"}
MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.fc = nn.Linear(48, 6)

    def forward(self, x):
        features = self.pool(x)
        return {"logits": self.fc(features), "features": features}


def teacher():
    return Net()
"""
BOTH = ("logits", "features")
# Runs a list of shell lines and distinit commands in one process: importing torch for each would
# take longer than the tests. Prints [exit code, standard error] of each command.
DRIVER = """
import contextlib, io, json, subprocess, sys
from distinit.cli import main

results = []
for step in json.loads(sys.argv[1]):
    if isinstance(step, str):
        subprocess.run(step, shell=True, check=True, stdout=sys.stderr)
        continue
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(step)
        except SystemExit as end:
            results.append([end.code, said.getvalue()])
print(json.dumps(results))
"""
LONG, NAMES = "long.mp4", [f"v{i}.mp4" for i in range(8)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight short videos and one that takes a while, a teacher's module, and the store of a quiet
    extraction."""
    home = tmp_path_factory.mktemp("faults")
    home.chmod(0o755)
    (home / "modules").mkdir()
    (home / "modules" / "fault_teachers.py").write_text(MODULE)
    (home / "driver.py").write_text(DRIVER)
    (home / "videos").mkdir()
    rng = np.random.default_rng(0)
    for number, name in enumerate([LONG, *NAMES]):
        frames = 1500 if name == LONG else 50 + 7 * number
        shade = rng.integers(0, 200, (frames, 1, 1, 3)) // 4 + rng.integers(0, 150, (1, 4, 6, 3))
        write_video(
            home / "videos" / name, shade.repeat(8, 1).repeat(8, 2).astype(np.uint8), fps=25, gop=25
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "modules"))
        patch.setenv("PYTHONPATH", str(home / "modules"), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        extract_targets(config(home / "videos", home / "whole.zarr"), QUIET)
        yield home


@pytest.fixture
def videos(home: Path, tmp_path: Path) -> Path:
    """Copy the videos, for a test that damages them."""
    return Path(shutil.copytree(home / "videos", tmp_path / "videos"))


def config(videos: Path, out: Path, **changes: Any) -> ExtractConfig:
    base = {"sources": [str(videos)], "out": out, "batch_size": 8, "shard_rows": 256, "decoders": 1}
    teachers = [TeacherSpec(name=NAME, options=OPTIONS, outputs=BOTH)]
    return ExtractConfig.model_validate(
        {**base, "teachers": teachers, "sampling": Sampling(every=1), **changes}
    )


def words(videos: Path, out: Path, *more: str) -> list[str]:
    """Return the words of the same command."""
    teacher_options = [w for k, v in OPTIONS.items() for w in ("--teacher-option", f"{k}={v}")]
    sizes = ["--batch-size", "8", "--shard-rows", "256", "--decoders", "1", "--every", "1"]
    return [
        "extract-targets",
        str(videos),
        "--out",
        str(out),
        "--teacher",
        NAME,
        "--teacher-output",
        ",".join(BOTH),
        *teacher_options,
        *sizes,
        *more,
    ]


def same(a: Path, b: Path) -> None:
    """Check that two stores have the same arrays, bit by bit, and that no file is left over."""
    names = {
        n
        for n, x in zarr.open_group(a, mode="r").members(max_depth=None)
        if isinstance(x, zarr.Array)
    }
    names_b = {
        n
        for n, x in zarr.open_group(b, mode="r").members(max_depth=None)
        if isinstance(x, zarr.Array)
    }
    assert names == names_b
    for name in names:
        x, y = (np.asarray(zarr.open_array(root / name, mode="r")[:]) for root in (a, b))
        np.testing.assert_array_equal(x, y, err_msg=name)
    sums = "teachers/*/statistics/*/zarr.json"
    sums_a, sums_b = ([f.read_bytes() for f in sorted(root.glob(sums))] for root in (a, b))
    assert sums_a == sums_b != []
    assert not (b / "staging").exists()


def same_videos(a: Path, b: Path, but: str) -> None:
    """Check that all videos except `but` have the same frames and targets, at any position."""
    x, y = TargetStore.open(a), TargetStore.open(b)
    video_of = {y.video(v).path: v for v in range(y.n_videos)}
    for v in range(x.n_videos):
        path = x.video(v).path
        if path == but:
            continue
        (i, p, rows), (j, q, others) = x.frames(v), y.frames(video_of[path])
        np.testing.assert_array_equal(i, j)
        np.testing.assert_array_equal(p, q)
        assert len(i)
        for teacher in ("tiny", "tiny.features"):
            values = x.outputs(teacher, rows), y.outputs(teacher, others)
            np.testing.assert_allclose(*values, atol=0.01)


def status(store: Path, path: str) -> tuple[str, str | None]:
    opened = TargetStore.open(store)
    return next(
        (r.status, r.reason) for r in map(opened.video, range(opened.n_videos)) if r.path == path
    )


class Meddling(Console):
    """A quiet console that acts when decoding begins, after listing and probing."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__(quiet=True)
        self.act = act

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Any]:
        """Act when a progress bar of decoding begins."""
        if description == "extracting":
            self.act()
        with super().progress(description, total, unit) as bar:
            yield bar


# -- the decoder
# -------------------------------------------------------------------------------------------


class Trouble(Meddling):
    """Sends a signal to the first `times` decoder processes that are seen to have the long video
    open."""

    def __init__(self, how: signal.Signals, times: int) -> None:
        self.how, self.left = how, times
        super().__init__(lambda: threading.Thread(target=self.watch, daemon=True).start())

    def watch(self) -> None:
        seen: set[int] = set()
        ends = time.monotonic() + 60
        while self.left and time.monotonic() < ends:
            for child in psutil.Process().children(recursive=True):
                try:
                    if child.pid not in seen and any(
                        f.path.endswith(LONG) for f in child.open_files()
                    ):
                        seen.add(child.pid)
                        child.send_signal(self.how)
                        self.left -= 1
                except psutil.Error:
                    continue
            time.sleep(0.002)


# Seconds: a decoder has to start within them, too, which takes long on a machine with other work.
PATIENCE = {signal.SIGKILL: 120, signal.SIGSTOP: 5}


# A decoder is killed or hangs, once or twice: two of the four pairs have each of these.
@pytest.mark.parametrize("how", some([signal.SIGSTOP, signal.SIGKILL], 2))
def test_a_decoder_that_fails_once_costs_nothing(
    home: Path, tmp_path: Path, how: signal.Signals
) -> None:
    trouble = Trouble(how, 1)
    extract_targets(config(home / "videos", tmp_path / "s.zarr", timeout_s=PATIENCE[how]), trouble)
    assert trouble.left == 0
    same(home / "whole.zarr", tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("how", "why"),
    some(
        [(signal.SIGKILL, "the decoder crashed (SIGKILL)"), (signal.SIGSTOP, "no frame for 5 s")], 2
    ),
)
def test_a_video_that_fails_its_decoder_twice_fails_alone(
    home: Path, tmp_path: Path, how: signal.Signals, why: str
) -> None:
    trouble = Trouble(how, 2)
    options = config(home / "videos", tmp_path / "s.zarr", timeout_s=PATIENCE[how])
    result = extract_targets(options, trouble)
    assert trouble.left == 0
    assert (result["ok"], result["failed"], result["failures"]) == (len(NAMES), 1, {why: 1})
    same_videos(home / "whole.zarr", tmp_path / "s.zarr", but=LONG)
    extract_targets(config(home / "videos", tmp_path / "s.zarr", retry_failed=True), QUIET)
    same_videos(home / "whole.zarr", tmp_path / "s.zarr", but="")


# -- the files
# ---------------------------------------------------------------------------------------------


def test_a_file_that_vanishes_or_changes_after_the_listing(
    home: Path, videos: Path, tmp_path: Path
) -> None:
    def harm() -> None:
        (videos / NAMES[2]).rename(tmp_path / "away.mp4")
        shutil.copy(videos / NAMES[4], videos / NAMES[3])

    out = tmp_path / "s.zarr"
    result = extract_targets(config(videos, out), Meddling(harm))
    assert (result["ok"], result["failed"]) == (7, 2)
    assert status(out, NAMES[2]) == ("failed", "no such file")
    assert status(out, NAMES[3]) == ("failed", "the file changed after it was listed")
    assert list(verify(out, TargetStore.open(out).index)) == []
    (tmp_path / "away.mp4").rename(videos / NAMES[2])
    shutil.copy(home / "videos" / NAMES[3], videos / NAMES[3])
    assert extract_targets(config(videos, out), QUIET)["new_rows"] == 0
    assert extract_targets(config(videos, out, retry_failed=True), QUIET)["failed"] == 0
    same_videos(home / "whole.zarr", out, but="")


def test_places_that_cannot_be_a_store_and_one_without_a_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "empty")
    with pytest.raises(
        StoreError,
        match=r"--out .*link.zarr.*Not a directory",
    ):
        extract_targets(config(home / "videos", tmp_path / "link.zarr"), QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link.zarr"]
    shutil.copytree(home / "whole.zarr", tmp_path / "s.zarr")
    monkeypatch.chdir(tmp_path / "s.zarr")
    assert extract_targets(config(home / "videos", Path(".")), QUIET)["new_rows"] == 0
    assert (tmp_path / "s.zarr.config.yaml").exists()


def test_a_shard_of_nothing_but_failures_takes_another_teacher(
    home: Path, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"

    def harm() -> None:
        for name in NAMES[-2:]:
            (videos / name).unlink()

    extract_targets(config(videos, out), Meddling(harm))
    index = TargetStore.open(out).index
    assert not index.rows[index.shard == index.n_shards - 1].any()
    second = TeacherSpec(name=NAME, options={**OPTIONS, "name": "second"}, outputs=BOTH)
    result = extract_targets(config(videos, out, teachers=[second]), QUIET)
    assert result["teachers"] == {"second": 7, "second.features": 7}
    assert list(verify(out, TargetStore.open(out).index)) == []


# -- the store
# ---------------------------------------------------------------------------------------------


def driven(home: Path, steps: list[Any], before: tuple[str, ...]) -> list[Any]:
    """Return what `DRIVER` prints: exit code and lines of each command."""
    command = [*before, sys.executable, str(home / "driver.py"), json.dumps(steps)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=300)
    assert process.returncode == 0, process.stderr
    return [(code, said.strip().splitlines()) for code, said in json.loads(process.stdout)]


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(home: Path, tmp_path: Path) -> None:
    if (
        os.geteuid() != 0
        or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs root and mount namespaces: a small tmpfs is mounted")
    disk = tmp_path / "disk"
    disk.mkdir()
    extract = words(home / "videos", disk / "s.zarr", "--quiet")
    size = sum(f.stat().st_size for f in (home / "whole.zarr").rglob("*") if f.is_file())
    total = size // 1024 + 2048
    steps: list[Any] = [f"mount -t tmpfs -o size={total}k tmpfs {disk}"]
    shares = some((0.02, 0.2, 0.4, 0.6, 0.8), 2)
    for share in shares:
        steps += [
            f"rm -f {disk}/ballast; used=$(du -sk {disk} | cut -f1); "
            f"head -c $((({total} - used) * 1024 - {int(share * size)})) /dev/zero > {disk}/ballast",
            extract,
        ]
    steps += [f"rm {disk}/ballast", extract, f"cp -r {disk}/s.zarr {tmp_path}/s.zarr"]
    results = driven(home, steps, ("unshare", "-m"))
    for code, lines in results[:-1]:
        assert code == 1
        assert len(lines) == 1
        # A store is made under another name first.
        assert re.match(rf"error: disk full while writing {disk}/(s|\.s)\.zarr", lines[0])
    assert results[-1][0] == 0
    same(home / "whole.zarr", tmp_path / "s.zarr")


def test_without_permission(home: Path, videos: Path, tmp_path: Path) -> None:
    before: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root may write anywhere: as root without that privilege
        before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
        if (
            not shutil.which("setpriv")
            or subprocess.run([*before, "true"], capture_output=True).returncode
        ):
            pytest.skip("needs setpriv, to be root without its rights")
    closed, out = tmp_path / "closed", tmp_path / "s.zarr"
    shutil.copytree(home / "whole.zarr", closed / "ours.zarr")
    forbidden = [videos / NAMES[0], closed, *closed.rglob("*")]
    for path in forbidden:
        path.chmod(path.stat().st_mode & (0o000 if path.suffix == ".mp4" else 0o555))
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    results = driven(
        home,
        [
            words(videos, out, "--quiet"),
            words(videos, closed / "new.zarr", "--quiet"),
            words(videos, closed / "ours.zarr", "--quiet"),
            ["targets", "verify", str(closed / "ours.zarr"), "--quiet"],
        ],
        before,
    )
    assert [code for code, _ in results] == [0, 1, 1, 0], results
    assert status(out, NAMES[0]) == ("failed", "permission denied")
    same_videos(home / "whole.zarr", out, but=NAMES[0])
    for _, lines in results[1:3]:
        assert len(lines) == 1
        assert str(closed) in lines[0]
        assert "Permission denied" in lines[0]
    same(home / "whole.zarr", closed / "ours.zarr")


def test_one_writer_at_a_time_and_no_stale_lock(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(StoreError, match=r"s.zarr") as error:
            extract_targets(config(home / "videos", out), QUIET)
        refused.append(str(error.value))

    extract_targets(config(home / "videos", out), Meddling(second))
    assert refused
    same(home / "whole.zarr", out)
    lock = "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], 0), 2); print(1, flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", lock, str(out)], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline()
    with pytest.raises(StoreError):
        extract_targets(config(home / "videos", out), QUIET)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert extract_targets(config(home / "videos", out), QUIET)["new_rows"] == 0


# -- the processes
# -----------------------------------------------------------------------------------------


def commits(store: Path) -> int:
    return len(list(store.glob("commits/frames/*/zarr.json")))


def until(what: Callable[[], Any], process: warm.Process) -> Any:
    """Wait for something while the process runs."""
    while not (got := what()):
        assert process.poll() is None, process.stderr
        time.sleep(0.005)
    return got


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_and_dead_workers(home: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "s.zarr"
    more = ["--workers", str(workers)] if workers else []
    process = warm.Process(*words(home / "videos", out, *more))
    family = psutil.Process(process.pid)

    def at_work() -> list[psutil.Process]:
        """Dask workers that have started to decode."""
        parents = []
        for child in family.children(recursive=True):
            try:
                server, parent = child.parents()[:2]
                if parent.pid != process.pid and all(
                    "distinit.pipeline.video.pool.fork_server" in each.cmdline()
                    for each in (child, server)
                ):
                    parents.append(parent)
            except psutil.Error:
                continue  # ended while we looked
        return parents

    if workers:
        until(at_work, process)[0].kill()
    until(lambda: commits(out) > 0, process)
    children = family.children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert process.wait() == 130
    lines = process.stderr.decode().strip().splitlines()
    assert lines[-1] == "interrupted; the same command resumes where it stopped"
    assert not [line for line in lines if "Traceback" in line or "Error" in line]
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert not (out / "staging").exists()
    extract_targets(config(home / "videos", out), QUIET)
    same(home / "whole.zarr", out)
