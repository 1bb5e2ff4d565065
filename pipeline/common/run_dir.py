"""The folder of a run or an ablation: the names of its files, and whether a command may write."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from .config import SECTIONS
from .documents import load_yaml, read_bytes
from .errors import SourceError, UsageError
from .urls import check_local

CONFIG = "config.yaml"  # as used; by it a folder is known as the work of its command
METRICS = "metrics.jsonl"
RESULT = "result.json"
LAST = "checkpoints/last.pt"
STUDENT_FILE, MODEL_FILE = (
    "student.safetensors",
    "model.safetensors",
)  # of train-student, of finetune
START = "start.safetensors"  # the weights before the first step
SEEN_VIDEOS = "seen_videos.npz"
LOADER_CRASHES = "loader_crashes.json"
LABELS = "labels.json"
PREDICTIONS, PARTIAL_PREDICTIONS = "predictions.h5", "predictions.partial.h5"

RUN_FILES = (
    LAST,
    METRICS,
    STUDENT_FILE,
    MODEL_FILE,
    LOADER_CRASHES,
)  # any of these means that a folder holds a run
TEST_FILES = (PREDICTIONS, PARTIAL_PREDICTIONS, RESULT)

CELLS, SECONDS = "cells.json", "seconds.json"  # of an ablation
STEP_FOLDERS = {"train-student": "students", "finetune": "finetunes"}

# Pages of version 0.1 have no generator, but name it in the lead.
_OURS = re.compile(
    r"<meta name=generator content=distinit>"
    r"|\bdistinit 0\.1\.\w+\. (Every accuracy is recomputed|Entropies are in nats)"
)


def check_output_dir(
    folder: Path, command: str, writes: Iterable[str] = (), *, record: str = CONFIG
) -> None:
    """Check that a command overwrites nothing in a folder but what it wrote itself.

    The record of a folder that a command wrote is its config there, see `write_config`: names of
    other files and of folders prove nothing.

    Args:
        writes: names of the other files that the command writes into the folder.
        record: name of the file that holds the config.

    Raises:
        UsageError: The config is another command's, or there is none and one of `writes` exists, or
            the folder is a Zarr store or in one, where the files of a run have no place.
    """
    require_no_store(folder)
    sections = recorded_sections(folder / record)
    if sections == {command}:
        return
    if sections:
        raise UsageError(
            f"--out {folder}: its {record} is one of distinit {min(sections - {command})}, which {command} would "
            f"overwrite; choose another --out"
        )
    refuse_existing(folder, (record, *writes), f"distinit {command}")


def config_next_to(path: str | os.PathLike[str]) -> Path:
    """Return where the config is written of a command whose result is one file or store.

    Raises:
        UsageError: That file exists and is no config of distinit.
    """
    absolute = Path(os.path.abspath(path))  # "." has no name
    record = absolute.with_name(f"{absolute.name}.config.yaml")
    if not recorded_sections(record):
        refuse_existing(record.parent, (record.name,), "distinit")
    return record


def check_page_dir(page: Path, names: Iterable[str] = ()) -> None:
    """UsageError where writing `page`, and files of these names next to it, would overwrite what is
    not distinit's: the page is the record. Or where its folder is a URL."""
    check_local(page.parent)
    try:
        ours = _OURS.search(page.read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:
        ours = False
    for name in (page.name, *names) if not ours else ():
        if os.path.lexists(page.parent / name):
            raise UsageError(
                f"--out {page.parent}: its {name} was not written by distinit, which would overwrite it; "
                f"choose another --out"
            )


def refuse_existing(folder: Path, names: Iterable[str], writer: str) -> None:
    """UsageError where one of the files is in the folder; writer: whose work they are not, for the
    message."""
    for name in names:
        if os.path.lexists(folder / name):
            raise UsageError(
                f"--out {folder}: its {name} was not written by {writer}, which would overwrite it; "
                f"choose another --out"
            )


def recorded_sections(config: Path) -> set[str]:
    """The commands of which a config file has a section; none for a file that is no config of ours,
    or not there."""
    try:
        content = load_yaml(read_bytes(config).decode("utf-8"))
    except (SourceError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    return (
        set(content) & set(SECTIONS)
        if isinstance(content, dict) and set(content) <= set(SECTIONS)
        else set()
    )


def require_no_store(folder: Path) -> None:
    """UsageError where the folder is a Zarr store or below one, or is a URL."""
    check_local(folder)
    absolute = Path(os.path.realpath(folder))
    store = next(
        (place for place in (absolute, *absolute.parents) if (place / "zarr.json").exists()), None
    )
    if store is not None:
        where = "is a Zarr store" if store == absolute else f"is in the Zarr store {store}"
        raise UsageError(f"--out {folder}: {where}; choose another --out")


def require_writable(folder: Path) -> None:
    """UsageError where no file can be written into the folder, which is made: tried before the
    work, not after it."""
    require_no_store(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"trial")
    except OSError as error:
        why = error.strerror or error
        raise UsageError(
            f"--out {folder}: cannot be written: {why}; choose another --out"
        ) from error
