"""Run commands in separate processes, without the seconds of importing torch each time.

A server imports the libraries once and forks a process for every command. Exit code, signals,
streams, environment, folder and limits are those of a process that a shell starts.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMAND = "from distinit.cli import main\nmain()"
LIBRARIES = (
    "torchvision",
    "torch._dynamo",
    "zarr",
    "av",
    "h5py",
    "scipy.stats",
    "rich.progress",
    "jinja2",
)
STAGES = tuple(
    f"distinit.stages.{path.stem}"
    for path in sorted((Path(__file__).parents[1] / "stages").glob("[a-z]*.py"))
)
SERVER = """
import atexit, gc, importlib, json, os, resource, signal, socket, sys, threading, traceback

requests = socket.socket(fileno=int(sys.argv[1]))
for name in sys.argv[2:]:
    importlib.import_module(name)
assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked safely"
# The collector ignores existing objects, so that their memory stays shared.
gc.collect()
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    message, fds, _, _ = socket.recv_fds(requests, 1 << 18, 4)
    if not message:
        os._exit(0)
    if os.fork():
        for fd in fds:
            os.close(fd)
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # This process waits for the command and reports its status.
    pid = os.fork()
    if pid:
        os.write(fds[3], f"{pid}\\n".encode())
        for fd in fds[:3]:
            os.close(fd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(fds[3], f"{code}\\n".encode())
        os._exit(0)
    break
request = json.loads(message)
for number in range(3):
    os.dup2(fds[number], number)
for fd in fds:
    os.close(fd)
requests.close()
os.setsid()
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
sys.path[1:1] = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p not in sys.path]
encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
sys.stdin = sys.__stdin__ = open(0, closefd=False)
sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding, closefd=False)
sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding, "backslashreplace", closefd=False)
for limit, values in request["limits"].items():
    resource.setrlimit(getattr(resource, limit), tuple(values))
sys.argv = request["argv"]
if request["fresh"]:
    for name in [name for name in sys.modules if name.split(".")[0] == "distinit"]:
        del sys.modules[name]
code = 1
try:
    exec(compile(request["code"], "<string>", "exec"))
    code = 0
except SystemExit as error:
    code = error.code or 0
except BaseException:
    traceback.print_exc()
# The clean-up of all modules is skipped, because it takes longer than most commands.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@functools.cache
def _server() -> socket.socket:
    """Start the server; it ends with this process, when its socket is closed."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-c", SERVER, str(its.fileno()), *LIBRARIES, *STAGES]
    # Threads of OpenBLAS begin when NumPy is imported.
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.Popen(words, pass_fds=[its.fileno()], env=env, stdin=subprocess.DEVNULL)
    its.close()
    return ours


class Process:
    """A running command, with the part of `subprocess.Popen` that tests need.

    Args:
        words: Words of the command line, after the name of the program.
        code: Code to run in place of the command, as by `python -c`; distinit is imported again.
        cwd: Working folder, by default that of this process.
        env: Variables to add to the environment.
        limits: Name in `resource`, such as RLIMIT_FSIZE → soft and hard limit.
        terminal: Descriptor of all three streams. By default standard input is empty, and the
            others are files.
    """

    def __init__(
        self,
        *words: object,
        code: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, tuple[int, int]] | None = None,
        terminal: int | None = None,
    ) -> None:
        self.args = list(map(str, words))
        self.returncode: int | None = None
        self._out = tempfile.TemporaryFile()  # noqa: SIM115
        self._err = tempfile.TemporaryFile()  # noqa: SIM115
        request = {
            "argv": ["-c" if code else "distinit", *self.args],
            "code": code or COMMAND,
            "fresh": code is not None,
            "cwd": os.getcwd() if cwd is None else os.fspath(cwd),
            "env": {**os.environ, **(env or {})},
            "limits": dict(limits or {}),
        }
        status, its = os.pipe()
        with open(os.devnull) as nothing:
            fds = [nothing.fileno(), self._out.fileno(), self._err.fileno()]
            fds = [*(fds if terminal is None else [terminal] * 3), its]
            socket.send_fds(_server(), [json.dumps(request).encode()], fds)
        os.close(its)
        self._status = open(status)  # noqa: SIM115
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float = 900) -> int:
        """Wait for its end and return its exit code, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._status.readline())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> bytes:
        """Return its output so far."""
        return os.pread(self._out.fileno(), 1 << 28, 0)

    @property
    def stderr(self) -> bytes:
        """Return its output so far to standard error."""
        return os.pread(self._err.fileno(), 1 << 28, 0)


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, see `Process`, and return its streams as text in UTF-8."""
    process = Process(*words, **options)
    code = process.wait()
    out, err = process.stdout.decode(), process.stderr.decode()
    return subprocess.CompletedProcess(process.args, code, out, err)
