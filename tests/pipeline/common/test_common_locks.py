"""Locks against other processes, and file systems without locks."""

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
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.locks import NoLocksError, folder_lock, locked


def test_one_writer_or_many_readers(tmp_path: Path) -> None:
    busy = UsageError("busy")
    with locked(tmp_path, busy, shared=True):
        with (
            locked(tmp_path, busy, shared=True),
            pytest.raises(UsageError, match="busy"),
            locked(tmp_path, busy),
        ):
            pass
        with pytest.raises(UsageError, match="busy"), locked(tmp_path, busy, wait_s=0.3):
            pass
    with locked(tmp_path, busy):
        pass


def test_a_file_that_is_made_for_its_lock_is_not_reached_through_a_link(tmp_path: Path) -> None:
    file, victim = tmp_path / "lock", tmp_path / "victim"
    with locked(file, UsageError("busy"), make=True) as descriptor:
        assert os.path.samestat(os.fstat(descriptor), file.stat())
    file.unlink()
    file.symlink_to(victim)
    with pytest.raises(OSError), locked(file, UsageError("busy"), make=True):
        pass
    assert not victim.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(NoLocksError, match=str(tmp_path)),
        locked(tmp_path, UsageError("busy")),
    ):
        pass
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_folder_is_locked_by_one_process_and_not_by_its_forks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "MAX_WAIT_S", 0.3)
    out = tmp_path / "new" / "run"
    sleeper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    try:
        with folder_lock(out):
            with pytest.raises(UsageError, match="run"), folder_lock(out):
                pass
            sleeper.start()
        # The sleeping process is alive and does not hold the lock.
        with folder_lock(out):
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
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError), locked(tmp_path, UsageError("busy")):
            pass
        holder.kill()
    with folder_lock(tmp_path):
        pass
