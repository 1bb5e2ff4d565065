"""Files of a report: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError


def write_whole(path: Path, content: str | bytes) -> None:
    """A page that is being looked at is replaced, never half there. UsageError if it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"--out {path.parent}: cannot write {path.name} ({error.strerror or error})") from error
