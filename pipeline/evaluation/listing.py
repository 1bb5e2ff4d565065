"""The result of a reader of labels: the videos as listed, before any check."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..common.documents import is_utf8, read_text
from ..common.errors import LabelsError
from ..corpus.sources import escape_path, is_video

# Every split has these two sides; a user's labels may have a validation side as well.
SIDES = ("train", "test")
VAL = "val"


@dataclass(frozen=True)
class Row:
    """A video as listed.

    Attributes:
        path: Path of the video relative to `Listing.root`.
        label: Name of its class.
        side: "train", "test" or "val".
        location: Place in the list, such as "line 5", for messages.
        source: The recording that it was cut from, "" if unknown.
    """

    path: str
    label: str
    side: str
    location: str
    source: str = ""


@dataclass(frozen=True)
class Listing:
    """One split as its files describe it.

    Attributes:
        origin: The file or folder of the list, for messages.
        root: The folder that paths are relative to.
        rows: The listed videos.
        classes: Names in the order of the data set; None for the names of the rows, sorted.
        unlabelled: Videos next to the listed ones that are not listed, relative to `root`.
        official: Whether the lists are published ones, which are used as they are.
        download_hint: How to get missing files, for messages.
        notes: Notes on files that the reader skipped or matched inexactly, one line each.
    """

    origin: str
    root: str
    rows: list[Row]
    classes: tuple[str, ...] | None = None
    unlabelled: tuple[str, ...] = ()
    official: bool = False
    download_hint: str = ""
    notes: tuple[str, ...] = ()


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file, stripped of spaces and CR, without empty ones.

    Raises:
        LabelsError: The file cannot be read.
    """
    try:
        return [line.strip() for line in read_text(path).split("\n") if line.strip()]
    except OSError as error:
        raise LabelsError(f"{path}: cannot read the list ({error.strerror})") from error


def require_utf8(path: str, location: str, cells: Iterable[str]) -> None:
    """Check that cells of a csv are UTF-8, as models and results require.

    Raises:
        LabelsError: A cell is not UTF-8.
    """
    for cell in cells:
        if not is_utf8(cell):
            raise LabelsError(
                f"{path}: {location}: {escape_path(cell)!r} is not UTF-8; save the file as csv in UTF-8"
            )


def videos_in(root: str, folders: Iterable[str]) -> list[str]:
    """List the videos directly in these folders, sorted, with paths relative to `root`."""
    videos = []
    for folder in sorted(set(folders)):
        try:
            names = os.listdir(os.path.join(root, folder))
        except OSError:
            # The folder does not exist: videos listed in it are reported as missing.
            continue
        videos += [
            os.path.normpath(os.path.join(folder, name)) for name in sorted(names) if is_video(name)
        ]
    return videos


def first_few(names: Iterable[str], n: int = 3) -> str:
    """Format the first `n` names for a message: `'a', 'b', …`."""
    shown = [repr(escape_path(name)) for name in names]
    return ", ".join(shown[:n]) + (", …" if len(shown) > n else "")


class NameMatcher:
    """Match names of a list to files whose case or ending may differ.

    UCF-101 has `HandstandPushups` in its lists and `HandStandPushups` in its archive, unpacking on
    a case-insensitive disk causes more differences, and many users convert videos to mp4. An exact
    match comes first, then one that differs only in case, then one with another ending. If several
    files match equally well, none is used.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.exact = set(names)
        self._folded: dict[str, str | None] = {}
        self._stems: dict[str, str | None] = {}
        for name in self.exact:
            for index, key in ((self._folded, name.casefold()), (self._stems, _stem(name))):
                index[key] = None if key in index else name

    def find(self, name: str) -> str | None:
        """Return the name on the disk, None unless exactly one file matches."""
        if name in self.exact:
            return name
        folded = self._folded.get(name.casefold())
        return folded if name.casefold() in self._folded else self._stems.get(_stem(name))


def other_endings(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return a note on files whose ending differs from that in the list.

    Args:
        pairs: (name in the list, name on the disk) of each video.
    """
    endings = Counter(
        os.path.splitext(actual)[1]
        for listed, actual in pairs
        if _ending(listed) != _ending(actual)
    )
    if not endings:
        return ()
    shown = ", ".join(f"{count} as {ending}" for ending, count in endings.most_common())
    return (
        f"{endings.total()} videos have a different ending than in the lists ({shown}): not the published files",
    )


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].casefold()


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].casefold()


def short_dataset(dataset: str) -> str:
    """Shorten a data set: `csv:/data/har7/labels.csv` → `har7/labels.csv`, `folder:/a/b` → `b`."""
    kind, colon, path = dataset.partition(":")
    if not colon:
        return dataset
    parts = Path(path).parts
    return "/".join(parts[-2:] if kind == "csv" else parts[-1:])
