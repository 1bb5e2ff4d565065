"""The process from which decoding workers are forked: `python -m …fork_server SOCKET`.

It has imported all that a worker needs, so that one more costs a few milliseconds, also in place of
one that a file has crashed. It runs one thread, decodes nothing itself, and ends when the process
that started it closes the socket or ends.

A request is one byte with four descriptors: the socket and the shared memory of the worker, its
standard error, and a pipe. Into the pipe go its process id and then how it ended, as
`Popen.returncode` has it, or `NOT_FORKED` alone.
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
    """Forks a worker for each request, and reports its end."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._reports: dict[int, Connection] = {}  # by process id of a worker that runs

    def run(self) -> None:
        """Serve until the other side hangs up."""
        signal.signal(signal.SIGCHLD, lambda *_: self._report_ended())
        while True:
            request, descriptors, _, _ = socket.recv_fds(self._requests, len(FORK), _DESCRIPTORS)
            if not request:
                return
            self._fork(*descriptors)

    def _fork(self, connection: int, memory: int, errors: int, report: int) -> None:
        # A worker that ends at once must not be reported before it is known.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        try:
            pid = os.fork()
        except OSError as error:  # a limit of processes or memory: the other workers live on
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
    with contextlib.suppress(OSError):  # nobody wants to know any more
        report.send_bytes(str(number).encode())


def _run_worker(connection: int, memory: int, errors: int) -> int:
    """Work as a worker of its own session (Ctrl-C is for the parent); return the exit code."""
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
    # The collector leaves what exists alone, so that its memory stays shared.
    gc.collect()
    gc.freeze()
    ForkServer(socket.socket(fileno=int(sys.argv[1]))).run()
