"""A decoder ends or stops at every state of the buffers: the frames equal an undisturbed run.

The pool is the real one. Its workers and the clock are simulated, so that thousands of states are
tried and an endless wait is noticed at once.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import View
from distinit.pipeline.video.pool import decode_pool as pool_module
from distinit.pipeline.video.pool.decode_pool import Block, DecodeJob, DecodePool, Done, Failed
from distinit.pipeline.video.pool.messages import SLOTS, Inbox
from distinit.pipeline.video.pool.process import WorkerProcess
from distinit.pipeline.video.sampling import Sampling

TIMEOUT_S = 100.0
END_S = 50 * TIMEOUT_S  # of simulated time, far more than any of these runs takes
CRASH = "crash"
Fault = tuple[int, int, str]
"""(wait, worker, kind): before the pool's n-th wait the n-th worker is killed ("kill") or stops
forever ("stop")."""


class Standstill(AssertionError):
    """The pool waits for a message that will never come."""


@dataclass(eq=False)
class SimulatedWorker:
    """A worker like that of pipeline/video/pool/worker.py, which works when the machine lets it.

    The path of a job is its number of blocks.
    """

    machine: Machine
    ready: bool = True
    unread: int = 0
    waited: float = 0.0
    ended: bool = False
    server_ended: bool = False
    pid: int = 0
    state: str = "runs"
    inbox: list[dict[str, Any]] = field(default_factory=list)
    outbox: list[dict[str, Any]] = field(default_factory=list)
    free_slots: list[int] = field(default_factory=lambda: list(range(SLOTS)))
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def connection(self) -> SimulatedWorker:
        return self

    def send(self, message: dict[str, Any]) -> bool:
        self.waited = 0.0
        if self.state == "dead":
            return False
        self.inbox.append(dict(message))
        return True

    def can_work(self) -> bool:
        return (
            self.state == "runs"
            and bool(self.inbox)
            and (bool(self.free_slots) or self.at_its_end())
        )

    def at_its_end(self) -> bool:
        task = self.inbox[0]
        return bool(task["skip"] >= (len(task["paths"]) if "paths" in task else int(task["path"])))

    def work(self) -> None:
        """Decode one block of the task, or end it."""
        task = self.inbox[0]
        if "paths" in task:
            self.probe(task)
            return
        if self.at_its_end():
            self.outbox.append(
                {"kind": "done", "frames": -1, "clock": "pts", "note": None, "more": False}
            )
            self.inbox.pop(0)
            return
        slot = self.free_slots.pop()
        self.slots[slot] = (task["key"], task["skip"])
        self.outbox.append({"kind": "block", "slot": slot, "index": [task["skip"]], "pts": [0]})
        task["skip"] += 1

    def probe(self, task: dict[str, Any]) -> None:
        """Probe one of several files, or end; one called `crash` ends the worker."""
        if self.at_its_end():
            self.outbox.append({"kind": "end"})
            self.inbox.pop(0)
            return
        path = task["paths"][task["skip"]]
        if path == CRASH:
            self.state = "dead"
            return
        self.outbox.append({"kind": "probed", "probe": {"codec": path, "time_base": [1, 25]}})
        task["skip"] += 1

    def receive(self) -> dict[str, Any] | None:
        if not self.outbox and self.state == "dead":
            raise EOFError
        return self.outbox.pop(0) if self.outbox else None

    def has_sent(self) -> bool:
        return bool(self.outbox) or self.state == "dead"

    def slot(self, slot: int) -> tuple[np.ndarray, ...]:
        return (np.array([self.slots[slot]]),)

    def free(self, slot: int) -> None:
        self.unread -= 1
        self.free_slots.append(slot)

    def all_slots_unread(self) -> bool:
        return self.unread >= SLOTS

    def end_reason(self) -> str:
        return "killed"

    def kill(self) -> None:
        self.state = "dead"


class SimulatedServer:
    """Replaces the process that workers are forked from."""

    ended = False

    def close(self) -> None:
        return


class Machine:
    """Lets workers work in a given order, and harms them. Replaces `wait` and the clock."""

    def __init__(self, order: str, faults: Iterable[Fault], seed: int = 0) -> None:
        self.order, self.faults = order, list(faults)
        self.random = random.Random(seed)
        self.now, self.waits = 0.0, 0
        self.pool: DecodePool | None = None

    def monotonic(self) -> float:
        return self.now

    def wait(self, connections: list[SimulatedWorker], timeout: float) -> list[SimulatedWorker]:
        self.waits += 1
        workers: dict[int, Any] = self.pool._workers if self.pool is not None else {}  # type: ignore[assignment]
        for wait, worker_number, kind in self.faults:
            if wait == self.waits and worker_number in workers:
                workers[worker_number].state = {"kill": "dead", "stop": "stopped"}[kind]
        active = [worker for _, worker in sorted(workers.items()) if worker.can_work()]
        if active:
            if self.order == "first":
                active = active[:1]
            elif self.order == "last":
                active = active[-1:]
            elif self.order == "any":
                active = [self.random.choice(active)]
            for worker in active:
                worker.work()
                while self.order == "far" and worker.can_work():
                    worker.work()
        senders = [worker for worker in connections if worker.has_sent()]
        if not senders:
            self.now += timeout
            if self.now > END_S:
                raise Standstill
        return senders


def run(
    blocks: list[int], processes: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """All events: (key, row) of each block, ("done", key) or ("failed", key)."""
    events: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "ForkServerProcess", SimulatedServer)
        patch.setattr(pool_module, "WorkerProcess", lambda *_: SimulatedWorker(machine))
        patch.setattr(pool_module, "wait", machine.wait)
        patch.setattr(pool_module.time, "monotonic", machine.monotonic)
        machine.pool = DecodePool(
            processes=processes, views=[View(resize=(8, 8))], timeout_s=TIMEOUT_S
        )
        jobs = (DecodeJob(key, str(n), Sampling(every=1)) for key, n in enumerate(blocks))
        for event in machine.pool.stream(jobs):
            if isinstance(event, Block):
                events.append(tuple(int(x) for x in event.images[0][0]))
            else:
                events.append(("done" if isinstance(event, Done) else "failed", event.key))
    return events


@settings(deadline=None)
@given(
    crashing=st.lists(st.sampled_from([False, False, False, True]), max_size=40),
    processes=st.integers(1, 3),
    order=st.sampled_from(["any", "first", "last", "all"]),
    killed=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 2), st.just("kill")), max_size=1),
    first=st.sampled_from([1, 3, 256]),
    begun=st.booleans(),
)
def test_files_that_crash_a_worker_cost_the_others_nothing(
    crashing: list[bool],
    processes: int,
    order: str,
    killed: list[Fault],
    first: int,
    begun: bool,
) -> None:
    paths = [CRASH if crash else str(i) for i, crash in enumerate(crashing)]
    machine = Machine(order, killed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "ForkServerProcess", SimulatedServer)
        patch.setattr(pool_module, "WorkerProcess", lambda *_: SimulatedWorker(machine))
        patch.setattr(pool_module, "wait", machine.wait)
        patch.setattr(pool_module.time, "monotonic", machine.monotonic)
        patch.setattr(pool_module, "_FIRST_PROBES", first)
        patch.setattr(pool_module, "_PROBES", 4)
        machine.pool = DecodePool(processes=processes, timeout_s=TIMEOUT_S)
        if begun:
            machine.pool.begin_probing(paths)
        probes = list(machine.pool.probe(paths))
    assert [p.codec for p in probes] == ["" if path == CRASH else path for path in paths]
    assert [p.error for p in probes] == ["killed" if path == CRASH else None for path in paths]


def undisturbed(blocks: list[int]) -> list[Any]:
    return [
        event
        for key, n in enumerate(blocks)
        for event in [*((key, row) for row in range(n)), ("done", key)]
    ]


# Videos shorter and longer than the slots of a worker hold, in orders that fill the slots behind a
# long video.
CORPORA = [
    [1, 9, 1, 1, 1, 1],
    [9, 9, 9],
    [2, 0, 5, 1, 4, 4, 7],
    [6, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [5, 3],
]


@pytest.mark.parametrize("order", ["first", "last", "all", "far"])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_one_fault_at_every_moment_changes_nothing(
    order: str, processes: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tried = 0
    for blocks in CORPORA:
        quiet = Machine(order, [])
        assert run(blocks, processes, quiet, monkeypatch) == undisturbed(blocks)
        for wait in range(1, quiet.waits + 1):
            for worker_number in range(processes):
                machine = Machine(order, [(wait, worker_number, kind)])
                assert run(blocks, processes, machine, monkeypatch) == undisturbed(blocks), (
                    blocks,
                    wait,
                    worker_number,
                )
                num_tried += 1
    assert num_tried >= 20


@settings(deadline=None)
@given(
    blocks=st.lists(st.integers(0, 10), min_size=1, max_size=9),
    processes=st.integers(1, 3),
    order=st.sampled_from(["any", "first", "last", "all", "far"]),
    faults=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 2), st.sampled_from(["kill", "stop"])),
        max_size=6,
    ),
    seed=st.integers(0, 9),
)
def test_many_faults_cost_at_most_the_videos_that_met_two(
    blocks: list[int], processes: int, order: str, faults: list[Fault], seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        events = run(blocks, processes, Machine(order, faults, seed), patch)
    ends = [event for event in events if event[0] in ("done", "failed")]
    assert [key for _, key in ends] == list(range(len(blocks)))
    failed = {key for how, key in ends if how == "failed"}
    assert len(failed) <= len(faults) // 2
    for key, n in enumerate(blocks):
        rows = [event for event in events if event[0] == key]
        assert rows == [(key, row) for row in range(n)][: len(rows)]
        assert key in failed or len(rows) == n


def test_a_trickle_of_frames_does_not_hold_a_decoder_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rare frame is not silence; one per tenth of a time-out is enough, also for a long video."""

    class Slow(Machine):
        def __init__(self, every_s: float) -> None:
            super().__init__("all", [])
            self.every_s, self.last = every_s, 0.0

        def wait(self, connections: list[SimulatedWorker], timeout: float) -> list[SimulatedWorker]:
            if self.now - self.last >= self.every_s:
                self.last = self.now
                return super().wait(connections, timeout)
            self.now += timeout
            return []

    for every_s, expected in [(TIMEOUT_S * 0.8, "failed"), (TIMEOUT_S * 0.05, "done")]:
        machine = Slow(every_s)
        events = run([600], 1, machine, monkeypatch)
        assert events[-1][0] == expected
        assert machine.now < 40 * TIMEOUT_S


# The real workers


def video(path: Path, frames: int, seed: int) -> str:
    scene = (
        np.random.default_rng(seed)
        .integers(0, 255, (6, 8, 3))
        .repeat(8, 0)
        .repeat(8, 1)
        .astype(np.uint8)
    )
    write_video(path, (np.roll(scene, (t, 2 * t), (0, 1)) for t in range(frames)), gop=50)
    return os.fspath(path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_decoder_of_the_first_video_falls_while_the_other_has_filled_its_slots(
    tmp_path: Path, how: int
) -> None:
    """The second worker has finished all later tasks, but cannot take the second try."""
    paths = [
        video(tmp_path / f"{i}.mp4", frames, i) for i, frames in enumerate((3, 600, 3, 3, 3, 3))
    ]

    def rows(harm: bool) -> list[tuple[int, int, bytes]]:
        decoded = []
        jobs = (DecodeJob(key, path, Sampling(every=1)) for key, path in enumerate(paths))
        timeout_s = 5 if how == signal.SIGSTOP else 100
        views = [View(resize=(120, 160))]
        with DecodePool(processes=2, views=views, timeout_s=timeout_s) as decoders:
            for event in decoders.stream(jobs):
                assert not isinstance(event, Failed)
                if isinstance(event, Block):
                    decoded += [
                        (event.key, int(i), image.tobytes())
                        for i, image in zip(event.index, event.images[0], strict=True)
                    ]
                if harm and event.key == 1:
                    harm = False
                    time.sleep(1.0)  # the other worker fills its slots
                    (number,) = [
                        worker_number
                        for worker_number, task in decoders._tasks.items()
                        if task.message["key"] == 1
                    ]
                    os.kill(decoders.pids[number], how)
        return decoded

    assert rows(harm=True) == rows(harm=False)


@pytest.mark.parametrize("head", [(17).to_bytes(4, "big"), b"\xff" * 4 + (17).to_bytes(8, "big")])
def test_a_worker_that_stops_in_the_middle_of_a_message_is_not_waited_for(head: bytes) -> None:
    parent_end, worker_end = socket.socketpair()
    worker = WorkerProcess.__new__(WorkerProcess)
    worker.connection, worker._inbox, worker.waited = Connection(parent_end.detach()), Inbox(), 0.0
    data = head + b'{"kind": "alive"}'
    for cut in range(len(data)):
        assert worker.receive() is None
        worker_end.sendall(data[cut : cut + 1])
    assert worker.receive() == {"kind": "alive"}
    assert worker.receive() is None
    worker_end.sendall(data[:5])
    worker_end.close()
    with pytest.raises(EOFError):
        worker.receive()
