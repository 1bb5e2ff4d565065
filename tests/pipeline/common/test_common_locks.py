"""Locks: another holder is told from a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distinit.pipeline.common import locks
from distinit.pipeline.common.errors import DistInitError, UsageError
from distinit.pipeline.common.locks import folder_lock, lock


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    busy = UsageError("busy")
    lock(first, tmp_path, busy, shared=True)
    lock(second, tmp_path, busy, shared=True)
    with pytest.raises(UsageError, match="busy"):
        lock(second, tmp_path, busy)
    os.close(first)
    lock(second, tmp_path, busy)
    os.close(second)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(
        DistInitError, match=r"its file system cannot lock it \(No locks available\)"
    ):
        lock(0, tmp_path, UsageError("busy"))


def test_a_folder_is_locked_by_one_process_and_its_forks_have_no_part_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "OUTLIVED_S", 0.3)
    out = tmp_path / "new" / "run"
    sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    try:
        with folder_lock(out):
            with pytest.raises(UsageError, match="run"), folder_lock(out):
                pass
            sleeper.start()
        with folder_lock(out):  # the sleeper lives and has none
            pass
    finally:
        sleeper.kill()
        sleeper.join()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from distinit.pipeline.common.locks import folder_lock\n"
        "with folder_lock(sys.argv[1]):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        descriptor = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(UsageError):
            lock(descriptor, tmp_path, UsageError("busy"))
        os.close(descriptor)
        holder.kill()
    with folder_lock(tmp_path):
        pass
