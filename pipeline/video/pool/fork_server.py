"""The process from which decoding workers are forked: `python -m …fork_server SOCKET`.

It has imported all modules of a worker, so that a new worker costs a few milliseconds, also after a
file has crashed one. It runs one thread, decodes nothing itself, and ends when the process that
started it closes the socket or ends.

A request is one byte with four descriptors: the socket, the shared memory and the standard error of
the worker, and a pipe. The server writes the worker's process id into the pipe and, after its end,
the exit code in the form of `Popen.returncode`; or `NOT_FORKED` alone.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection

from .messages import FORK, NOT_FORKED
from .worker import serve

_DESCRIPTORS = 4


class ForkServer:
    """Forks a worker for each request and reports how it ended."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        # By process id, for the workers that run.
        self._reports: dict[int, Connection] = {}

    def run(self) -> None:
        """Serve until the other side hangs up."""
        signal.signal(signal.SIGCHLD, lambda *_: self._report_ended())
        while True:
            request, descriptors, _, _ = socket.recv_fds(self._requests, len(FORK), _DESCRIPTORS)
            if not request:
                return
            self._fork(*descriptors)

    def _fork(self, connection: int, memory: int, errors: int, report: int) -> None:
        # The end of a worker must not be reported before its process id.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        try:
            pid = os.fork()
        # A limit of processes or memory, which does not end the other workers.
        except OSError as error:
            os.write(errors, f"{error}\n".encode())
            pid = NOT_FORKED
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            self._requests.close()
            os.close(report)
            os._exit(_run_worker(connection, memory, errors))
        pipe = Connection(report, readable=False)
        _send(pipe, pid)
        if pid == NOT_FORKED:
            pipe.close()
        else:
            self._reports[pid] = pipe
        for descriptor in (connection, memory, errors):
            os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])

    def _report_ended(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                with self._reports.pop(pid) as report:
                    _send(report, os.waitstatus_to_exitcode(status))


def _send(report: Connection, number: int) -> None:
    # The other side may have closed the pipe.
    with contextlib.suppress(OSError):
        report.send_bytes(str(number).encode())


def _run_worker(connection: int, memory: int, errors: int) -> int:
    """Run a worker in a separate session (Ctrl-C is for the parent); return the exit code."""
    try:
        os.setsid()
        os.dup2(errors, 2)
        os.close(errors)
        serve(connection, memory)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    # The garbage collector ignores the existing objects, so that their memory stays shared.
    gc.collect()
    gc.freeze()
    ForkServer(socket.socket(fileno=int(sys.argv[1]))).run()
