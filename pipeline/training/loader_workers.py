"""The processes of a loader: how they start, why no batch comes from them, and their end."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch

from ..common.errors import TrainingError, WorkerDied, in_one_line
from ..common.limits import limit_met
from ..common.processes import Owner, end_with
from ..common.worker_status import WorkerStatus, begin
from ..corpus.sources import escape_path

GRACE_S = 5.0  # between the first sign of a worker's death and what the system knows of it
T = TypeVar("T")
HINT = "0 workers (loop.workers, test.workers) read in the main process"


class Ended(Exception):
    """The workers had to be ended because of one video."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason


class Stuck(Ended):
    """A worker has been reading a video for too long."""


class Crashed(Ended):
    """A worker died reading a video."""


class LoaderWorkers:
    """The processes of one iterator of a DataLoader, and a thread that watches for the first that
    dies.

    A worker that is killed in the middle of a write leaves half a message behind, and the lock of
    the pipe. Whoever reads the rest would wait for ever, and torch looks after its workers between
    two messages only. So the thread ends all of them and the pipe if nobody has done so `GRACE_S`
    after the death.
    """

    def __init__(self, iterator: Any, places: WorkerStatus | None, hang_s: float) -> None:
        self.processes: list[Any] = list(getattr(iterator, "_workers", []))
        self._iterator, self._places, self._hang_s = iterator, places, hang_s
        self._first: int | None = None
        self._lock, self._over = threading.Lock(), False
        if self.processes:
            self._end_of_watch, self._end_watch = multiprocessing.Pipe(duplex=False)
            self._thread = threading.Thread(target=self._watch, name="loader-workers", daemon=True)
            self._thread.start()

    def why(self, error: BaseException) -> bool:
        """Raise Crashed, Stuck or TrainingError for an error of the loader; else whether a video is
        being read."""
        if str(error).startswith("DataLoader timed out"):
            busy = False
            for worker in range(len(self.processes)):
                reading = self._reading(worker)
                if reading is not None and reading[1] > self._hang_s:
                    raise Stuck(
                        reading[0], f"its decoder hung: no answer for {self._hang_s:g} s"
                    ) from error
                busy = busy or reading is not None
            return busy
        reason = limit_met(error) or in_one_line(error)
        raise self._death(error) or TrainingError(
            f"a batch could not be received from a loader process: {reason}; {HINT}"
        ) from error

    def kill(self) -> None:
        """Kill what has not ended. Workers ignore SIGTERM, and torch would wait 5 s for each that
        hangs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()

    def end(self) -> None:
        """End all processes, and the watch."""
        if not self.processes:
            return
        with self._lock:
            self._over = True
        self._end_watch.send_bytes(b"over")
        self._thread.join()
        self._end_watch.close()
        self._end_of_watch.close()
        pinning = getattr(self._iterator, "_pin_memory_thread", None)
        if pinning is not None and any(process.exitcode for process in self.processes):
            # It may be waiting for the rest of a message, and torch would wait for it.
            self._iterator._pin_memory_thread_done_event.set()
            self._iterator._worker_result_queue.put((None, None))
            pinning.join(timeout=1.0)
            if pinning.is_alive():
                self._hang_up()
        self._iterator._shutdown_workers()  # what it does when it is collected, which a traceback may put off
        self.kill()

    def _watch(self) -> None:
        """Run in a thread, until `end` or the death of a worker with which nobody deals."""
        workers = {process.sentinel: worker for worker, process in enumerate(self.processes)}
        ready = wait([self._end_of_watch, *workers])
        self._first = next(
            (worker for sentinel, worker in workers.items() if sentinel in ready), None
        )
        if self._first is None or self._end_of_watch.poll(GRACE_S):
            return
        with self._lock:
            if not self._over:
                for process in self.processes:
                    with contextlib.suppress(
                        ProcessLookupError
                    ):  # not process.kill: only one thread may wait for it
                        os.kill(process.pid, signal.SIGKILL)
                self._hang_up()

    def _hang_up(self) -> None:
        """Let go of the pipe of results in this process, so that reading it ends where no worker
        writes any more."""
        queue = self._iterator._worker_result_queue
        with (
            open(os.devnull, "wb") as nothing,
            contextlib.suppress(OSError),
        ):  # closed: nobody reads
            os.dup2(nothing.fileno(), queue._writer.fileno(), inheritable=False)

    def _death(self, error: BaseException) -> Exception | None:
        """Return the exception for the worker that died first; None where all are alive."""
        ended = wait([process.sentinel for process in self.processes], timeout=GRACE_S)
        order = sorted(range(len(self.processes)), key=lambda worker: worker != self._first)
        for worker in order:
            process, reading = self.processes[worker], self._reading(worker)
            process.join(
                GRACE_S if process.sentinel in ended else 0
            )  # its files close before its status is known
            if process.exitcode in (None, 0):
                continue
            how = (
                signal.Signals(-process.exitcode).name
                if process.exitcode < 0
                else f"exit status {process.exitcode}"
            )
            if reading is None or process.exitcode == -signal.SIGKILL:
                where = f", reading {escape_path(reading[0])}" if reading is not None else ""
                return WorkerDied(
                    f"a loader process died: {how}{where}; fewer workers need less memory"
                )
            return Crashed(reading[0], f"its decoder crashed ({how})")
        if any(process.exitcode is not None for process in self.processes):
            reason = str(error).splitlines()[0].rstrip(". ")
            return WorkerDied(f"a loader process died: {reason}; fewer workers need less memory")
        return None

    def _reading(self, worker: int) -> tuple[str, float] | None:
        return self._places.reading(worker) if self._places is not None else None


def started(start: Callable[[], T]) -> T:
    """Return what `start` makes, with loader processes; a TrainingError, and no process left, where
    it fails."""
    before = set(multiprocessing.active_children())
    try:
        return start()
    except (OSError, RuntimeError) as error:
        for process in set(multiprocessing.active_children()) - before:
            process.kill()  # at its exit Python would end it by SIGTERM, which it ignores, and wait for it
            process.join()
        full = (
            "shared memory (/dev/shm) is full"
            if getattr(error, "errno", None) == errno.ENOSPC
            else None
        )
        reason = full or limit_met(error) or in_one_line(error)
        _forget_half_built(error)
    # Not while the error is handled: its number would be taken for that of a full disk.
    raise TrainingError(f"loader processes cannot be started: {reason}; {HINT}")


def _forget_half_built(error: BaseException) -> None:
    """Keep torch from shutting down an iterator that it has not finished: that prints a
    traceback."""
    trace = error.__traceback__
    while trace is not None:
        iterator: Any = trace.tb_frame.f_locals.get("self")
        if type(iterator).__name__ == "_MultiProcessingDataLoaderIter":
            iterator._shutdown = True
        trace = trace.tb_next


def watch_deaths_here() -> None:
    """Remove the signal handler that torch sets for its workers.

    It raises their death wherever the main process is, in the middle of a step; without it, death
    is seen where a batch is waited for.
    """
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def begin_worker(
    owner: Owner, places: WorkerStatus | None, refused: dict[str, str], worker: int
) -> None:
    """Run in a new worker before it reads.

    It ends with its owner: torch compares its parent with the one it has when its loop begins,
    which is another one if the owner was killed before. And it ignores a job's SIGTERM, which goes
    to all processes: the main one finishes its step and writes a checkpoint; a worker that died
    meanwhile would be missed in the middle of that step.
    """
    end_with(owner)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if places is not None:
        begin(places, worker, refused)


def start_context(device: torch.device) -> Any:
    """Return how workers start.

    Fork is 25 times faster than the others by measurement and safe while nothing is open in the
    parent; with CUDA initialised it is not, and a fork server that has the heavy imports done is
    the next best.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    if device.type != "cuda" and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "av"])
    return context
