"""Weights and configurations of models on the Hugging Face Hub: data alone, never code.

Weights are safetensors. What is asked for by name is fetched into the user's own cache of
huggingface_hub; where nothing may be downloaded, only that cache is looked at.
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
    """Return `path`; WeightsError if it is a weights file of another kind."""
    if path.suffix != ".safetensors":
        raise WeightsError(
            f"weights file {path}: teacher {spec.name!r} takes safetensors alone; convert it: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )
    return path


def hub_file(
    spec: TeacherSpec, repository: str, names: Sequence[str], revision: str | None = None
) -> Path:
    """Return the first of these files that a repository has, of its newest revision by default.

    Raises:
        WeightsError: None is in the cache, and none can be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def first(*, local: bool) -> str:
        missing: Exception = FileNotFoundError(f"{repository} has none of {', '.join(names)}")
        for name in names:
            try:
                return hf_hub_download(repository, name, revision=revision, local_files_only=local)
            except EntryNotFoundError as error:
                missing = error
        raise missing

    return Path(_cached_or_fetched(spec, repository, first))


def hub_folder_of(spec: TeacherSpec, repository: str) -> Path:
    """Return a local folder with a repository's configuration and safetensors weights.

    Raises:
        WeightsError: It is not in the cache, and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    def folder(*, local: bool) -> str:
        return str(
            snapshot_download(repository, allow_patterns=_MODEL_FILES, local_files_only=local)
        )

    return Path(_cached_or_fetched(spec, repository, folder))


def _cached_or_fetched(spec: TeacherSpec, repository: str, find: Callable[..., Any]) -> str:
    try:
        return str(find(local=not spec.fetch))
    except Exception as error:  # huggingface_hub's, httpx's or the system's
        how = "cannot be fetched" if spec.fetch else "is not downloaded here"
        raise WeightsError(
            f"teacher {spec.name!r}: {repository} is not in the cache of huggingface_hub and {how} "
            f"({first_line(error)}); get it and pass --teacher-weights {spec.name}=FILE"
        ) from None
