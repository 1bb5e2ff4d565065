"""The folder of a run or an ablation: the names of its files, and checks before writing.

All checks raise a UsageError that names `--out`:

- `claim_run_dir`: the folder of a training run, with or without `--resume`
- `check_output_dir`: any folder whose config names the command that wrote it
- `check_page_dir`: the folder of a page, which names its generator
- `config_next_to`: a store or a file, whose config is next to it
- `require_writable`: any folder in which files can be written
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml

from .config import SECTIONS
from .documents import is_utf8, load_yaml, read_bytes
from .errors import SourceError, UsageError
from .locks import folder_lock
from .streams import printable
from .urls import check_local

# The options as used. This file identifies the command that wrote a folder.
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
TRACKERS = "trackers.json"  # last steps that were sent to W&B and trackio
RESULT = "result.json"
LAST = "checkpoints/last.pt"
STUDENT_FILE = "student.safetensors"  # of train-student
MODEL_FILE = "model.safetensors"  # of finetune
START = "start.safetensors"  # the weights before the first step
SEARCH = "search.json"  # candidates of finetune --search
SEEN_VIDEOS = "seen_videos.npz"
LOADER_CRASHES = "loader_crashes.json"
LABELS = "labels.json"
PREDICTIONS, PARTIAL_PREDICTIONS = "predictions.h5", "predictions.partial.h5"

# Any of these means that a folder holds a run.
RUN_FILES = (LAST, METRICS, STUDENT_FILE, MODEL_FILE, LOADER_CRASHES, SEARCH)
TEST_FILES = (PREDICTIONS, PARTIAL_PREDICTIONS, RESULT)

CELLS, SECONDS = "cells.json", "seconds.json"  # of an ablation
STEP_FOLDERS = {"train-student": "students", "finetune": "finetunes"}

# Pages of version 0.1 have no generator, but name it in the lead.
_BY_DISTINIT = re.compile(
    r"<meta name=generator content=distinit>"
    r"|\bdistinit 0\.1\.\w+\. (Every accuracy is recomputed|Entropies are in nats)"
)


def claim_run_dir(run_dir: Path, *, resume: bool | Literal["auto"]) -> None:
    """Create the folder of a run.

    Raises:
        UsageError: It holds a run and `resume` is off, or it holds none and `resume` is True, or it
            cannot be created.
    """
    if not is_utf8(os.fspath(run_dir)):
        # TensorBoard's writer fails on such a path.
        raise UsageError(
            f"--out {printable(os.fspath(run_dir))}: the path is not UTF-8; choose another --out"
        )
    if resume is True and not any((run_dir / name).exists() for name in (*RUN_FILES, CONFIG)):
        raise UsageError(f"--resume: {run_dir} holds no run; --resume auto begins one")
    run_files = [name for name in RUN_FILES if (run_dir / name).exists()]
    if run_files and not resume:
        raise UsageError(
            f"{run_dir} already holds a run ({run_files[0]}); add --resume to continue it, or choose another --out"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {run_dir} cannot be created: {error.strerror}") from error


@contextmanager
def run_dir_lock(run_dir: Path, *, resume: bool | Literal["auto"]) -> Iterator[None]:
    """Claim the folder of a run and lock it against every other command that writes there.

    Raises:
        UsageError: See `claim_run_dir`.
    """
    claim_run_dir(run_dir, resume=resume)
    with folder_lock(run_dir):
        # Another command may have begun a run in this folder in the meantime.
        claim_run_dir(run_dir, resume=resume)
        yield


def check_output_dir(
    folder: Path, command: str, writes: Iterable[str] = (), *, record: str = CONFIG
) -> None:
    """Check that a command overwrites nothing in a folder but its own files.

    The config in a folder, see `write_config`, proves which command wrote it. Names of other files
    and of folders prove nothing.

    Args:
        folder: Where the command would write.
        command: Name of the command.
        writes: Names of the other files that the command writes into the folder.
        record: Name of the file that holds the config.

    Raises:
        UsageError: The config is of another command, or it is missing and one of `writes` exists,
            or the folder is a Zarr store or in one, where files of a run are not allowed.
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
    """Return the path of the config of a command whose result is one file or store.

    Raises:
        UsageError: That file exists and is no config of distinit.
    """
    # "." has no name, its absolute path does.
    absolute = Path(os.path.abspath(path))
    record = absolute.with_name(f"{absolute.name}.config.yaml")
    if not recorded_sections(record):
        refuse_existing(record.parent, (record.name,), "distinit")
    return record


def check_page_dir(page: Path, names: Iterable[str] = ()) -> None:
    """Check that a page, and files of these names next to it, overwrite only files of distinit.

    The first lines of an existing page name its generator.

    Raises:
        UsageError: One of the files exists and distinit did not write the page, or the folder is a
            URL.
    """
    check_local(page.parent)
    try:
        by_distinit = (
            _BY_DISTINIT.search(page.read_text(encoding="utf-8", errors="replace")) is not None
        )
    except OSError:
        by_distinit = False
    if not by_distinit:
        refuse_existing(page.parent, (page.name, *names), "distinit")


def refuse_existing(folder: Path, names: Iterable[str], writer: str) -> None:
    """Check that none of the files exists.

    Args:
        folder: Where they would be written.
        names: Names of the files.
        writer: The command that writes them, for the message.

    Raises:
        UsageError: One of them exists.
    """
    for name in names:
        if os.path.lexists(folder / name):
            raise UsageError(
                f"--out {folder}: its {name} was not written by {writer}, which would overwrite it; "
                f"choose another --out"
            )


def recorded_sections(config: Path) -> set[str]:
    """Return the commands whose sections a config has; none for any other file."""
    try:
        content = load_yaml(read_bytes(config).decode("utf-8"))
    except (SourceError, UnicodeDecodeError, yaml.YAMLError):
        return set()
    is_config = isinstance(content, dict) and set(content) <= set(SECTIONS)
    return set(content) if is_config else set()


def require_no_store(folder: Path) -> None:
    """Check that a folder is neither a Zarr store nor in one.

    Raises:
        UsageError: It is, or it is a URL.
    """
    check_local(folder)
    absolute = Path(os.path.realpath(folder))
    store = next(
        (path for path in (absolute, *absolute.parents) if (path / "zarr.json").exists()), None
    )
    if store is not None:
        reason = "is a Zarr store" if store == absolute else f"is in the Zarr store {store}"
        raise UsageError(f"--out {folder}: {reason}; choose another --out")


def require_writable(folder: Path) -> None:
    """Create the folder and check that files can be written, before the work is done.

    Raises:
        UsageError: It cannot be written.
    """
    require_no_store(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"trial")
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(
            f"--out {folder}: cannot be written: {reason}; choose another --out"
        ) from error
