"""The parent's side of decoding workers: their processes, sockets and shared memory."""

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
_MAX_END_S = 5.0  # that a process takes to end


class ForkServerProcess:
    """A started fork server.

    `subprocess` starts it, not `multiprocessing`, so that it works inside daemonic workers and from
    scripts without a `__main__` guard.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._requests, server_end = socket.socketpair()
        # The server must import the same modules as this process; -P excludes the working folder.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _SERVER, str(server_end.fileno())],
                pass_fds=(server_end.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
            )

    @property
    def ended(self) -> bool:
        """Whether the server has ended and can fork no more workers."""
        return self._process.poll() is not None

    def fork(self, connection: int, memory: int, errors: int) -> ForkedProcess:
        """Return a worker with these descriptors, the last as its standard error."""
        report, server_end = Pipe(duplex=False)
        # If the server has ended, the reader of the worker's report notices it.
        with server_end, contextlib.suppress(ConnectionError):
            descriptors = [connection, memory, errors, server_end.fileno()]
            socket.send_fds(self._requests, [FORK], descriptors)
        return ForkedProcess(self, report)

    def close(self) -> tuple[int, bytes]:
        """End the server, after its workers.

        Returns:
            The exit code in the form of `Popen.returncode`, and the server's standard error.
        """
        self._requests.close()
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        if not self._errors.closed:
            self._errors.seek(0)
            self._stderr = self._errors.read()
            self._errors.close()
        return code, self._stderr


class ForkedProcess:
    """A worker of a fork server, with the needed part of the interface of `Popen`.

    errors: The server's standard error, if the server ended before the worker started.
    server_ended: Whether this process ended only because the server did.
    """

    def __init__(self, server: ForkServerProcess, report: Connection) -> None:
        self.errors = b""
        self.server_ended = False
        self.returncode: int | None = None
        self._server, self._report = server, report
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """The process id, after the process has started; None if it could not start."""
        if self._pid is None:
            self._receive(None)
        return self._pid

    def poll(self) -> int | None:
        """Return the exit code of the process, None while it runs."""
        return self.wait(0)

    def wait(self, timeout: float) -> int | None:
        """Return the exit code of the process; None if it still runs after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.returncode is None and self._receive(max(0.0, end - time.monotonic())):
            pass
        return self.returncode

    def kill(self) -> None:
        """End the process at once; a worker not forked yet ends because its socket is closed."""
        if self.poll() is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            # It takes longer if it reads from a file server that does not answer.
            self.wait(_MAX_END_S)
        self._report.close()

    def _receive(self, timeout: float | None) -> bool:
        """Receive a report of the server (process id, then exit code); False if there is none."""
        if self._report.closed or not self._report.poll(timeout):
            return False
        try:
            number = int(self._report.recv_bytes())
        # The server has ended, and its workers with it.
        except EOFError:
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
    """A started worker. `waited`: seconds that the parent waited since the worker's last sign."""

    def __init__(
        self,
        server: ForkServerProcess,
        layout: Layout,
        views: tuple[View, ...],
        memory_gb: float,
    ) -> None:
        self.ready = False  # whether the worker has begun
        self.unread = 0
        self.waited = 0.0
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
        """Render other views from the next task on; no slot may be in use."""
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
        """The process id, None if the process could not be started."""
        return self._process.pid

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message; return False if the worker has ended."""
        self.waited = 0.0
        try:
            send(self.connection, message)
        except OSError:
            return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """Return the next message, None if none is complete yet.

        A part of a message is a sign of life. The other parts are not waited for, because the
        process may have stopped.

        Raises:
            EOFError: The process has ended.
            OSError: Likewise.
        """
        while (message := self._inbox.next()) is None and self.has_sent():
            data = os.read(self.connection.fileno(), _READ_BYTES)
            if not data:
                raise EOFError
            self._inbox.add(data)
            self.waited = 0.0
        return message

    def has_sent(self) -> bool:
        """Return whether the connection has data or is at its end."""
        return bool(wait([self.connection], timeout=0))

    def slot(self, slot: int) -> tuple[np.ndarray, ...]:
        """Return uint8 [rows, h, w, 3] per view of one slot, even after the end of the worker."""
        return self._layout.arrays(self._memory, slot)

    def free(self, slot: int) -> None:
        """Give a slot back to the worker, unless the worker has ended."""
        self.unread -= 1
        if self._process.poll() is None and not self.connection.closed:
            self.send({"kind": "free", "slot": slot})

    def all_slots_unread(self) -> bool:
        """Return whether the process can only wait for its parent."""
        return self.unread >= SLOTS

    def end_reason(self) -> str:
        """Return the reason why the process ended, in words."""
        code = self._process.wait(_MAX_END_S)
        if code is None:
            return "the decoder closed its connection"
        if code < 0:
            name = (
                signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            )
            return f"the decoder crashed ({name})"
        self._errors.seek(0)
        stderr = self._errors.read() or self._process.errors
        lines = stderr.decode(errors="replace").strip().splitlines()
        return f"the decoder process ended with status {code}" + (f": {lines[-1]}" if lines else "")

    @property
    def ended(self) -> bool:
        """Whether the process ended with an error status, not by a signal."""
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
