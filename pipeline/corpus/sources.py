"""Turn what a user types as SOURCE into one table of videos, in an order that does not change.

SOURCE is [NAME=]WHERE; WHERE is a folder, a glob, one video, a list (`list.txt`, `@list`) or a csv with
a column `path`. A corpus is a name and the folder that its paths are relative to.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

import numpy as np

from ..errors import SourceError

VIDEO_EXTENSIONS = frozenset(
    (
        ".3g2 .3gp .apng .asf .avi .divx .dv .f4v .flv .gif .h264 .hevc .h265 .ivf .m1v .m2t .m2ts .m2v .m4v .mjpeg "
        ".mjpg .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut .obu .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv "
        ".wtv .y4m"
    ).split()
)
_LABEL = re.compile(r"(?:\s+|\s*,\s*)-?\d+\s*$")


@dataclass(frozen=True)
class Corpus:
    """A named set of videos under `root`, an absolute path (file-system bytes as surrogate escapes)."""

    name: str
    root: str


@dataclass(frozen=True)
class VideoList:
    """V videos: `paths[i]` is relative to the root of `corpora[corpus[i]]` (int32 [V]).

    `ignored`: files found in folders that are not videos, by extension.
    """

    corpora: tuple[Corpus, ...]
    corpus: np.ndarray
    paths: list[str]
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def absolute(self, i: int) -> str:
        """Absolute path of video `i`."""
        return os.path.join(self.corpora[self.corpus[i]].root, self.paths[i])


def list_videos(sources: Sequence[str]) -> VideoList:
    """The videos that `sources` name, without duplicates; order: sources, then names as bytes, or the list's.

    Files that a list names and that do not exist stay in the table: they fail later, with a reason.
    Raises SourceError where a source names nothing or a corpus name stands for two folders.
    """
    corpora: list[Corpus] = []
    corpus: list[int] = []
    paths: list[str] = []
    seen: set[tuple[int, str]] = set()
    ignored: Counter[str] = Counter()
    for source in sources:
        name, where = _split_name(source)
        others: Counter[str] = Counter()
        found = _look(where, others)
        place = _place(corpora, Corpus(name or found.name, found.root))
        count = 0
        for path in found.paths:
            count += 1
            if (place, path) not in seen:
                seen.add((place, path))
                corpus.append(place)
                paths.append(path)
        ignored.update(others)
        if not count:
            kinds = f" among {sum(others.values())} other files" if others else ""
            raise SourceError(f"no videos found in {source!r}{kinds}")
    if not paths:
        raise SourceError("no videos: name at least one folder, glob, list or file")
    return VideoList(tuple(corpora), np.array(corpus, np.int32), paths, dict(ignored))


@dataclass(frozen=True)
class _Found:
    name: str
    root: str
    paths: Iterator[str]


def _split_name(source: str) -> tuple[str, str]:
    """NAME=WHERE → both; a WHERE that exists as it is typed, or has a separator before `=`, has no name."""
    name, equals, where = source.partition("=")
    if not equals or os.path.lexists(source) or os.sep in name or name.startswith("@"):
        return "", source
    if not name or not where:
        raise SourceError(f"source {source!r} is not [NAME=]WHERE")
    return name, where


def _place(corpora: list[Corpus], new: Corpus) -> int:
    """Index of the corpus in the list, appended if its name is new."""
    for place, corpus in enumerate(corpora):
        if corpus.name == new.name:
            if corpus.root != new.root:
                both = f"{corpus.root!r} and {new.root!r}"
                raise SourceError(f"corpus {new.name!r} stands for two folders, {both}: give one another name")
            return place
    corpora.append(new)
    return len(corpora) - 1


def _look(where: str, ignored: Counter[str]) -> _Found:
    """What `where` is: its default name, its root, its paths relative to the root."""
    if where.startswith("@") and not os.path.lexists(where):
        return _text_list(where[1:])
    absolute = os.path.abspath(where)
    if os.path.isdir(absolute):
        return _Found(_base(absolute), absolute, _walk(absolute, ignored))
    extension = os.path.splitext(absolute)[1].lower()
    if os.path.isfile(absolute):
        if extension in (".txt", ".lst", ".list"):
            return _text_list(absolute)
        if extension in (".csv", ".tsv"):
            return _csv_list(absolute)
        folder, file = os.path.split(absolute)
        return _Found(_base(folder), folder, iter([file]))
    if glob.has_magic(where):
        return _glob(absolute)
    kind = "file" if extension else "folder"
    raise SourceError(f"no such {kind}: {where!r}")


def _base(folder: str) -> str:
    return os.path.basename(folder) or "root"


def _is_video(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def _walk(root: str, ignored: Counter[str]) -> Iterator[str]:
    """Videos below `root`, links followed, each folder once even where links go in circles."""
    found: list[str] = []
    visited: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        below = pending.pop()
        folder = os.path.join(root, below) if below else root
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda e: os.fsencode(e.name))
        except OSError as error:
            if not below:
                raise SourceError(f"folder {folder!r} cannot be read: {error.strerror}") from error
            ignored["(unreadable folder)"] += 1
            continue
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = os.path.join(below, entry.name) if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                pending.append(path)
            elif _is_video(entry.name):
                found.append(path)
            else:
                ignored[os.path.splitext(entry.name)[1].lower() or "(none)"] += 1
    found.sort(key=os.fsencode)
    yield from found


def _glob(pattern: str) -> _Found:
    """Files that match; the root is the deepest folder without a wildcard."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    matches = [m for m in glob.glob(pattern, recursive=True) if os.path.isfile(m) and _is_video(_base(m))]
    paths = sorted((os.path.relpath(m, fixed) for m in matches), key=os.fsencode)
    return _Found(_base(fixed), fixed, iter(paths))


def _text_list(file: str) -> _Found:
    """A path a line, relative to the list's folder; `#` begins a comment line; a trailing label goes."""
    absolute = os.path.abspath(file)
    folder = os.path.dirname(absolute)
    text = os.fsdecode(_read(absolute))
    paths = []
    for line in text.lstrip("\ufeff").split("\n"):
        line = line.rstrip("\r")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not os.path.lexists(os.path.join(folder, line)):
            line = _LABEL.sub("", line).strip()
        paths.append(_relative(line, folder))
    return _Found(os.path.splitext(_base(absolute))[0], folder, iter(paths))


def _csv_list(file: str) -> _Found:
    """The column `path` of a csv (tab-separated: .tsv), relative to the csv's folder."""
    folder = os.path.dirname(file)
    delimiter = "\t" if file.lower().endswith(".tsv") else ","
    text = os.fsdecode(_read(file)).lstrip("\ufeff")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = list(reader.fieldnames or ())
    if "path" not in columns:
        raise SourceError(f"{file!r} needs a column `path`, its columns are {', '.join(columns) or 'none'}")
    try:
        paths = [_relative(row["path"], folder) for row in reader if row["path"]]
    except csv.Error as error:
        raise SourceError(f"{file!r} line {reader.line_num}: {error}") from error
    return _Found(os.path.splitext(_base(file))[0], folder, iter(paths))


def _relative(path: str, folder: str) -> str:
    """A listed path relative to `folder`; one that lies elsewhere keeps its ../"""
    return os.path.normpath(os.path.relpath(path, folder) if os.path.isabs(path) else path)


def _read(file: str) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise SourceError(f"list {file!r} cannot be read: {(error.strerror or str(error)).lower()}") from error


def escape_path(path: str) -> str:
    """A path as printable, valid UTF-8: `%`, control and other unprintable characters as %XX of their bytes."""
    return "".join(c if c != "%" and c.isprintable() else _percent(c) for c in path)


def unescape_path(text: str) -> str:
    """The inverse of `escape_path`."""
    return os.fsdecode(unquote_to_bytes(text))


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))
