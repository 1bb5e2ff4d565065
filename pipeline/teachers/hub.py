"""Find weights and configurations of models on the Hugging Face Hub; code is never loaded.

Weights are safetensors. They are fetched into the user's cache of huggingface_hub. If downloads are
not allowed, only that cache is searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import WeightsError, first_line
from .teacher_options import TeacherSpec

_MODEL_FILES = [
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]


def need_safetensors(spec: TeacherSpec, path: Path) -> Path:
    """Return `path`; raise WeightsError if its suffix is not that of safetensors."""
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"weights file {path}: teacher {spec.name!r} takes safetensors alone; convert it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )
    return path


def hub_file(
    spec: TeacherSpec, repository: str, names: Sequence[str], revision: str | None = None
) -> Path:
    """Return the first of these files that a repository has.

    Args:
        spec: The teacher.
        repository: The repository on the Hub.
        names: The names of the files, the preferred one first.
        revision: The revision, by default the newest one.

    Raises:
        WeightsError: None of the files is cached or can be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def find_file(*, local: bool) -> str:
        last_error: Exception = FileNotFoundError(f"{repository} has none of {', '.join(names)}")
        for name in names:
            try:
                return hf_hub_download(repository, name, revision=revision, local_files_only=local)
            except EntryNotFoundError as error:
                last_error = error
        raise last_error

    return Path(_cached_or_fetched(spec, repository, find_file))


def hub_folder_of(spec: TeacherSpec, repository: str) -> Path:
    """Return a local folder with a repository's configuration and safetensors weights.

    Raises:
        WeightsError: The repository is not cached and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    def find_folder(*, local: bool) -> str:
        return str(
            snapshot_download(repository, allow_patterns=_MODEL_FILES, local_files_only=local)
        )

    return Path(_cached_or_fetched(spec, repository, find_folder))


def _cached_or_fetched(spec: TeacherSpec, repository: str, find: Callable[..., Any]) -> str:
    """Return the path that `find` returns; raise WeightsError if it fails."""
    try:
        return str(find(local=not spec.fetch))
    # huggingface_hub, httpx and the system raise errors of any type.
    except Exception as error:
        how = "cannot be fetched" if spec.fetch else "is not downloaded here"
        raise WeightsError(
            f"teacher {spec.name!r}: {repository} is not in the cache of huggingface_hub and {how} "
            f"({first_line(error)}); get it and pass --teacher-weights {spec.name}=FILE"
        ) from None
