"""Loader processes, each of which reads its share of the batches ahead.

Worker w of W reads the batches w, w + W, w + 2W … and sends them through its own socket, in
anonymous shared memory. So a worker that is killed at any moment leaves no lock, no half message
and no file in /dev/shm; its end of the socket closes. The workers of a torch DataLoader share one
queue, in which each of these has to be detected and repaired.
"""

from __future__ import annotations

import atexit
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch

from ..clips.seeding import Key
from ..common import worker_status
from ..common.errors import DistInitError, TrainingError, WorkerDied, in_one_line, limit_met
from ..common.processes import Owner, end_with
from ..common.worker_status import WorkerStatus
from ..corpus.sources import escape_path

Batch = dict[str, Any]
Read = Callable[[list[Key]], Batch]

# Number of batches that each worker reads before they are needed.
READ_AHEAD = 4
# Time between two checks of a worker that sends no batch.
POLL_S = 1.0
# A worker that reads no file, because it starts or downloads, may take so many time-outs.
PATIENCE = 10
# Longest time between the end of a worker's socket and its exit code.
GRACE_PERIOD_S = 5.0
HINT = "0 workers (loop.workers, test.workers) read in the main process"
_ALIGNMENT = 64


def read_in_workers(
    read: Read,
    batches: Iterable[list[Key]],
    *,
    workers: int,
    device: torch.device,
    timeout_s: float,
    stop: Callable[[], bool],
) -> Generator[Batch]:
    """Yield `read(keys)` for each of `batches`, in order, computed by `workers` processes.

    Args:
        read: Returns the batch of its keys. It is sent to the workers, like `batches`.
        batches: The keys of each batch, which must be the same in every iteration.
        workers: Number of processes, which end with the iterator.
        device: Device of the training. If CUDA is in use, workers are not forked.
        timeout_s: How long a worker may take to read one file.
        stop: Called about once per second while waiting; true ends the batches.

    Raises:
        DistInitError: `read` raised it.
        WorkerDied: A worker died or did not respond; its `path` is the video that it was reading.
        TrainingError: `read` raised another error, or a batch cannot be sent.
    """
    started: list[_Worker] = []
    end = partial(_end_workers, started)
    # At exit Python sends SIGTERM to child processes, which workers ignore, and waits for them.
    atexit.register(end)
    try:
        _start_workers(started, read, batches, workers, device)
        for worker in itertools.cycle(started):
            if not worker.wait(timeout_s, stop):
                return
            batch = worker.receive()
            if batch is None:
                return
            yield batch
    finally:
        end()
        atexit.unregister(end)


def start_context(device: torch.device) -> Any:
    """Return the multiprocessing context that starts workers.

    Fork was measured 25 times faster than the other methods. It is safe unless CUDA is initialised;
    then a fork server that has already imported the large libraries is the next best.
    """
    if "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    if device.type != "cuda" and not torch.cuda.is_initialized():
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "av"])
    return context


def _start_workers(
    started: list[_Worker],
    read: Read,
    batches: Iterable[list[Key]],
    workers: int,
    device: torch.device,
) -> None:
    """Start the workers and append them to `started`.

    Raises:
        TrainingError: The system cannot start another process.
    """
    try:
        context = start_context(device)
        status = WorkerStatus(context, workers)
        for number in range(workers):
            main_end, worker_end = multiprocessing.Pipe()
            process = context.Process(
                target=_run_worker,
                args=(worker_end, Owner.current(), status, worker_status.refused_files()),
                kwargs={"read": read, "batches": batches, "number": number, "workers": workers},
                daemon=True,
            )
            with worker_end:
                process.start()
            started.append(_Worker(number, process, main_end, status))
            started[-1].request(READ_AHEAD)
    except (OSError, RuntimeError) as error:
        reason = limit_met(error) or in_one_line(error)
        raise TrainingError(f"loader processes cannot be started: {reason}; {HINT}") from error


def _end_workers(started: list[_Worker]) -> None:
    """End all workers, and discard the batches that they are reading."""
    for worker in started:
        worker.process.kill()
        worker.connection.close()
    for worker in started:
        worker.process.join(GRACE_PERIOD_S)
    started.clear()


@dataclass(frozen=True)
class _Worker:
    """The main process's handle of a worker."""

    number: int
    process: Any
    connection: Connection
    status: WorkerStatus

    def request(self, num_batches: int) -> None:
        """Allow the worker to read so many more batches."""
        # The wait for the next batch detects a dead worker.
        with suppress(OSError):
            for _ in range(num_batches):
                self.connection.send_bytes(b"1")

    def wait(self, timeout_s: float, stop: Callable[[], bool]) -> bool:
        """Return true when the worker has sent a batch or died, false if `stop()` is true first.

        The time is counted in polls, because a clock does not stop while the job is suspended.
        """
        poll_s = min(timeout_s, POLL_S)
        waited_s, reading = 0.0, None
        while not wait([self.connection, self.process.sentinel], timeout=poll_s):
            if stop():
                return False
            previous, reading = reading, self.status.reading(self.number)
            waited_s = waited_s + poll_s if reading == previous else poll_s
            if reading is not None and waited_s > timeout_s:
                reason = f"its decoder hung: no answer for {timeout_s:g} s"
                raise _worker_died(
                    f"a loader process gave no answer for {timeout_s:g} s", reading[0], reason
                )
            if waited_s > PATIENCE * timeout_s:
                raise TrainingError(
                    f"a loader process hangs: no batch for {PATIENCE * timeout_s:g} s, "
                    f"and no video is being read; {HINT}"
                )
        return True

    def receive(self) -> Batch | None:
        """Return the next batch, or None after the last one; raise the error of the worker."""
        try:
            batch = receive_batch(self.connection)
        except Exception as error:
            # A batch that was sent before the worker died arrives whole. So either the worker died
            # before it sent this one, or this process has reached a limit.
            raise self._receive_error(error) from error
        if isinstance(batch, DistInitError):
            raise batch
        self.request(1)
        return batch

    def _receive_error(self, error: Exception) -> TrainingError:
        self.process.join(GRACE_PERIOD_S)
        code = self.process.exitcode
        if code is None:
            reason = limit_met(error) or in_one_line(error)
            return TrainingError(
                f"a batch could not be received from a loader process: {reason}; {HINT}"
            )
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reading = self.status.reading(self.number)
        path = reading[0] if reading is not None else ""
        if code == -signal.SIGKILL:
            # Most often the system sends it when memory runs out, so the file is not to blame.
            return _worker_died("a loader process was ended by SIGKILL", path, "")
        return _worker_died(
            f"a loader process died ({ending})",
            path,
            f"its decoder crashed ({ending})" if path else "",
        )


def _worker_died(event: str, path: str, reason: str) -> WorkerDied:
    during = f" while it read {escape_path(path)}" if path else ""
    hint = "" if reason else "; fewer workers (loop.workers, test.workers) need less memory"
    error = WorkerDied(f"{event}{during}{hint}")
    error.path, error.reason = path, reason
    return error


def _run_worker(
    connection: Connection,
    owner: Owner,
    status: WorkerStatus,
    refused: dict[str, str],
    *,
    read: Read,
    batches: Iterable[list[Key]],
    number: int,
    workers: int,
) -> None:
    """Run worker `number`: read and send each batch that the main process has requested."""
    end_with(owner)
    # A job scheduler or terminal sends signals to all processes. The main process needs its workers
    # until it has finished its step and written a checkpoint.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    worker_status.begin(status, number, refused)
    # These errors mean that the main process has ended.
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        for keys in itertools.islice(batches, number, None, workers):
            connection.recv_bytes()
            _read_and_send(connection, read, keys)
        connection.recv_bytes()
        send_batch(connection, None)


def _read_and_send(connection: Connection, read: Read, keys: list[Key]) -> None:
    """Read and send a batch, or send the error in its place."""
    problem = "a loader process failed"
    try:
        batch = read(keys)
        problem = "a loader process cannot send a batch"
        send_batch(connection, batch)
    except DistInitError as error:
        send_batch(connection, error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        failure = TrainingError(f"{problem}: {limit_met(error) or in_one_line(error)}")
        failure.add_note(traceback.format_exc())
        send_batch(connection, failure)


class _Pickler(pickle.Pickler):
    """Pickles the memory of tensors out of band, like that of NumPy arrays."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _tensor_of, (value.numpy(),)
        return NotImplemented


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def send_batch(connection: Connection, batch: Batch | DistInitError | None) -> None:
    """Send a batch: tensors in anonymous shared memory, everything else as bytes."""
    buffers: list[pickle.PickleBuffer] = []
    header = io.BytesIO()
    _Pickler(header, protocol=5, buffer_callback=buffers.append).dump(batch)
    parts = [buffer.raw() for buffer in buffers]
    ends = list(itertools.accumulate(_aligned(part.nbytes) for part in parts))
    if not ends or not ends[-1]:
        connection.send_bytes(pickle.dumps((header.getvalue(), [0] * len(ends))))
        return
    with _anonymous_file() as file:
        for part, end in zip(parts, ends, strict=True):
            file.seek(end - _aligned(part.nbytes))
            file.write(part)
        file.truncate(ends[-1])
        file.flush()
        sizes = [part.nbytes for part in parts]
        connection.send_bytes(pickle.dumps((header.getvalue(), sizes)))
        # The system delivers the descriptor even if this process dies now.
        send_handle(connection, file.fileno(), None)


def receive_batch(connection: Connection) -> Batch | DistInitError | None:
    """Receive a batch of `send_batch`. Its tensors keep the shared memory alive."""
    header, sizes = pickle.loads(connection.recv_bytes())
    ends = list(itertools.accumulate(map(_aligned, sizes)))
    memory = memoryview(bytearray())
    if ends and ends[-1]:
        descriptor = recv_handle(connection)
        try:
            memory = memoryview(mmap.mmap(descriptor, ends[-1]))
        finally:
            os.close(descriptor)
    starts = (end - _aligned(size) for end, size in zip(ends, sizes, strict=True))
    buffers = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return pickle.loads(header, buffers=buffers)


def _anonymous_file() -> Any:
    """Return a file without a name that two processes can share, in memory where possible."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("distinit-batch"), "r+b")
    return tempfile.TemporaryFile()


def _aligned(size: int) -> int:
    """Round `size` up, so that the next array is aligned for any type."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
