"""Temporary files of killed processes go with the next writer; files that only look like them
stay."""

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
# zarr is killed in the middle of a write: before it renames its file.
KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
import zarr
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
zarr.create_array(sys.argv[1], shape=(4,), chunks=(4,), dtype="int32")[:] = np.arange(4)
"""


@pytest.mark.slow
def test_the_next_writer_of_a_store_removes_what_zarr_left(tiny_store: Any, tmp_path: Path) -> None:
    store = TargetStore.open(tiny_store.path)
    root = tmp_path / "t.zarr"
    sampling = store.attributes["sampling"]
    with StoreWriter(root, sampling=sampling) as writer:
        before = {path.relative_to(root) for path in root.rglob("*")}
        for place in (root / "videos" / "killed", root / "teachers" / "t" / "killed"):
            done = warm.run(place, code=KILLED)
            assert done.returncode == -signal.SIGKILL
        left = {path for path in root.rglob("*.partial") if path.is_file()}
        assert len(left) == 2
        for name in (f"zarr.json.{os.getpid()}.partial", f".zarr.json.{os.getpid()}.partial"):
            (root / name).write_text("{")
        kept = [
            root / "mine.partial",
            root / f"{HEX}.partial",
            root / f"x.{HEX.upper()}.partial",
            root / f"{HEX}.txt",
        ]
        for path in kept:
            path.write_text("mine")
        with pytest.raises(StoreError):  # one that has no lock removes nothing
            StoreWriter(root, sampling=sampling)
        assert all(path.exists() for path in left)
        del writer
    with StoreWriter(root, sampling=sampling):
        assert set(root.rglob("*.partial")) == {path for path in kept if path.suffix == ".partial"}
        assert all(path.read_text() == "mine" for path in kept)
        assert before <= {path.relative_to(root) for path in root.rglob("*")}


@pytest.mark.slow
def test_zarrs_own_names_are_the_ones_that_are_swept(tmp_path: Path) -> None:
    """As long as zarr names its temporary files so."""
    from distinit.pipeline.common.files import _TEMPORARY_IN_STORE

    warm.run(tmp_path / "a", code=KILLED)
    names = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert len(names) == 1
    assert _TEMPORARY_IN_STORE.fullmatch(names[0])


def test_the_next_writer_of_a_run_removes_what_was_left(tmp_path: Path) -> None:
    left = [
        tmp_path / ".student.safetensors.123.partial",
        tmp_path / "checkpoints" / ".last.pt.9.partial",
    ]
    kept = [
        tmp_path / "student.safetensors",
        tmp_path / ".notes.partial",
        tmp_path / "sub" / ".config.yaml.99.partial",
    ]
    (tmp_path / "sub").mkdir()
    (tmp_path / "checkpoints").mkdir()
    for path in left + kept:
        path.write_text("x")
    (tmp_path / ".config.yaml.5.partial").mkdir()
    with folder_lock(tmp_path):
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)
