"""Locks: another holder is told from a file system without locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from distinit.pipeline.errors import DistInitError, UsageError
from distinit.pipeline.locks import lock


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
    with pytest.raises(DistInitError, match=r"its file system cannot lock it \(No locks available\)"):
        lock(0, tmp_path, UsageError("busy"))
