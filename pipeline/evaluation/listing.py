"""What the readers of label files hand over: the videos as listed, before any check."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import LabelsError
from ..corpus.sources import escape_path, is_video
from ..corpus.textfiles import is_utf8, read_text

SIDES = ("train", "test")


@dataclass(frozen=True)
class Row:
    """A video as listed. `where` says to a person where; `source`: the recording that a clip was
    cut from, "" where it is not known."""

    path: str
    label: str
    side: str
    where: str
    source: str = ""


@dataclass(frozen=True)
class Listing:
    """One split as its files describe it.

    origin: the file or folder that lists, for messages. root: what the paths are relative to.
    classes: in the order of the data set; None: the names, sorted. unlabelled: videos, relative to
    `root`, that lie among the listed ones and are not listed. official: its lists are published,
    and are used as they are.
    get: where to get what is missing. notes: what the reader left out or took for another, a line
        each.
    """

    origin: str
    root: str
    rows: list[Row]
    classes: tuple[str, ...] | None = None
    unlabelled: tuple[str, ...] = ()
    official: bool = False
    get: str = ""
    notes: tuple[str, ...] = ()


def read_lines(path: str) -> list[str]:
    """The lines of a text file that hold something, stripped (official lists end them in CR LF).
    LabelsError."""
    try:
        return [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the list ({error.strerror})") from error


def require_utf8(path: str, where: str, cells: Iterable[str]) -> None:
    """LabelsError for a cell of a csv that cannot be written into a model or a result: it is not
    UTF-8."""
    for cell in cells:
        if not is_utf8(cell):
            raise LabelsError(
                f"{path}: {where}: {escape_path(cell)!r} is not UTF-8; save the file as csv in UTF-8"
            )


def videos_in(root: str, folders: Iterable[str]) -> list[str]:
    """The videos that lie directly in these folders, paths relative to `root`, sorted."""
    found = []
    for folder in sorted(set(folders)):
        try:
            names = os.listdir(os.path.join(root, folder))
        except OSError:
            continue  # a folder that is not there: the videos listed in it are reported as missing
        found += [
            os.path.normpath(os.path.join(folder, name)) for name in sorted(names) if is_video(name)
        ]
    return found


def first_few(names: Iterable[str], n: int = 3) -> str:
    """`'a', 'b', …` for a message."""
    shown = [repr(escape_path(name)) for name in names]
    return ", ".join(shown[:n]) + (", …" if len(shown) > n else "")


class Names:
    """Files found by the name that a list gives them, in whatever case and with whatever ending the
    disk has it.

    UCF-101's lists and archive disagree on `HandstandPushups` and `HandStandPushups`, archives
    unpacked on a disk without case change more, and many convert the videos to mp4. An exact name
    wins, then one that differs in case alone, then one with another ending; of several such files
    none is taken.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = set(names)
        self._folded: dict[str, str | None] = {}
        self._stems: dict[str, str | None] = {}
        for name in self.exact:
            for known, key in ((self._folded, name.casefold()), (self._stems, _stem(name))):
                known[key] = None if key in known else name

    def find(self, name: str) -> str | None:
        """The name on the disk; None where there is none, or no single one."""
        if name in self.exact:
            return name
        folded = self._folded.get(name.casefold())
        return folded if name.casefold() in self._folded else self._stems.get(_stem(name))


def other_endings(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Of (listed, found) names, a note on those with another ending than the list gives them; none:
    no note."""
    endings = Counter(
        os.path.splitext(found)[1] for listed, found in pairs if _ending(listed) != _ending(found)
    )
    if not endings:
        return ()
    shown = ", ".join(f"{count} as {ending}" for ending, count in endings.most_common())
    return (
        f"{endings.total()} videos have another ending than in the lists ({shown}): not the files as published",
    )


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].casefold()


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].casefold()


def short_dataset(dataset: str) -> str:
    """`csv:/data/har7/labels.csv` → `har7/labels.csv`, `folder:/data/mine` → `mine`."""
    kind, colon, path = dataset.partition(":")
    if not colon:
        return dataset
    parts = Path(path).parts
    return "/".join(parts[-2:] if kind == "csv" else parts[-1:])
