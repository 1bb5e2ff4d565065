"""Students in repositories of the Hugging Face hub: `hf://ORG/NAME`, or `hf://ORG/NAME@REVISION`.

Of a repository the safetensors file alone is read, so that nothing in it runs.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..common.errors import CheckpointError, third_party
from ..common.plugins import import_extra
from ..common.run_dir import MODEL_FILE

# Also with one slash, which is what a Path makes of it.
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?")


def is_hub_address(path: str | Path) -> bool:
    """Return whether a path is the address of a repository."""
    return str(path).startswith("hf:/") and not Path(path).exists()


def hub_model(address: str) -> Path:
    """Return the local file of a repository's model, downloaded into the hub's cache if needed.

    Raises:
        UsageError: huggingface_hub is missing.
        CheckpointError: Another form of address, or a file that cannot be fetched.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CheckpointError(f"{address}: expected hf://ORG/NAME or hf://ORG/NAME@REVISION")
    hub = import_extra("huggingface_hub", "hub", address)
    with third_party(f"{address}: {MODEL_FILE} cannot be fetched", CheckpointError):
        return Path(hub.hf_hub_download(match[1], MODEL_FILE, revision=match[2]))
