"""Decode many videos in worker processes, in order, ahead of the consumer of the frames.

A worker that crashes or falls silent costs its video a second try in a fresh worker and, if that
fails too, a reason; never the run. Where decoding does not work at all, whatever the video, a
DecoderError ends the run, and no video is given a reason. Each worker has four slots of shared
memory; a worker whose slots are all unread waits, which bounds what is decoded ahead.

Why no one waits for ever: a worker is given tasks in the order in which they are read, and a
second try goes to a worker that was given none. So all unread blocks of the worker that works on
the first task are of that task: either there is a block to read, or the worker has a free slot and
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
_AHEAD = 4  # tasks that may be finished and unread, per worker
_PROBES = 16  # files per message to a worker
# The same before the first `probe`: the answers of that many fit the buffer of a socket.
_FIRST_PROBES = 256
# A task that was waited for longer than so many time-outs fails, unless it gave a sign of life once
# per time-out / this number on average.
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

    The images are shared memory: valid until the next item is asked for.
    """

    key: int
    index: np.ndarray
    pts: np.ndarray
    images: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Done:
    """Job `key` is complete.

    `frames` in the file; `note`: what was damaged; `more`: max_rows was reached with frames left.
    """

    key: int
    frames: int
    clock: Literal["pts", "counted"]
    note: str | None
    more: bool


@dataclass(frozen=True)
class Failed:
    """Job `key` gave no further frames, for this reason."""

    key: int
    reason: str


@dataclass
class _Task:
    """One message to a worker, and what came back so far.

    rows: frames that came, or answers where the message has several paths.
    """

    message: dict[str, Any]
    answers: deque[tuple[dict[str, Any], WorkerProcess | None]] = field(default_factory=deque)
    finished: bool = False
    rows: int = 0
    signs: int = 0  # of life, in this try
    waited: float = 0.0  # seconds in this try
    failures: list[str] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The file at which the worker is."""
        if "paths" in self.message:
            paths = self.message["paths"]
            return str(paths[min(self.rows, len(paths) - 1)])
        return str(self.message.get("path", self.message.get("source")))

    def next_path(self) -> None:
        """Note that the answer of a path came: the next one has its own time and tries."""
        if "paths" in self.message:
            self.rows, self.signs, self.waited = self.rows + 1, 0, 0.0
            self.failures.clear()


_Started = tuple[deque[_Task], Iterator[dict[str, Any]]]
"""Tasks that were given to workers or are done, and the messages to come."""


class DecodePool:
    """`processes` workers that probe and decode. Use as a context manager; one call at a time.

    views: fixed size, rendered of every frame; see also `show`. memory_gb: address space of a
    worker. timeout_s: how long a worker may go without a packet, a frame or an answer before it is
    killed; one that is waited for ten times as long is killed if these come less often than every
    tenth of it. ahead: tasks a worker may have finished that nobody has read, because one before
    them takes longer.
    """

    def __init__(
        self,
        *,
        processes: int,
        views: Sequence[View] = (),
        memory_gb: float = 4,
        timeout_s: float = 120,
        ahead: int = _AHEAD,
    ) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        self._layout = Layout.of(tuple(views))
        self._views = tuple(views)
        self._memory_gb, self._timeout_s = memory_gb, timeout_s
        self._ahead = ahead
        self._server: ForkServerProcess | None = None
        self._servers_ended = 0  # counted per worker, since the last answer
        self._workers: dict[int, WorkerProcess] = {}  # by place, below `processes`
        self._processes = self._used = processes
        self._working: dict[int, _Task] = {}  # by place of the worker
        self._busy = False
        self._begun: tuple[list[str], _Started] | None = None  # probing, and of which paths
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and their fork server."""
        if self._owner == os.getpid():
            for place in list(self._workers):
                self._drop(place)
            if self._server is not None:
                self._server.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that were started, by place."""
        pids = (worker.pid for _, worker in sorted(self._workers.items()))
        return [pid for pid in pids if pid is not None]

    def show(self, views: Sequence[View]) -> None:
        """Render these views of every frame from now on. Not while a stream is being read."""
        self._views, self._layout = tuple(views), Layout.of(tuple(views))
        for worker in self._workers.values():
            worker.show(self._layout, self._views)

    def use_at_most(self, processes: int) -> None:
        """Give tasks to so many of the workers alone, from now on."""
        self._used = min(processes, self._processes)

    def begin_probing(self, paths: Sequence[str]) -> None:
        """Start to probe; the first `probe` takes the answers, if its paths are the same.

        The workers need nothing from the caller until each has probed its share of them, or
        `_FIRST_PROBES`.
        """
        share = min(_FIRST_PROBES, -(-len(paths) // self._used))
        self._begun = list(paths), self._start(self._probes(paths, max(1, share)))

    def probe(self, paths: Sequence[str]) -> Iterator[Probe]:
        """Yield a Probe of each path, in order; after a crash or a hang, a Probe with an error."""
        begun = None
        if self._begun is not None and self._begun[0] == list(paths):
            begun, self._begun = self._begun[1], None
        share = min(_PROBES, -(-len(paths) // self._used))
        for _, answer, _ in self._run(self._probes(paths, share), begun):
            if answer["kind"] == "failed":
                yield Probe(error=answer["reason"])
            else:
                fields = answer["probe"]
                yield Probe(**{**fields, "time_base": tuple(fields["time_base"])})

    def _probes(self, paths: Sequence[str], share: int) -> Iterator[dict[str, Any]]:
        """Yield messages of `share` paths per worker, then of few, so that all end together."""
        at, message = 0, 0
        while at < len(paths):
            end = at + (share if message < self._used else min(share, _PROBES))
            yield {"kind": "probes", "paths": list(paths[at:end]), "skip": 0}
            at, message = end, message + 1

    def timeline(self, path: str) -> Timeline:
        """Return all frames of one video in order; raises VideoError."""
        (answer,) = self.timelines([path])
        if isinstance(answer, Failed):
            raise VideoError(answer.reason)
        return answer[0]

    def timelines(
        self, paths: Iterable[str]
    ) -> Iterator[tuple[Timeline, tuple[int, int]] | Failed]:
        """Yield for each video, in order, all frames and (width, height) on display, or Failed."""
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
        """Yield for each job, in order, the row of the copy that was made, or Failed.

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
        """Yield for each job, in order, its Blocks, then Done or Failed.

        Jobs are read as workers get free.
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

    # One engine for all of them

    def _start(self, messages: Iterator[dict[str, Any]]) -> _Started:
        """Give the first messages to the workers."""
        if self._begun is not None:
            self._begun = None
            self._leave()
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
        self, messages: Iterator[dict[str, Any]], begun: _Started | None = None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], WorkerProcess | None]]:
        """Yield (message, answer, worker) in the order of the messages; a last answer ends each."""
        queue, source = begun or self._start(messages)
        try:
            while True:
                exhausted = self._assign(queue, source)
                if not queue:
                    if exhausted:
                        return
                    continue
                head = queue[0]
                while not head.answers and not head.finished:
                    self._listen()
                    self._assign(queue, source)
                if head.answers:
                    answer, worker = head.answers.popleft()
                    yield head.message, answer, worker
                else:
                    queue.popleft()
        finally:
            self._leave()

    def _leave(self) -> None:
        """End the workers with something that nobody wants any more."""
        for place, worker in list(self._workers.items()):
            if place in self._working or worker.unread:
                self._drop(place)
        self._busy = False

    def _assign(self, queue: deque[_Task], source: Iterator[dict[str, Any]]) -> bool:
        """Give work to idle workers; True when there is no more."""
        for place in range(self._used):
            if place in self._working:
                continue
            if len(queue) >= self._ahead * self._processes:
                return False
            message = next(source, None)
            if message is None:
                return True
            task = _Task(message)
            queue.append(task)
            self._give(place, task)
        return False

    def _give(self, place: int, task: _Task) -> None:
        worker = self._workers.get(place)
        if worker is None:
            try:
                if self._server is None or self._server.ended:
                    self._server = ForkServerProcess()
                worker = WorkerProcess(self._server, self._layout, self._views, self._memory_gb)
            except OSError as error:  # descriptors, processes, shared memory
                reason = limit_met(error) or error.strerror or error
                raise DecoderError(f"a decoding process cannot be started: {reason}") from error
            self._workers[place] = worker
        self._working[place] = task
        if not worker.send(task.message):
            self._died(place)

    def _listen(self) -> None:
        """Receive what workers send; kill those that were silent, or nearly so, for too long."""
        listening = {place: self._workers[place] for place in self._working}
        began = time.monotonic()
        ready = wait(
            [worker.connection for worker in listening.values()], timeout=min(self._timeout_s, 1.0)
        )
        seconds = time.monotonic() - began
        for place, worker in listening.items():
            if worker.connection in ready:
                self._take(place)
        for place, worker in listening.items():
            # Time in which nobody received, or in which all slots were unread, is not the worker's
            # silence.
            if place not in self._working or self._workers.get(place) is not worker:
                continue
            if worker.all_slots_unread():
                worker.listened = 0.0
                continue
            worker.listened += seconds
            task = self._working[place]
            task.waited += seconds
            slow = (
                task.waited > _SLOW * self._timeout_s
                and task.waited > task.signs * self._timeout_s / _SLOW
            )
            if worker.listened > self._timeout_s and not worker.has_sent():
                self._failed(place, f"no frame for {self._timeout_s:g} s")
            elif slow:
                self._failed(place, f"fewer than one frame in {self._timeout_s / _SLOW:g} s")

    def _take(self, place: int) -> None:
        """Receive all messages that one worker has sent."""
        worker, task = self._workers[place], self._working[place]
        while place in self._working:
            try:
                answer = worker.receive()
            except (EOFError, OSError, ValueError):
                self._died(place)
                return
            if answer is None:
                return
            worker.listened = 0.0
            task.signs += 1
            if answer["kind"] not in ("ready", "alive"):
                self._servers_ended = 0
            if answer["kind"] == "block":
                task.rows += len(answer["index"])
                worker.unread += 1
                task.answers.append((answer, worker))
            elif answer["kind"] == "ready":
                worker.ready = True
            elif answer["kind"] == "fault":
                log.error("%s: %s", task.path, answer["trace"])
                raise DecoderError(
                    f"decoding does not work here, whatever the video: {answer['what']}"
                )
            elif answer["kind"] == "end":
                task.finished = True
                del self._working[place]
            elif answer["kind"] != "alive":
                if "trace" in answer:
                    log.error("%s: %s", task.path, answer["trace"])
                task.answers.append((answer, None))
                if "paths" in task.message:
                    task.next_path()
                else:
                    task.finished = True
                    del self._working[place]

    def _died(self, place: int) -> None:
        worker = self._workers[place]
        why = worker.last_words()
        if not worker.server_ended:
            self._failed(place, why)
            return
        # No video is to blame, unless servers end one after another with nothing done in between.
        self._servers_ended += 1
        if self._servers_ended > _ATTEMPTS * self._processes:
            raise DecoderError("the process that decoding processes are forked from was killed")
        task = self._working.pop(place)
        self._drop(place)
        self._retry(place, task)

    def _failed(self, place: int, why: str) -> None:
        """Try the task once more in a fresh worker, then give it up.

        A worker that never began has no video to blame. No existing worker will do: its slots may
        all hold blocks that are read after this task.
        """
        worker, task = self._workers[place], self._working.pop(place)
        self._drop(place)
        task.failures.append(why)
        if not worker.ready and (worker.ended or len(task.failures) == _ATTEMPTS):
            raise DecoderError(f"a decoding process cannot start: {why}")
        if len(task.failures) == _ATTEMPTS:
            task.answers.append(({"kind": "failed", "reason": why}, None))
            task.next_path()
        if "paths" in task.message or len(task.failures) < _ATTEMPTS:
            self._retry(place, task)
        else:
            task.finished = True

    def _retry(self, place: int, task: _Task) -> None:
        task.message = {**task.message, "skip": task.rows}
        task.signs, task.waited = 0, 0.0
        self._give(place, task)

    def _drop(self, place: int) -> None:
        self._working.pop(place, None)
        if (worker := self._workers.pop(place, None)) is not None:
            worker.kill()
