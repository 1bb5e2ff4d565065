"""Decoders and loader processes end when their client is killed, at any moment."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from distinit.pipeline.common.processes import end_with_parent
from distinit.pipeline.video.encode import write_video
from distinit.tests.thorough import some

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are listed in /proc")
MARK = "DISTINIT_TEST_FAMILY"
LOADER = r"""
import multiprocessing, os, sys, threading, time
import torch
from distinit.pipeline.training import loader_workers
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches

start, how, when = sys.argv[1:4]

def stop_here():
    # With print, the lines of two processes may be written as "herehere".
    os.write(1, b"here\n")
    time.sleep(3 if when == "before" else 1000)

class Examples:
    def __setstate__(self, state):  # in a fresh process, before its loop begins
        if when == "before":
            stop_here()
    def __getstate__(self):
        return {"a": 1}
    def __getitem__(self, key):
        if when == "reading" and key[1] == 5 and multiprocessing.parent_process() is not None:
            stop_here()
        return {"x": torch.full((100_000,), float(key[1]))}

def batches():
    keys = EpochBatchSampler(batch_size=2, steps_per_epoch=500, epochs=1)
    return read_batches(Examples(), keys, workers=2, device=torch.device("cpu"))

def consume(loader):
    for number, batch in enumerate(loader):
        if number == 20:
            if when == "waiting":
                os.write(1, b"here\n")
                time.sleep(1000)

if __name__ == "__main__":
    loader_workers.start_context = lambda device: multiprocessing.get_context(start)
    if when == "before" and start == "fork":
        run = loader_workers._run_worker
        def late(*args, **kwargs):
            stop_here()
            run(*args, **kwargs)
        loader_workers._run_worker = late
    if how == "thread":
        loader = batches()
        # The thread starts the loader processes, and ends.
        thread = threading.Thread(target=lambda: next(loader))
        thread.start()
        thread.join()
        consume(loader)
    else:
        consume(batches())
"""
DECODERS = r"""
import os, sys, threading, time
from distinit.pipeline.video.pool.decode_pool import DecodeJob, DecodePool
from distinit.pipeline.video.geometry import View
from distinit.pipeline.video.sampling import Sampling

start, how, when, path = sys.argv[1:5]
pool = DecodePool(processes=2, views=[View(resize=(64, 64))])
events = pool.stream(DecodeJob(i, path, Sampling(every=1)) for i in range(9))
if when == "before":
    threading.Timer(0.05, lambda: os.write(1, b"here\n")).start()
if how == "thread":
    thread = threading.Thread(target=lambda: next(events))
    thread.start()
    thread.join()
for event in events:
    os.write(1, b"here\n")
    time.sleep(1000)
"""


def family(mark: str) -> list[int]:
    """Return the processes that were started with `mark` in their environment, and their forks."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    pids.append(int(folder.name))
            except OSError:
                continue
    return pids


@pytest.fixture
def mark() -> Iterator[str]:
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    yield name
    for pid in family(name):
        os.kill(pid, signal.SIGKILL)


def kill_program(
    program: str, arguments: list[str], mark: str, folder: Path, after: float | None
) -> list[int]:
    """Kill a program once it has printed "here", or after `after` seconds; return its processes."""
    (folder / "program.py").write_text(program)
    environment = {**os.environ, MARK: mark}
    command = [sys.executable, str(folder / "program.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as client:
        assert client.stdout is not None
        if after is None:
            while client.stdout.readline() != "here\n":
                assert client.poll() is None
        else:
            time.sleep(after)
        pids = family(mark)
        client.kill()
    return pids


def wait_for_end(mark: str, seconds: float = 15.0) -> bool:
    """Wait for the end of all processes of a program; return whether all have ended."""
    deadline = time.monotonic() + seconds
    while family(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not family(mark)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "how", "when"),
    [
        # One of four of these runs, which covers both values of `how` and two of `when`; the cases
        # below add the third.
        *some(itertools.product(["fork"], ["main", "thread"], ["before", "reading", "waiting"]), 4),
        ("spawn", "main", "before"),
        ("forkserver", "thread", "waiting"),
    ],
)
def test_loader_processes_end_with_their_client(
    start: str, how: str, when: str, mark: str, tmp_path: Path
) -> None:
    pids = kill_program(LOADER, [start, how, when], mark, tmp_path, None)
    assert len(pids) >= 2
    assert wait_for_end(mark)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "waiting"])
@pytest.mark.parametrize("how", ["main", "thread"])
def test_decoders_end_with_their_client(how: str, when: str, mark: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", (np.zeros((64, 64, 3), np.uint8) for _ in range(900)), gop=50)
    assert (
        len(kill_program(DECODERS, ["-", how, when, str(tmp_path / "v.mp4")], mark, tmp_path, None))
        >= 2
    )
    assert wait_for_end(mark)


@pytest.mark.slow
def test_loader_processes_end_at_random_moments(mark: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(2):
        kill_program(LOADER, ["fork", "main", "never"], mark, tmp_path, chance.uniform(1.0, 5.0))
        assert wait_for_end(mark)


def test_programs_end_with_the_process_that_started_them(mark: str, tmp_path: Path) -> None:
    program = (
        "import os, subprocess\n"
        "from functools import partial\n"
        "from distinit.pipeline.common.processes import end_with_parent\n"
        "with subprocess.Popen(['sleep', '1000'], preexec_fn=partial(end_with_parent, os.getpid())):\n"
        "    print('here', flush=True)\n"
    )
    assert len(kill_program(program, [], mark, tmp_path, None)) == 2
    assert wait_for_end(mark)
    process = subprocess.run(
        ["sleep", "1000"], preexec_fn=partial(end_with_parent, os.getpid() + 1), check=False
    )
    # Its parent is another process, as after the end of the parent.
    assert process.returncode == 1
