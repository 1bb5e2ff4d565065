"""The next writer removes temporary files of killed processes, and no files with similar names."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from distinit.pipeline.common.errors import StoreError
from distinit.pipeline.common.locks import folder_lock
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.writer import StoreWriter
from distinit.tests import warm

HEX = "0123456789abcdef" * 2
# The process is killed while zarr writes, before it renames its file.
KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import zarr
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
zarr.create_array(sys.argv[1], shape=(4,), chunks=(4,), dtype="int32")[:] = np.arange(4)
"""


@pytest.mark.slow
def test_the_next_writer_of_a_store_removes_files_of_zarr(tiny_store: Any, tmp_path: Path) -> None:
    store = TargetStore.open(tiny_store.path)
    root = tmp_path / "t.zarr"
    sampling = store.attributes["sampling"]
    with StoreWriter(root, sampling=sampling) as writer:
        store_files = {path.relative_to(root) for path in root.rglob("*")}
        for array in (root / "videos" / "killed", root / "teachers" / "t" / "killed"):
            process = warm.run(array, code=KILLED)
            assert process.returncode == -signal.SIGKILL
        temporary = {path for path in root.rglob("*.partial") if path.is_file()}
        assert len(temporary) == 2
        for name in (f"zarr.json.{os.getpid()}.partial", f".zarr.json.{os.getpid()}.partial"):
            (root / name).write_text("{")
        similar = [
            root / "mine.partial",
            root / f"{HEX}.partial",
            root / f"x.{HEX.upper()}.partial",
            root / f"{HEX}.txt",
        ]
        for path in similar:
            path.write_text("mine")
        # A writer without the lock removes nothing.
        with pytest.raises(StoreError):
            StoreWriter(root, sampling=sampling)
        assert all(path.exists() for path in temporary)
        del writer
    with StoreWriter(root, sampling=sampling):
        assert set(root.rglob("*.partial")) == {
            path for path in similar if path.suffix == ".partial"
        }
        assert all(path.read_text() == "mine" for path in similar)
        assert store_files <= {path.relative_to(root) for path in root.rglob("*")}


@pytest.mark.slow
def test_temporary_names_of_zarr_match_the_pattern(tmp_path: Path) -> None:
    """It fails once zarr changes the names of its temporary files."""
    from distinit.pipeline.common.files import _TEMPORARY_IN_STORE

    warm.run(tmp_path / "a", code=KILLED)
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(names) == 1
    assert _TEMPORARY_IN_STORE.fullmatch(names[0])


def test_the_next_writer_of_a_run_removes_temporary_files(tmp_path: Path) -> None:
    temporary = [
        tmp_path / ".student.safetensors.123.partial",
        tmp_path / "checkpoints" / ".last.pt.9.partial",
    ]
    similar = [
        tmp_path / "student.safetensors",
        tmp_path / ".notes.partial",
        tmp_path / "sub" / ".config.yaml.99.partial",
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "checkpoints").mkdir()
    for path in temporary + similar:
        path.write_text("x")
    (tmp_path / ".config.yaml.5.partial").mkdir()
    with folder_lock(tmp_path):
        assert not any(path.exists() for path in temporary)
        assert all(path.exists() for path in similar)
