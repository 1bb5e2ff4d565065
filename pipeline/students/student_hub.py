"""Students in repositories of the Hugging Face hub: `hf://ORG/NAME`, or `hf://ORG/NAME@REVISION`.

Only the safetensors file of a repository is read, so that no code of it runs.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..common.errors import CheckpointError, third_party
from ..common.plugins import import_extra
from ..common.run_dir import MODEL_FILE

# Path reduces the two slashes to one.
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")


def is_hub_address(path: str | Path) -> bool:
    """Return whether a path is the address of a repository of the hub."""
    return str(path).startswith("hf:/") and not Path(path).exists()


def hub_model(address: str) -> Path:
    """Return the local file of a repository's model, downloaded into the hub's cache if needed.

    Raises:
        UsageError: huggingface_hub is missing.
        CheckpointError: The address has another form, or the file cannot be downloaded.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CheckpointError(f"{address}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    hub = import_extra("huggingface_hub", "hub", address)
    with third_party(f"{address}: {MODEL_FILE} cannot be fetched", CheckpointError):
        return Path(hub.hf_hub_download(match[1], MODEL_FILE, revision=match[2]))
