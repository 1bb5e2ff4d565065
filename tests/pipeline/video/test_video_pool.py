"""Decoding in real worker processes that are killed, stopped, starved and abandoned."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import psutil
import pytest

from distinit.pipeline.common.errors import DecoderError, VideoError
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import Renderer, View
from distinit.pipeline.video.pool import decode_pool, process
from distinit.pipeline.video.pool.decode_pool import Block, DecodeJob, DecodePool, Done, Failed
from distinit.pipeline.video.pool.fork_server import ForkServer
from distinit.pipeline.video.pool.messages import FORK
from distinit.pipeline.video.probe import probe
from distinit.pipeline.video.sampling import Sampling

VIEWS = [View(resize=(120, 160)), View(resize=64, crop=56)]
FRAMES = 400  # far more than the slots of a worker hold
Rows = dict[int, list[tuple[int, int, bytes]]]


def video(path: Path, frames: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    scene = random.integers(0, 255, (6, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    write_video(
        path, (np.roll(scene, (t, 2 * t), (0, 1)) for t in range(frames)), gop=50, bframes=2
    )
    return os.fspath(path)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return video(tmp_path_factory.mktemp("pool") / "long.mp4", FRAMES)


def expected(path: str, sampling: Sampling) -> list[tuple[int, int, bytes]]:
    """The rows of a video, decoded here."""
    with VideoReader(path) as reader:
        renderer = Renderer()
        return [
            (index, pts, b"".join(renderer.render(frame, view).tobytes() for view in VIEWS))
            for index, pts, frame in reader.sample(sampling)
        ]


def collect(events: Iterator[Block | Done | Failed], rows: Rows) -> Iterator[Block | Done | Failed]:
    """Copy the rows of every block to `rows`, and yield all events."""
    for event in events:
        if isinstance(event, Block):
            for i, (index, pts) in enumerate(zip(event.index, event.pts, strict=True)):
                images = b"".join(view[i].tobytes() for view in event.images)
                rows.setdefault(event.key, []).append((int(index), int(pts), images))
        yield event


def pool(**options: Any) -> DecodePool:
    return DecodePool(**{"processes": 1, "views": VIEWS, **options})


@pytest.mark.slow
def test_many_videos_in_order_whatever_the_number_of_workers(tmp_path: Path) -> None:
    paths = [video(tmp_path / f"{i}.mp4", n, i) for i, n in enumerate((30, 90, 1, 200, 7))]
    (tmp_path / "noise.mp4").write_bytes(b"x" * 999)
    paths.insert(2, str(tmp_path / "noise.mp4"))
    wanted = {i: expected(p, Sampling(every=3)) for i, p in enumerate(paths) if "noise" not in p}
    for processes in (1, 3):
        rows: Rows = {}
        with pool(processes=processes) as decoders:
            jobs = (DecodeJob(i, path, Sampling(every=3)) for i, path in enumerate(paths))
            events = [e for e in collect(decoders.stream(jobs), rows) if not isinstance(e, Block)]
            probes = list(decoders.probe(paths))
            with pytest.raises(VideoError, match="not a video container"):
                decoders.timeline(paths[2])
            assert decoders.timeline(paths[0]).key.tolist() == [True] + [False] * 29
        assert [e.key for e in events] == list(range(6))
        assert events[2] == Failed(2, "not a video container FFmpeg knows")
        assert rows == wanted
        assert [e.frames for e in events if isinstance(e, Done)] == [30, 90, 1, 200, 7]
        assert [p.frames for p in probes] == [30, 90, 0, 1, 200, 7]
        assert probes[2].error


def test_ranges_and_bounds(long_video: str) -> None:
    rows: Rows = {}
    jobs = [
        DecodeJob(1, long_video, Sampling(every=4), 50, 90),
        DecodeJob(2, long_video, Sampling(every=4), 0, None, 5),
    ]
    with pool() as decoders:
        ends = [e for e in collect(decoders.stream(jobs), rows) if isinstance(e, Done)]
    assert [row[0] for row in rows[1]] == list(range(52, 90, 4))
    assert [row[0] for row in rows[2]] == [0, 4, 8, 12, 16]
    assert [e.more for e in ends] == [False, True]
    assert [e.frames for e in ends] == [FRAMES, FRAMES]


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 2])
def test_a_killed_worker_costs_nothing(long_video: str, after: int) -> None:
    rows: Rows = {}
    with pool() as decoders:
        events = []
        for event in collect(decoders.stream([DecodeJob(0, long_video, Sampling(every=1))]), rows):
            if len(events) == after:
                os.kill(decoders.pids[0], signal.SIGKILL)
            events.append(event)
        assert isinstance(events[-1], Done)
    assert rows[0] == expected(long_video, Sampling(every=1))


@pytest.mark.slow
def test_a_killed_fork_server_costs_nothing(long_video: str) -> None:
    """Its workers end with it, and the workers of another server decode the videos."""
    rows: Rows = {}
    killed: list[int] = []
    events = []
    with pool(processes=2) as decoders:
        jobs = [DecodeJob(key, long_video, Sampling(every=1)) for key in range(2)]
        for event in collect(decoders.stream(jobs), rows):
            # More often than a video is tried.
            if len(killed) < 4:
                server = psutil.Process(decoders.pids[0]).ppid()
                assert server not in (*killed, os.getpid())
                os.kill(server, signal.SIGKILL)
                killed.append(server)
            events.append(event)
    assert len(killed) == 4
    assert not [event for event in events if isinstance(event, Failed)]
    assert rows[0] == rows[1] == expected(long_video, Sampling(every=1))


def test_a_system_without_another_process_is_no_fault_of_a_video(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker has ended with the reason, and the server continues."""

    def refuse() -> int:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", refuse)
    handler = signal.getsignal(signal.SIGCHLD)
    client_end, server_end = socket.socketpair()
    children = []
    with client_end, server_end, TemporaryFile() as errors, open(os.devnull) as nothing:
        for _ in range(2):
            report, report_end = Pipe(duplex=False)
            descriptors = [nothing.fileno(), nothing.fileno(), errors.fileno(), report_end.fileno()]
            socket.send_fds(client_end, [FORK], descriptors)
            report_end.close()
            children.append(process.ForkedProcess(None, report))  # type: ignore[arg-type]
        client_end.shutdown(socket.SHUT_WR)
        ForkServer(server_end).run()
        assert [child.wait(5) for child in children] == [1, 1]
        assert not any(child.server_ended for child in children)
        errors.seek(0)
        assert errors.read().count(b"no more processes") == 2
    signal.signal(signal.SIGCHLD, handler)


def test_a_fork_server_that_cannot_start_is_no_fault_of_a_video(
    long_video: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_SERVER", "distinit.nothing")
    monkeypatch.setattr(decode_pool, "ForkServerProcess", process.ForkServerProcess)
    with (
        pool() as decoders,
        pytest.raises(DecoderError, match=r"cannot start: .*distinit\.nothing"),
    ):
        list(decoders.probe([long_video]))


@pytest.mark.slow
def test_a_video_that_kills_twice_fails_and_the_next_is_decoded(long_video: str) -> None:
    rows: Rows = {}
    killed: set[int] = set()
    events = []
    with pool() as decoders:
        jobs = [
            DecodeJob(0, long_video, Sampling(every=1)),
            DecodeJob(1, long_video, Sampling(every=9)),
        ]
        for event in collect(decoders.stream(jobs), rows):
            if event.key == 0 and len(killed) < 2 and decoders.pids[0] not in killed:
                killed.add(decoders.pids[0])
                os.kill(decoders.pids[0], signal.SIGSEGV)
            events.append(event)
    ends = [e for e in events if not isinstance(e, Block)]
    assert ends[0] == Failed(0, "the decoder crashed (SIGSEGV)")
    assert isinstance(ends[1], Done)
    assert rows[1] == expected(long_video, Sampling(every=9))


@pytest.mark.slow
def test_a_hanging_worker_is_killed_after_the_time_out(long_video: str) -> None:
    stopped: set[int] = set()
    rows: Rows = {}
    # A worker must also start within the time-out, which takes long on a busy machine.
    with pool(timeout_s=4) as decoders:
        for event in collect(decoders.stream([DecodeJob(0, long_video, Sampling(every=1))]), rows):
            if len(stopped) < 2 and decoders.pids and decoders.pids[0] not in stopped:
                stopped.add(decoders.pids[0])
                os.kill(decoders.pids[0], signal.SIGSTOP)
            last = event
    assert last == Failed(0, "no frame for 4 s")
    whole = expected(long_video, Sampling(every=1))
    assert rows[0] == whole[: len(rows[0])]
    assert 0 < len(rows[0]) < FRAMES


@pytest.mark.slow
def test_videos_that_fail_while_they_are_rendered_cost_the_worker_nothing(
    tmp_path: Path, long_video: str
) -> None:
    """The worker, which has four slots, still has a free slot for the next video."""
    path = str(tmp_path / "thin.nut")
    write_video(path, [np.zeros((2, 16384, 3), np.uint8)] * 2, codec="ffv1")
    jobs = [DecodeJob(i, path if i < 5 else long_video, Sampling(every=1)) for i in range(6)]
    with pool(views=[View(resize=256, crop=8)], timeout_s=30) as decoders:
        pids, ends = set(), []
        for event in decoders.stream(jobs):
            pids.update(decoders.pids)
            if not isinstance(event, Block):
                ends.append(event)
    assert all(isinstance(end, Failed) and "too long and thin" in end.reason for end in ends[:5])
    assert isinstance(ends[5], Done)
    assert len(pids) == 1


@pytest.mark.slow
def test_a_worker_keeps_to_its_memory(tmp_path: Path, long_video: str) -> None:
    write_video(tmp_path / "big.mp4", [np.zeros((4096, 8192, 3), np.uint8)])
    with pool(memory_gb=0.03) as decoders:
        probes = list(decoders.probe([str(tmp_path / "big.mp4"), long_video]))
    assert "could not be decoded" in str(probes[0].error)
    assert probes[1].frames == FRAMES


@pytest.mark.slow
def test_probing_begins_before_the_views_are_known(tmp_path: Path, long_video: str) -> None:
    short = [video(tmp_path / f"{i}.mp4", n, i) for i, n in enumerate((30, 1, 90))]
    (tmp_path / "noise.mp4").write_bytes(b"x" * 999)
    paths = [*short, str(tmp_path / "noise.mp4"), *short * 20, long_video]
    wanted = [repr(probe(path)) for path in paths]  # nan is not nan
    for processes in (1, 3):
        for killed in (False, True):
            with pool(processes=processes, views=()) as decoders:
                decoders.begin_probing(paths)
                decoders.show(VIEWS)
                if killed:
                    os.kill(decoders.pids[0], signal.SIGKILL)
                assert [repr(p) for p in decoders.probe(paths)] == wanted
                rows: Rows = {}
                jobs = [DecodeJob(0, short[2], Sampling(every=3))]
                assert isinstance([*collect(decoders.stream(jobs), rows)][-1], Done)
                assert rows[0] == expected(short[2], Sampling(every=3))
                decoders.begin_probing(paths)
                assert [p.frames for p in decoders.probe(short)] == [30, 1, 90], (
                    "other paths are probed"
                )
                decoders.begin_probing(paths)
                assert len(decoders.timeline(short[0])) == 30


@pytest.mark.slow
def test_a_stream_may_be_abandoned_and_the_pool_used_again(long_video: str) -> None:
    with pool(processes=2) as decoders:
        for _ in range(3):
            events = decoders.stream(DecodeJob(i, long_video, Sampling(every=1)) for i in range(10))
            next(events)
            with pytest.raises(RuntimeError, match="in use"):
                next(decoders.probe([long_video]))
            events.close()  # type: ignore[attr-defined]
        assert next(decoders.probe([long_video])).frames == FRAMES


def test_workers_end_with_their_parent(long_video: str) -> None:
    script = (
        "import os, sys, signal\n"
        "from distinit.pipeline.video.pool.decode_pool import DecodeJob, DecodePool\n"
        "from distinit.pipeline.video.geometry import View\n"
        "from distinit.pipeline.video.sampling import Sampling\n"
        "pool = DecodePool(processes=2, views=[View(resize=(64, 64))])\n"
        "events = pool.stream(DecodeJob(i, sys.argv[1], Sampling(every=1)) for i in range(9))\n"
        "next(events)\n"
        "print(*pool.pids, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    completed = subprocess.run(
        [sys.executable, "-c", script, long_video], capture_output=True, text=True, check=False
    )
    pids = [int(word) for word in completed.stdout.split()]
    assert len(pids) == 2, completed.stderr
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Whether a process still runs; a zombie that nobody waits for does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "State:\tZ" not in status


def test_workers_do_not_load_torch() -> None:
    script = "import sys, distinit.pipeline.video.pool.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
