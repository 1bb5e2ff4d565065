"""The parent's end of one decoding child: its process, its socket, its shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from ...common.processes import Owner
from ..geometry import View
from .messages import SLOTS, Inbox, Layout, send, shared_file

_MODULE = f"{__package__}.worker"
_READ_BYTES = 2**20
_END_S = 5.0  # the longest that a process takes to end


class ChildProcess:
    """A started child. `listened`: seconds the parent has waited for it since it last spoke.

    Started with `subprocess`, not `multiprocessing`: that works inside daemonic workers and from
    scripts without a `__main__` guard.
    """

    def __init__(self, layout: Layout, views: tuple[View, ...], memory_gb: float) -> None:
        self.ready = False  # whether it has begun to work
        self.unread = 0
        self.listened = 0.0
        parent_end, child_end = socket.socketpair()
        self._file = shared_file(layout.total_bytes)
        self._memory = mmap.mmap(self._file, layout.total_bytes)
        self._layout = layout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        # The same modules as here, wherever they were imported from; -P keeps the working folder
        # out.
        path = os.pathsep.join(p for p in sys.path if p)
        environment = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(child_end.fileno()), str(self._file)],
                pass_fds=(child_end.fileno(), self._file),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its children
            )
        except BaseException:
            os.close(self._file)
            raise
        finally:
            child_end.close()
        self.connection = Connection(parent_end.detach())
        self._inbox = Inbox()
        self.send(
            {
                "views": [view.model_dump() for view in views],
                "bytes": layout.total_bytes,
                "memory_gb": memory_gb,
                "owner": asdict(Owner.here()),
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
    def pid(self) -> int:
        """Return the process id."""
        return self._process.pid

    def send(self, message: dict[str, Any]) -> bool:
        """Send a message; False if the child is gone."""
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
        """uint8 [rows, h, w, 3] per view of one slot; readable also after the child's death."""
        return self._layout.arrays(self._memory, slot)

    def free(self, slot: int) -> None:
        """Give a slot back. A child that has died meanwhile does not care."""
        self.unread -= 1
        if self._process.poll() is None and not self.connection.closed:
            self.send({"kind": "free", "slot": slot})

    def all_slots_unread(self) -> bool:
        """Return whether the process can only wait for its parent."""
        return self.unread >= SLOTS

    def last_words(self) -> str:
        """Describe why the process ended."""
        try:
            code = self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            return "the decoder hung up"
        if code < 0:
            name = (
                signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            )
            return f"the decoder crashed ({name})"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the decoder process ended with status {code}" + (f": {lines[-1]}" if lines else "")

    @property
    def ended(self) -> bool:
        """Whether the process ended by itself, not by a signal."""
        return (self._process.poll() or 0) > 0

    def kill(self) -> None:
        """End the process at once; blocks that were delivered stay readable."""
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # it reads from a file server that does not answer
            self._process.wait(timeout=_END_S)
        if not self.connection.closed:
            self.connection.close()
            self._errors.close()
            os.close(self._file)
