"""What the readers of label files hand over: the videos as listed, before any check."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from ..corpus.sources import EXTENSIONS, escape_path
from ..errors import LabelsError

SIDES = ("train", "test")


@dataclass(frozen=True)
class Row:
    """A video as listed. `where` says to a person where; `source`: the recording that a clip was cut from, "" where
    it is not known."""

    path: str
    label: str
    side: str
    where: str
    source: str = ""


@dataclass(frozen=True)
class Listing:
    """One split as its files describe it.

    origin: the file or folder that lists, for messages. root: what the paths are relative to.
    classes: in the order of the data set; None: the names, sorted. unlabelled: videos, relative to `root`, that lie
    among the listed ones and are not listed. official: its lists are published, and are used as they are.
    get: where to get what is missing.
    """

    origin: str
    root: str
    rows: list[Row]
    classes: tuple[str, ...] | None = None
    unlabelled: tuple[str, ...] = ()
    official: bool = False
    get: str = ""


def read_lines(path: str) -> list[str]:
    """The lines of a text file that hold something, stripped (official lists end them in CR LF). LabelsError."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the list ({error.strerror})") from error


def videos_in(root: str, folders: Iterable[str]) -> list[str]:
    """The videos that lie directly in these folders, paths relative to `root`, sorted."""
    found = []
    for folder in sorted(set(folders)):
        try:
            names = os.listdir(os.path.join(root, folder))
        except OSError:
            continue  # a folder that is not there: the videos listed in it are reported as missing
        found += [
            os.path.normpath(os.path.join(folder, name))
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in EXTENSIONS
        ]
    return found


def first_few(names: Iterable[str], n: int = 3) -> str:
    """`'a', 'b', …` for a message."""
    shown = [repr(escape_path(name)) for name in names]
    return ", ".join(shown[:n]) + (", …" if len(shown) > n else "")


class Names:
    """Files found by the name that a list gives them, in whatever case the disk has it.

    UCF-101's lists and archive disagree on `HandstandPushups` and `HandStandPushups`, and archives unpacked on a
    disk without case change more. An exact name wins; two files that differ in case alone match none of a third
    spelling.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = set(names)
        self._folded: dict[str, str | None] = {}
        for name in self.exact:
            key = name.casefold()
            self._folded[key] = None if key in self._folded else name

    def find(self, name: str) -> str | None:
        """The name on the disk; None where there is none, or no single one."""
        return name if name in self.exact else self._folded.get(name.casefold())
