"""Read lists and csv files as editors save them; anything but UTF-8 text is refused first."""

from __future__ import annotations

import codecs
import os
import re

from ..common.errors import ListError

MAX_BYTES = 1 << 30
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a list; bytes that are not UTF-8, as file names may have them, become surrogates.

    Raises:
        ListError: the file is UTF-16, UTF-32 or not text, or larger than a list of some million
            videos.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1) if os.fstat(file.fileno()).st_size <= MAX_BYTES else None
    if data is None or len(data) > MAX_BYTES:
        raise ListError(
            f"{os.fspath(path)}: more than {MAX_BYTES:,} bytes, which is no list of videos or labels"
        )
    named = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if named is None and b"\0" in data:  # in UTF-16 without a mark every line end has one
        named = "UTF-16 without a byte order mark, or not text"
    if named is not None:
        raise ListError(f"{os.fspath(path)}: the file is {named}; save it as text in UTF-8")
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def is_utf8(text: str) -> bool:
    """Return whether a text read by `read_text` or given by the system can be written as UTF-8."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def refuse_windows_paths(file: str, root: str, paths: list[str]) -> None:
    r"""Raise ListError for `C:\a.mp4`, `\\host\a.mp4` and `b\a.mp4` that are no files of `root`."""
    none_exists: bool | None = None
    for path in paths:
        if "\\" not in path and not _WINDOWS.match(path):
            continue
        if os.path.lexists(os.path.join(root, path)):
            continue
        windows = bool(_WINDOWS.match(path)) or os.path.exists(
            os.path.join(root, path.replace("\\", "/"))
        )
        if not windows:  # a Linux file may have a backslash in its name, and may have been deleted
            if none_exists is None:
                none_exists = not any(os.path.lexists(os.path.join(root, each)) for each in paths)
            windows = none_exists
        if windows:
            raise ListError(
                f"{file}: {path!r} is a path of Windows; expected paths with /, relative to {root} or absolute"
            )
