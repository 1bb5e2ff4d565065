"""The parent's end of decoding workers: their processes, sockets and shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import numpy as np

from ...common.processes import Owner
from ..geometry import View
from .messages import FORK, NOT_FORKED, SLOTS, Inbox, Layout, send, shared_file

_SERVER = f"{__package__}.fork_server"
_READ_BYTES = 2**20
_END_S = 5.0  # the longest that a process takes to end


class ForkServerProcess:
    """A started fork server.

    With `subprocess`, not `multiprocessing`: that works inside daemonic workers and from scripts
    without a `__main__` guard.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._requests, its = socket.socketpair()
        # The same modules as here, wherever they were imported from; -P keeps the working folder
        # out.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _SERVER, str(its.fileno())],
                pass_fds=(its.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
            )

    @property
    def ended(self) -> bool:
        """Whether it can fork no more workers."""
        return self._process.poll() is not None

    def fork(self, connection: int, memory: int, errors: int) -> ForkedProcess:
        """Return a worker with these descriptors, the last as its standard error."""
        report, its = Pipe(duplex=False)
        # A server that has ended is noticed where the worker's report is read.
        with its, contextlib.suppress(ConnectionError):
            descriptors = [connection, memory, errors, its.fileno()]
            socket.send_fds(self._requests, [FORK], descriptors)
        return ForkedProcess(self, report)

    def close(self) -> tuple[int, bytes]:
        """End it after its workers.

        Returns:
            How it ended, as `Popen.returncode` has it, and what it wrote to standard error.
        """
        self._requests.close()
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        if not self._errors.closed:
            self._errors.seek(0)
            self._written = self._errors.read()
            self._errors.close()
        return code, self._written


class ForkedProcess:
    """A worker of a fork server, with the part of `Popen` that is needed.

    errors: what the server wrote to standard error, if it ended before there was a worker.
    server_ended: whether this process ended only because the server did.
    """

    def __init__(self, server: ForkServerProcess, report: Connection) -> None:
        self.errors = b""
        self.server_ended = False
        self.returncode: int | None = None
        self._server, self._report = server, report
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """Wait until there is a process, and return its id; None if there will be none."""
        if self._pid is None:
            self._receive(None)
        return self._pid

    def poll(self) -> int | None:
        """Return how the process ended, None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float) -> int | None:
        """Return how the process ended; None if it runs after so many seconds."""
        end = time.monotonic() + timeout
        while self.returncode is None and self._receive(max(0.0, end - time.monotonic())):
            pass
        return self.returncode

    def kill(self) -> None:
        """End the process at once. One that is not forked yet finds that nobody needs it."""
        if self.poll() is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self.wait(_END_S)  # longer if it reads from a file server that does not answer
        self._report.close()

    def _receive(self, timeout: float | None) -> bool:
        """Take in what the server reports: the process id, then the end; False if nothing came."""
        if self._report.closed or not self._report.poll(timeout):
            return False
        try:
            number = int(self._report.recv_bytes())
        except EOFError:  # the server has ended, and with it its workers
            code, self.errors = self._server.close()
            self.server_ended = self._pid is not None
            self.returncode = -signal.SIGKILL if self.server_ended else code
            return True
        if self._pid is not None:
            self.returncode = number
        elif number == NOT_FORKED:
            self.returncode = 1
        else:
            self._pid = number
        return True


class WorkerProcess:
    """A started worker. `listened`: seconds the parent has waited for it since it last spoke."""

    def __init__(
        self,
        server: ForkServerProcess,
        layout: Layout,
        views: tuple[View, ...],
        memory_gb: float,
    ) -> None:
        self.ready = False  # whether it has begun to work
        self.unread = 0
        self.listened = 0.0
        parent_end, worker_end = socket.socketpair()
        self._file = shared_file(layout.total_bytes)
        self._memory = mmap.mmap(self._file, layout.total_bytes)
        self._layout = layout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        try:
            self._process = server.fork(worker_end.fileno(), self._file, self._errors.fileno())
        except BaseException:
            os.close(self._file)
            raise
        finally:
            worker_end.close()
        self.connection = Connection(parent_end.detach())
        self._inbox = Inbox()
        self.send(
            {
                "views": [view.model_dump() for view in views],
                "bytes": layout.total_bytes,
                "memory_gb": memory_gb,
                "owner": asdict(Owner.current()),
            }
        )

    def show(self, layout: Layout, views: tuple[View, ...]) -> None:
        """Let the process render other views from the next task on; no slot may be in use."""
        os.ftruncate(self._file, layout.total_bytes)
        self._memory = mmap.mmap(self._file, layout.total_bytes)
        self._layout = layout
        self.send(
            {
                "kind": "views",
                "views": [view.model_dump() for view in views],
                "bytes": layout.total_bytes,
            }
        )

    @property
    def pid(self) -> int | None:
        """Return the process id, None if it could not be started."""
        return self._process.pid

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message; False if the worker is gone."""
        self.listened = 0.0
        try:
            send(self.connection, message)
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, None if there is none yet.

        A part of a message is a sign of life, but its rest is not waited for: the process may have
        stopped.

        Raises:
            EOFError: The process has ended.
            OSError: Likewise.
        """
        while (message := self._inbox.next()) is None and self.has_sent():
            data = os.read(self.connection.fileno(), _READ_BYTES)
            if not data:
                raise EOFError
            self._inbox.add(data)
            self.listened = 0.0
        return message

    def has_sent(self) -> bool:
        """Return whether there is something to hear, the end included."""
        return bool(wait([self.connection], timeout=0))

    def slot(self, slot: int) -> tuple[np.ndarray, ...]:
        """uint8 [rows, h, w, 3] per view of one slot; readable also after the worker's death."""
        return self._layout.arrays(self._memory, slot)

    def free(self, slot: int) -> None:
        """Give a slot back. A worker that has died meanwhile does not care."""
        self.unread -= 1
        if self._process.poll() is None and not self.connection.closed:
            self.send({"kind": "free", "slot": slot})

    def all_slots_unread(self) -> bool:
        """Return whether the process can only wait for its parent."""
        return self.unread >= SLOTS

    def last_words(self) -> str:
        """Describe why the process ended."""
        code = self._process.wait(_END_S)
        if code is None:
            return "the decoder hung up"
        if code < 0:
            name = (
                signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            )
            return f"the decoder crashed ({name})"
        self._errors.seek(0)
        written = self._errors.read() or self._process.errors
        lines = written.decode(errors="replace").strip().splitlines()
        return f"the decoder process ended with status {code}" + (f": {lines[-1]}" if lines else "")

    @property
    def ended(self) -> bool:
        """Whether the process ended by itself, not by a signal."""
        return (self._process.poll() or 0) > 0

    @property
    def server_ended(self) -> bool:
        """Whether the process ended only because its fork server did."""
        return self._process.server_ended

    def kill(self) -> None:
        """End the process at once; blocks that were delivered stay readable."""
        self._process.kill()
        if not self.connection.closed:
            self.connection.close()
            self._errors.close()
            os.close(self._file)
