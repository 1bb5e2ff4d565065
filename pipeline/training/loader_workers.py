"""The processes of a loader: each makes its share of the batches ahead and hands them over.

Worker w of W makes the batches w, w + W, w + 2W … and sends them through a socket of its own, in
anonymous shared memory. A worker that is killed at any moment therefore leaves behind no lock, no
half message that another one completes, and no file in /dev/shm: its end of the socket closes. The
workers of a torch DataLoader share one queue, where each of these has to be detected and repaired.
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

READ_AHEAD = 4  # batches that each worker makes before they are asked for
POLL_S = 1.0  # between two looks at a worker that sends no batch
PATIENCE = 10  # times the time-out, for a worker that reads no file: it may start, or download
GRACE_PERIOD_S = 5.0  # between the end of a worker's socket and its exit code
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
    """Yield `read(keys)` for each of `batches`, in order, made in `workers` processes.

    Args:
        read: Makes a batch; goes to the workers, as does `batches`.
        batches: The keys of each batch, the same whenever it is iterated over.
        workers: Number of processes; they end with the iterator.
        device: The device of the training: with CUDA in use, workers are not forked.
        timeout_s: For how long a worker may read one file.
        stop: Asked about once per second of a wait; true ends the batches.

    Raises:
        DistInitError: As `read` raised it.
        WorkerDied: A worker died or gave no answer, see its `path`.
        TrainingError: Another error of `read`, or no batch can be sent.
    """
    crew: list[_Worker] = []
    end = partial(_end, crew)
    # At exit Python sends children SIGTERM, which workers ignore, and waits for them.
    atexit.register(end)
    try:
        _start(crew, read, batches, workers, device)
        for worker in itertools.cycle(crew):
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


def _start(
    crew: list[_Worker],
    read: Read,
    batches: Iterable[list[Key]],
    workers: int,
    device: torch.device,
) -> None:
    """Start the workers and add them to `crew`; TrainingError where the system refuses one."""
    try:
        context = start_context(device)
        status = WorkerStatus(context, workers)
        for number in range(workers):
            ours, theirs = multiprocessing.Pipe()
            process = context.Process(
                target=_run_worker,
                args=(theirs, Owner.current(), status, worker_status.refused_files()),
                kwargs={"read": read, "batches": batches, "number": number, "workers": workers},
                daemon=True,
            )
            with theirs:
                process.start()
            crew.append(_Worker(number, process, ours, status))
            crew[-1].ask(READ_AHEAD)
    except (OSError, RuntimeError) as error:
        reason = limit_met(error) or in_one_line(error)
        raise TrainingError(f"loader processes cannot be started: {reason}; {HINT}") from error


def _end(crew: list[_Worker]) -> None:
    """End all workers; what they still make is not needed."""
    for worker in crew:
        worker.process.kill()
        worker.connection.close()
    for worker in crew:
        worker.process.join(GRACE_PERIOD_S)
    crew.clear()


@dataclass(frozen=True)
class _Worker:
    """A worker, as the main process sees it."""

    number: int
    process: Any
    connection: Connection
    status: WorkerStatus

    def ask(self, batches: int) -> None:
        """Let the worker make so many more batches."""
        # Its death is seen where the next batch is waited for.
        with suppress(OSError):
            for _ in range(batches):
                self.connection.send_bytes(b"1")

    def wait(self, timeout_s: float, stop: Callable[[], bool]) -> bool:
        """Return true once the worker has sent something or died, false if `stop()` is true first.

        The time is counted in polls: a clock runs on while the job is suspended.
        """
        poll_s = min(timeout_s, POLL_S)
        waited, reading = 0.0, None
        while not wait([self.connection, self.process.sentinel], timeout=poll_s):
            if stop():
                return False
            before, reading = reading, self.status.reading(self.number)
            waited = waited + poll_s if reading == before else poll_s
            if reading is not None and waited > timeout_s:
                reason = f"its decoder hung: no answer for {timeout_s:g} s"
                raise _worker_died(
                    f"a loader process gave no answer for {timeout_s:g} s", reading[0], reason
                )
            if waited > PATIENCE * timeout_s:
                raise TrainingError(
                    f"a loader process hangs: no batch for {PATIENCE * timeout_s:g} s, "
                    f"and no video is being read; {HINT}"
                )
        return True

    def receive(self) -> Batch | None:
        """Return the next batch, None after the last one; raise the error in its place."""
        try:
            batch = receive_batch(self.connection)
        except Exception as error:
            # A batch that was sent before the death has arrived whole: this is the death itself,
            # or a limit of this process.
            raise self._cause(error) from error
        if isinstance(batch, DistInitError):
            raise batch
        self.ask(1)
        return batch

    def _cause(self, error: Exception) -> TrainingError:
        self.process.join(GRACE_PERIOD_S)
        code = self.process.exitcode
        if code is None:
            reason = limit_met(error) or in_one_line(error)
            return TrainingError(
                f"a batch could not be received from a loader process: {reason}; {HINT}"
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        reading = self.status.reading(self.number)
        path = reading[0] if reading is not None else ""
        if code == -signal.SIGKILL:
            # Most often the system, where memory runs out: no fault of the file.
            return _worker_died("a loader process was ended by SIGKILL", path, "")
        return _worker_died(
            f"a loader process died ({how})", path, f"its decoder crashed ({how})" if path else ""
        )


def _worker_died(what: str, path: str, reason: str) -> WorkerDied:
    where = f" while it read {escape_path(path)}" if path else ""
    hint = "" if reason else "; fewer workers (loop.workers, test.workers) need less memory"
    error = WorkerDied(f"{what}{where}{hint}")
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
    """Run worker `number`: make and send batches, each once the main process has asked for it."""
    end_with(owner)
    # The signals of a job or a terminal go to all its processes. The main one finishes its step and
    # writes a checkpoint: it would miss a worker that ended meanwhile.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    worker_status.begin(status, number, refused)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the main process has ended
        for keys in itertools.islice(batches, number, None, workers):
            connection.recv_bytes()
            _make_and_send(connection, read, keys)
        connection.recv_bytes()
        send_batch(connection, None)


def _make_and_send(connection: Connection, read: Read, keys: list[Key]) -> None:
    """Send a batch, or the error in its place."""
    doing = "a loader process failed"
    try:
        batch = read(keys)
        doing = "a loader process cannot send a batch"
        send_batch(connection, batch)
    except DistInitError as error:
        send_batch(connection, error)
    except (BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        failure = TrainingError(f"{doing}: {limit_met(error) or in_one_line(error)}")
        failure.add_note(traceback.format_exc())
        send_batch(connection, failure)


class _Pickler(pickle.Pickler):
    """Takes the memory of tensors as it takes that of NumPy arrays: out of band."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _tensor_of, (value.numpy(),)
        return NotImplemented


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


def send_batch(connection: Connection, batch: Batch | DistInitError | None) -> None:
    """Send a batch: tensors as a descriptor of shared memory without a name, all else in bytes."""
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
        # The descriptor is on its way in the system itself, whatever becomes of this process.
        send_handle(connection, file.fileno(), None)


def receive_batch(connection: Connection) -> Batch | DistInitError | None:
    """Receive what `send_batch` sent. Tensors are in the shared memory, which ends with them."""
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
    buffers = [memory[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    return pickle.loads(header, buffers=buffers)


def _anonymous_file() -> Any:
    """Return a file without a name that two processes can share, in memory where possible."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("distinit-batch"), "r+b")
    return tempfile.TemporaryFile()


def _aligned(size: int) -> int:
    """Return `size` rounded up so that the next array starts at an address that its type allows."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
