"""Safetensors files, compared with the digest in them before they are opened. Free of torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, DistInitError
from .sealed import check_seal

log = logging.getLogger(__name__)


@contextmanager
def open_checked(path: str | os.PathLike[str], framework: str) -> Iterator[Any]:
    """Open a safetensors file as `safe_open` does.

    Args:
        path: The file.
        framework: "pt" or "np", the kind of its tensors.

    Raises:
        CheckpointError: Another file, or a damaged one; also where reading it fails while it is
            open.
    """
    sealed = check_seal(path, CheckpointError)
    try:
        with safe_open(path, framework=framework) as file:
            if not sealed and "distinit" in (file.metadata() or {}):
                log.warning(
                    "%s: written by distinit 0.1, without a digest: damage cannot be found", path
                )
            yield file
    except DistInitError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged ({error})") from None
