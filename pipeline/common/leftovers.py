"""Temporary files that a killed process left behind, known by the names that only such files
have."""

from __future__ import annotations

import os
import re
from pathlib import Path

_IN_STORE = re.compile(
    r".+\.[0-9a-f]{32}\.partial"  # of zarr, which writes a file under this name and renames it
    r"|zarr\.json\.\d+\.partial"  # of targets.format
)
_IN_RUN = re.compile(
    r"\..+\.safetensors\.\d+\.partial|\.distinit-\d+\.tmp"
)  # of students.export, stages.config


def sweep_store(root: Path) -> None:
    """Remove temporary files from a store. Its lock must be held: they are those of no process that
    lives."""
    for folder, _, names in os.walk(root):
        for name in filter(_IN_STORE.fullmatch, names):
            os.unlink(os.path.join(folder, name))


def sweep_run(folder: str | os.PathLike[str]) -> None:
    """Remove temporary files from a run folder, whose lock must be held."""
    for name in filter(_IN_RUN.fullmatch, os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path) or os.path.islink(path):
            os.unlink(path)
