"""Files of a report: whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import UsageError
from .streams import printable
from .urls import check_local

# Pages of version 0.1 have no generator, but name it in the lead.
_OURS = re.compile(
    r"<meta name=generator content=distinit>"
    r"|\bdistinit 0\.1\.\w+\. (Every accuracy is recomputed|Entropies are in nats)"
)


def check_output_dir(page: Path, names: Iterable[str] = ()) -> None:
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


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a page, which is never half there: it may be looked at. UsageError if it cannot be
    written.

    Text is escaped by `printable`: a page cannot hold control characters, and may be shown by a
    terminal.
    """
    part = path.with_name(f".{path.name}.part")
    data = content if isinstance(content, bytes) else printable(content, lines=True).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        with open(
            part, "xb"
        ) as file:  # whatever has the name by then, a link to another file, is not written to
            file.write(data)
        os.replace(part, path)
    except OSError as error:
        raise UsageError(
            f"--out {path.parent}: cannot write {path.name} ({error.strerror or error})"
        ) from error
