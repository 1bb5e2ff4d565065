"""Weights that torchvision publishes: from torch hub's cache, or fetched by torchvision."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from .errors import WeightsError, first_line
from .weights import WeightsFile, load_weights


def hub_folder() -> Path:
    """Where torch hub keeps checkpoints: TORCH_HOME, or the user's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def library_weights(
    choice: Any, sha256: str | None = None, *, who: str, remedy: str, fetch: bool = True
) -> WeightsFile:
    """Return the weights of a member of torchvision's enums, as ResNet18_Weights.IMAGENET1K_V1.

    Args:
        choice: The member of the enum.
        sha256: What the file's must be, if given.
        who: Who requires them, for the message where they cannot be had.
        remedy: What to do with a file, for the same message.
        fetch: Whether they may be downloaded.

    Raises:
        WeightsError: Not in the cache and cannot be fetched, another sha256, or damaged.
    """
    path = hub_folder() / Path(urlparse(choice.url).path).name
    if not path.is_file():
        if not fetch:
            raise WeightsError(
                f"{who}: {path.name} is not in {path.parent} and is not downloaded here; {remedy}"
            )
        try:
            choice.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"{who}: {path.name} is not in {path.parent} and cannot be fetched "
                f"({first_line(error)}); "
                f"get {choice.url} and {remedy}"
            ) from None
    return load_weights(path, sha256)
