"""A file is written whole or not at all, and nothing is written through a link."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from distinit.pipeline.common import files
from distinit.pipeline.common.config import write_config
from distinit.pipeline.common.errors import CheckpointError, UsageError
from distinit.pipeline.common.files import replacing, write_page, write_whole
from distinit.pipeline.prepared.make_copy import CopyOptions
from distinit.pipeline.prepared.status import StatusFile

Write = Callable[[Path], object]


def replace(path: Path) -> None:
    with replacing(path) as part:
        part.write_bytes(b"new" * 1000)


def write_status(path: Path) -> None:
    status = StatusFile(path)
    status.set(("corpus", "a.mp4"), {"status": "ok", "reason": "x" * 3000})
    status.finish([])


WRITERS: list[Write] = [
    replace,
    write_status,
    lambda path: write_whole(path, b"new" * 1000, CheckpointError),
    lambda path: write_page(path, "new" * 1000),
    lambda path: write_config(path, "x" * 3000, CopyOptions()),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_the_existing_file(
    tmp_path: Path, write: Write, exists: bool
) -> None:
    path = tmp_path / "file"
    if exists:
        path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Exception) as failed:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(failed.value.__cause__ or failed.value, OSError)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")] * exists


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_is_replaced_and_not_followed(tmp_path: Path, write: Write) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    for name in ("file", f".file.{os.getpid()}.partial"):
        (folder / name).symlink_to(victim)
    write(folder / "file")
    assert victim.read_text() == "precious"
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert not (folder / "file").is_symlink()


@pytest.mark.parametrize("write", WRITERS)
def test_the_file_and_its_folder_are_synced_around_the_rename(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, rename = files.fsync_path, os.replace

    def record_sync(path: Path) -> None:
        steps.append(path.name)
        sync(path)

    def record_rename(source: Path, target: Path) -> None:
        steps.append("rename")
        rename(source, target)

    monkeypatch.setattr(files, "fsync_path", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    write(tmp_path / "folder" / "file")
    assert steps == [f".file.{os.getpid()}.partial", "rename", "folder"]


def test_the_error_is_of_the_type_that_the_caller_names(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    for failure in (CheckpointError, UsageError):
        with pytest.raises(failure, match="file"):
            write_whole(tmp_path / "file", b"new", failure)
    assert not list((tmp_path / "file").iterdir())
