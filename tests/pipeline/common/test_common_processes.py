"""Processes that outlive nobody: decoders and loader processes whose client is killed, at any
moment of theirs."""

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

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="what a process starts is known from /proc"
)
MARK = "DISTINIT_TEST_FAMILY"
LOADER = r"""
import multiprocessing, os, sys, threading, time
import torch
from distinit.pipeline.training import loader_workers
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches

start, how, when = sys.argv[1:4]

def stop_here():
    os.write(1, b"here\n")  # a print of two processes may come out as "herehere"
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

def consume(found):
    for number, batch in enumerate(found):
        if number == 20:
            if when == "waiting":
                os.write(1, b"here\n")
                time.sleep(1000)

if __name__ == "__main__":
    loader_workers.start_context = lambda device: multiprocessing.get_context(start)
    if when == "before" and start == "fork":
        run = loader_workers._run_worker
        def late(*arguments, **named):
            stop_here()
            run(*arguments, **named)
        loader_workers._run_worker = late
    if how == "thread":
        found = batches()
        thread = threading.Thread(target=lambda: next(found))  # starts them, and ends
        thread.start()
        thread.join()
        consume(found)
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
    """The processes with `mark` in the environment that they were started with, and their
    descendants by fork."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    yield name
    for pid in family(name):
        os.kill(pid, signal.SIGKILL)


def killed(
    program: str, arguments: list[str], mark: str, folder: Path, after: float | None
) -> list[int]:
    """Kill a program alone once it has printed where it is, or after so many seconds; returns its
    processes."""
    (folder / "program.py").write_text(program)
    environment = {**os.environ, MARK: mark}
    words = [sys.executable, str(folder / "program.py"), *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, text=True) as client:
        assert client.stdout is not None
        if after is None:
            while client.stdout.readline() != "here\n":
                assert client.poll() is None
        else:
            time.sleep(after)
        pids = family(mark)
        client.kill()
    return pids


def nothing_is_left(mark: str, seconds: float = 15.0) -> bool:
    until = time.monotonic() + seconds
    while family(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not family(mark)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "how", "when"),
    [
        # Every fourth one has both values of `how`, and two of `when`; the third is below.
        *some(itertools.product(["fork"], ["main", "thread"], ["before", "reading", "waiting"]), 4),
        ("spawn", "main", "before"),
        ("forkserver", "thread", "waiting"),
    ],
)
def test_loader_processes_end_with_their_client(
    start: str, how: str, when: str, mark: str, tmp_path: Path
) -> None:
    pids = killed(LOADER, [start, how, when], mark, tmp_path, None)
    assert len(pids) >= 2
    assert nothing_is_left(mark)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "waiting"])
@pytest.mark.parametrize("how", ["main", "thread"])
def test_decoders_end_with_their_client(how: str, when: str, mark: str, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", (np.zeros((64, 64, 3), np.uint8) for _ in range(900)), gop=50)
    assert (
        len(killed(DECODERS, ["-", how, when, str(tmp_path / "v.mp4")], mark, tmp_path, None)) >= 2
    )
    assert nothing_is_left(mark)


@pytest.mark.slow
def test_at_random_moments(mark: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(2):
        killed(LOADER, ["fork", "main", "never"], mark, tmp_path, chance.uniform(1.0, 5.0))
        assert nothing_is_left(mark)


def test_programs_end_with_the_process_that_started_them(mark: str, tmp_path: Path) -> None:
    program = (
        "import os, subprocess\n"
        "from functools import partial\n"
        "from distinit.pipeline.common.processes import end_with_parent\n"
        "with subprocess.Popen(['sleep', '1000'], preexec_fn=partial(end_with_parent, os.getpid())):\n"
        "    print('here', flush=True)\n"
    )
    assert len(killed(program, [], mark, tmp_path, None)) == 2
    assert nothing_is_left(mark)
    gone = subprocess.run(
        ["sleep", "1000"], preexec_fn=partial(end_with_parent, os.getpid() + 1), check=False
    )
    assert gone.returncode == 1  # the parent ended before it was asked
