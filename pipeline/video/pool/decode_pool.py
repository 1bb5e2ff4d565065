"""Decode many videos in worker processes, in order, ahead of the consumer of the frames.

If a worker crashes or stops answering, its video gets a second try in a fresh worker. If that fails
too, the video fails with a reason, and the run continues. If decoding works for no video, a
DecoderError ends the run, and no video gets a reason. Each worker has four slots of shared memory;
a worker waits while all its slots are unread, which limits how much is decoded ahead.

No deadlock is possible: a worker receives tasks in the order in which they are read, and a second
try goes to a worker without other tasks. All unread blocks of the worker of the first task
therefore belong to that task. Either there is a block to read, or the worker has a free slot and
its silence is timed.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import wait
from typing import Any, Literal, Self

import numpy as np

from ...common.errors import DecoderError, VideoError, limit_met
from ..geometry import View
from ..packets import Timeline
from ..probe import Probe
from ..sampling import Sampling
from .messages import Layout
from .process import ForkServerProcess, WorkerProcess

log = logging.getLogger(__name__)

_ATTEMPTS = 2
_MAX_AHEAD = 4  # finished tasks per worker that may be unread
_PROBES = 16  # files per message to a worker
# Files per message before the first `probe`: their answers fit into the buffer of a socket.
_FIRST_PROBES = 256
# A task fails if the pool waited for it longer than this many time-outs, unless it gave a sign of
# life once per time-out / this number on average.
_SLOW = 10


@dataclass(frozen=True)
class DecodeJob:
    """Sampled frames of one video with first ≤ index < end, at most `max_rows` of them."""

    key: int
    path: str
    sampling: Sampling
    first: int = 0
    end: int | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class Block:
    """n frames of job `key`: index and pts int64 [n], images uint8 [n, h, w, 3] per view.

    The images are shared memory, valid until the next item is requested.
    """

    key: int
    index: np.ndarray
    pts: np.ndarray
    images: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Done:
    """Job `key` is complete.

    frames: Number of frames in the file. note: A description of its damage. more: Whether frames
        were left when max_rows was reached.
    """

    key: int
    frames: int
    clock: Literal["pts", "counted"]
    note: str | None
    more: bool


@dataclass(frozen=True)
class Failed:
    """Job `key` gives no further frames, for this reason."""

    key: int
    reason: str


@dataclass
class _Task:
    """One message to a worker, and its answers so far.

    rows: Number of received frames, or of answers if the message has several paths. signs: Signs of
        life in this try. waited: Seconds in this try.
    """

    message: dict[str, Any]
    answers: deque[tuple[dict[str, Any], WorkerProcess | None]] = field(default_factory=deque)
    finished: bool = False
    rows: int = 0
    signs: int = 0
    waited: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The file that the worker reads."""
        if "paths" in self.message:
            paths = self.message["paths"]
            return str(paths[min(self.rows, len(paths) - 1)])
        return str(self.message.get("path", self.message.get("source")))

    def next_path(self) -> None:
        """Record the answer of a path, and count time and tries of the next path from zero."""
        if "paths" in self.message:
            self.rows, self.signs, self.waited = self.rows + 1, 0, 0.0
            self.failures.clear()


_StartedTasks = tuple[deque[_Task], Iterator[dict[str, Any]]]
"""Tasks that are assigned to workers or finished, and the messages that follow."""


class DecodePool:
    """A pool of `processes` workers that probe and decode. Use as a context manager.

    Only one call can run at a time.

    Args:
        processes: Number of workers.
        views: Views of fixed size, rendered of every frame; see also `show`.
        memory_gb: Address space of a worker.
        timeout_s: Seconds without a packet, a frame or an answer after which a worker is killed. A
            worker that is waited for ten times as long is killed if these come less often than
            every tenth of it.
        ahead: Finished tasks per worker that may be unread because an earlier task takes longer.
    """

    def __init__(
        self,
        *,
        processes: int,
        views: Sequence[View] = (),
        memory_gb: float = 4,
        timeout_s: float = 120,
        ahead: int = _MAX_AHEAD,
    ) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        self._layout = Layout.for_views(tuple(views))
        self._views = tuple(views)
        self._memory_gb, self._timeout_s = memory_gb, timeout_s
        self._ahead = ahead
        self._server: ForkServerProcess | None = None
        # Ends of fork servers since the last answer, counted per worker.
        self._server_ends = 0
        # By number of the worker, below `processes`.
        self._workers: dict[int, WorkerProcess] = {}
        self._tasks: dict[int, _Task] = {}
        self._processes = self._used = processes
        self._busy = False
        # The paths of `begin_probing`, and its tasks.
        self._early_probes: tuple[list[str], _StartedTasks] | None = None
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and their fork server."""
        if self._owner == os.getpid():
            for number in list(self._workers):
                self._drop(number)
            if self._server is not None:
                self._server.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that were started, by number of the worker."""
        pids = (worker.pid for _, worker in sorted(self._workers.items()))
        return [pid for pid in pids if pid is not None]

    def show(self, views: Sequence[View]) -> None:
        """Render these views of every frame from now on. Not while a stream is being read."""
        self._views, self._layout = tuple(views), Layout.for_views(tuple(views))
        for worker in self._workers.values():
            worker.show(self._layout, self._views)

    def use_at_most(self, processes: int) -> None:
        """Assign tasks only to this many workers from now on."""
        self._used = min(processes, self._processes)

    def begin_probing(self, paths: Sequence[str]) -> None:
        """Start to probe; the first `probe` yields the answers if its paths are the same.

        The workers need nothing from the caller until each has probed its share of the paths, at
        most `_FIRST_PROBES`.
        """
        share = min(_FIRST_PROBES, -(-len(paths) // self._used))
        self._early_probes = list(paths), self._start(self._probes(paths, max(1, share)))

    def probe(self, paths: Sequence[str]) -> Iterator[Probe]:
        """Yield a Probe per path, in order; after a crash or a hang, a Probe with an error."""
        started_tasks = None
        if self._early_probes is not None and self._early_probes[0] == list(paths):
            started_tasks, self._early_probes = self._early_probes[1], None
        share = min(_PROBES, -(-len(paths) // self._used))
        for _, answer, _ in self._run(self._probes(paths, share), started_tasks):
            if answer["kind"] == "failed":
                yield Probe(error=answer["reason"])
            else:
                fields = answer["probe"]
                yield Probe(**{**fields, "time_base": tuple(fields["time_base"])})

    def _probes(self, paths: Sequence[str], share: int) -> Iterator[dict[str, Any]]:
        """Yield messages of `share` paths per worker, then smaller ones to balance the load."""
        start, num_messages = 0, 0
        while start < len(paths):
            end = start + (share if num_messages < self._used else min(share, _PROBES))
            yield {"kind": "probes", "paths": list(paths[start:end]), "skip": 0}
            start, num_messages = end, num_messages + 1

    def timeline(self, path: str) -> Timeline:
        """Return all frames of one video in order; raise VideoError if it cannot be read."""
        (answer,) = self.timelines([path])
        if isinstance(answer, Failed):
            raise VideoError(answer.reason)
        return answer[0]

    def timelines(
        self, paths: Iterable[str]
    ) -> Iterator[tuple[Timeline, tuple[int, int]] | Failed]:
        """Yield per video, in order, its timeline and (width, height) on display, or Failed."""
        messages = (
            {"kind": "timeline", "path": path, "key": key} for key, path in enumerate(paths)
        )
        for message, answer, _ in self._run(messages):
            if answer["kind"] == "failed":
                yield Failed(message["key"], answer["reason"])
                continue
            pts = np.array(answer["pts"], np.int64)
            key = np.zeros(len(pts), bool)
            key[answer["key"]] = True
            base = Fraction(*answer["time_base"])
            width, height = answer["size"]
            yield Timeline(pts, key, base, answer["reliable"], answer["clock"]), (width, height)

    def copies(self, jobs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any] | Failed]:
        """Yield per job, in order, the row of the new copy, or Failed.

        The worker runs `make_copy.copy_job`.
        """
        messages = ({**job, "kind": "copy", "key": key} for key, job in enumerate(jobs))
        for message, answer, _ in self._run(messages):
            yield (
                Failed(message["key"], answer["reason"])
                if answer["kind"] == "failed"
                else answer["row"]
            )

    def stream(self, jobs: Iterable[DecodeJob]) -> Generator[Block | Done | Failed, None, None]:
        """Yield per job, in order, its Blocks, then Done or Failed.

        Jobs are read when workers become free.
        """
        messages = (
            {
                "kind": "decode",
                "key": job.key,
                "path": job.path,
                "sampling": job.sampling.model_dump(),
                "first": job.first,
                "end": job.end,
                "max_rows": job.max_rows,
                "skip": 0,
            }
            for job in jobs
        )
        for message, answer, worker in self._run(messages):
            key = message["key"]
            if answer["kind"] == "done":
                yield Done(key, answer["frames"], answer["clock"], answer["note"], answer["more"])
            elif answer["kind"] == "failed":
                yield Failed(key, answer["reason"])
            elif worker is not None:
                n = len(answer["index"])
                images = tuple(a[:n] for a in worker.slot(answer["slot"]))
                index, pts = np.array(answer["index"], np.int64), np.array(answer["pts"], np.int64)
                yield Block(key, index, pts, images)
                worker.free(answer["slot"])

    # The engine of all these calls

    def _start(self, messages: Iterator[dict[str, Any]]) -> _StartedTasks:
        """Assign the first messages to the workers."""
        if self._early_probes is not None:
            self._early_probes = None
            self._stop()
        if self._busy:
            raise RuntimeError(
                "this pool is in use: finish or close the iterator of the earlier call first"
            )
        self._busy = True
        queue: deque[_Task] = deque()
        source = iter(messages)
        self._assign(queue, source)
        return queue, source

    def _run(
        self, messages: Iterator[dict[str, Any]], started_tasks: _StartedTasks | None = None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], WorkerProcess | None]]:
        """Yield (message, answer, worker) in the order of the messages, all answers of each."""
        queue, source = started_tasks or self._start(messages)
        try:
            while True:
                exhausted = self._assign(queue, source)
                if not queue:
                    if exhausted:
                        return
                    continue
                head = queue[0]
                while not head.answers and not head.finished:
                    self._receive()
                    self._assign(queue, source)
                if head.answers:
                    answer, worker = head.answers.popleft()
                    yield head.message, answer, worker
                else:
                    queue.popleft()
        finally:
            self._stop()

    def _stop(self) -> None:
        """End the workers that have an abandoned task or unread blocks."""
        for number, worker in list(self._workers.items()):
            if number in self._tasks or worker.unread:
                self._drop(number)
        self._busy = False

    def _assign(self, queue: deque[_Task], source: Iterator[dict[str, Any]]) -> bool:
        """Assign messages to idle workers; return True when no message is left."""
        for number in range(self._used):
            if number in self._tasks:
                continue
            if len(queue) >= self._ahead * self._processes:
                return False
            message = next(source, None)
            if message is None:
                return True
            task = _Task(message)
            queue.append(task)
            self._send_task(number, task)
        return False

    def _send_task(self, number: int, task: _Task) -> None:
        worker = self._workers.get(number)
        if worker is None:
            try:
                if self._server is None or self._server.ended:
                    self._server = ForkServerProcess()
                worker = WorkerProcess(self._server, self._layout, self._views, self._memory_gb)
            # A limit of descriptors, processes or shared memory.
            except OSError as error:
                reason = limit_met(error) or error.strerror or error
                raise DecoderError(f"a decoding process cannot be started: {reason}") from error
            self._workers[number] = worker
        self._tasks[number] = task
        if not worker.send(task.message):
            self._handle_end(number)

    def _receive(self) -> None:
        """Receive the messages of workers; kill workers that send nothing or too little."""
        listening = {number: self._workers[number] for number in self._tasks}
        start = time.monotonic()
        ready = wait(
            [worker.connection for worker in listening.values()], timeout=min(self._timeout_s, 1.0)
        )
        seconds = time.monotonic() - start
        for number, worker in listening.items():
            if worker.connection in ready:
                self._receive_from(number)
        for number, worker in listening.items():
            # Time in which the pool did not receive, or in which all slots were unread, does not
            # count as silence of the worker.
            if number not in self._tasks or self._workers.get(number) is not worker:
                continue
            if worker.all_slots_unread():
                worker.waited = 0.0
                continue
            worker.waited += seconds
            task = self._tasks[number]
            task.waited += seconds
            slow = (
                task.waited > _SLOW * self._timeout_s
                and task.waited > task.signs * self._timeout_s / _SLOW
            )
            if worker.waited > self._timeout_s and not worker.has_sent():
                self._handle_failure(number, f"no frame for {self._timeout_s:g} s")
            elif slow:
                self._handle_failure(
                    number, f"fewer than one frame in {self._timeout_s / _SLOW:g} s"
                )

    def _receive_from(self, number: int) -> None:
        """Receive all messages that one worker has sent."""
        worker, task = self._workers[number], self._tasks[number]
        while number in self._tasks:
            try:
                answer = worker.receive()
            except (EOFError, OSError, ValueError):
                self._handle_end(number)
                return
            if answer is None:
                return
            worker.waited = 0.0
            task.signs += 1
            if answer["kind"] not in ("ready", "alive"):
                self._server_ends = 0
            if answer["kind"] == "block":
                task.rows += len(answer["index"])
                worker.unread += 1
                task.answers.append((answer, worker))
            elif answer["kind"] == "ready":
                worker.ready = True
            elif answer["kind"] == "fault":
                log.error("%s: %s", task.path, answer["trace"])
                raise DecoderError(f"decoding fails for every video: {answer['what']}")
            elif answer["kind"] == "end":
                task.finished = True
                del self._tasks[number]
            elif answer["kind"] != "alive":
                if "trace" in answer:
                    log.error("%s: %s", task.path, answer["trace"])
                task.answers.append((answer, None))
                if "paths" in task.message:
                    task.next_path()
                else:
                    task.finished = True
                    del self._tasks[number]

    def _handle_end(self, number: int) -> None:
        worker = self._workers[number]
        reason = worker.end_reason()
        if not worker.server_ended:
            self._handle_failure(number, reason)
            return
        # The end of a server is not the fault of a video, unless servers end one after another
        # without an answer in between.
        self._server_ends += 1
        if self._server_ends > _ATTEMPTS * self._processes:
            raise DecoderError("the process that decoding processes are forked from was killed")
        task = self._tasks.pop(number)
        self._drop(number)
        self._retry(number, task)

    def _handle_failure(self, number: int, reason: str) -> None:
        """Try the task once more in a fresh worker, then give it up.

        If a worker never began, its video is not at fault. An existing worker cannot take the task,
        because all its slots may hold blocks that are read after it.
        """
        worker, task = self._workers[number], self._tasks.pop(number)
        self._drop(number)
        task.failures.append(reason)
        if not worker.ready and (worker.ended or len(task.failures) == _ATTEMPTS):
            raise DecoderError(f"a decoding process cannot start: {reason}")
        if len(task.failures) == _ATTEMPTS:
            task.answers.append(({"kind": "failed", "reason": reason}, None))
            task.next_path()
        if "paths" in task.message or len(task.failures) < _ATTEMPTS:
            self._retry(number, task)
        else:
            task.finished = True

    def _retry(self, number: int, task: _Task) -> None:
        task.message = {**task.message, "skip": task.rows}
        task.signs, task.waited = 0, 0.0
        self._send_task(number, task)

    def _drop(self, number: int) -> None:
        self._tasks.pop(number, None)
        if (worker := self._workers.pop(number, None)) is not None:
            worker.kill()
