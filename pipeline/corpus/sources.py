"""Turn folders, globs, lists and csv files into one ordered table; each source is a named corpus.

A file name may have any bytes except NUL and the slash. Names are `str` with surrogate escapes
(`os.fsdecode`) and are stored percent-escaped, since Zarr strings must be UTF-8.

A `Part` is the share of one of several machines that share no disk. The share of a video depends
only on the name of its corpus and its path in it. So each machine can compute its share alone, even
if folders have different locations or one machine lacks a file, and no video changes its share when
the list grows. The sizes of the shares are therefore only nearly equal.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from ..common.documents import read_text, refuse_windows_paths
from ..common.errors import SourceError, UsageError
from ..common.streams import counted

# Marks a folder that `distinit prepare` wrote.
MARKER = "prepared.json"

EXTENSIONS = frozenset(
    f".{ending}"
    for ending in re.findall(
        r"\w+",
        "263 264 265 266 3g2 3gp 3gp2 3gpp 3gpp2 amv apng asf av1 avc avi bik dav divx drc dv evo f4v flc fli flv gif "
        "gxf h261 h263 h264 h265 h266 hevc insv ismv ivf kux lrv m1v m2p m2t m2ts m2v m4v mjpeg mjpg mk3d mkv mov "
        "mp2v mp4 mp4v mpe mpeg mpeg4 mpg mpg4 mpv mpv2 mts mxf nsv nut nuv obu ogg ogm ogv qt rm rmvb roq smk tp "
        "trp ts vc1 vob vro vvc webm wmv wtv xvid y4m",
    )
)
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)
_LABEL = re.compile(r"(.*\S)(?:\s*,\s*|\s+)-?\d+\s*", re.DOTALL)


@dataclass(frozen=True)
class Corpus:
    """A named set of videos under one folder; the name stays when the folder moves."""

    name: str
    root: str


@dataclass(frozen=True)
class VideoList:
    """The listed videos [V]: corpus number and path relative to that corpus' root."""

    corpora: tuple[Corpus, ...]
    corpus: NDArray[np.int32]
    paths: list[str]
    ignored: dict[str, int] = field(default_factory=dict)
    """Ending → number of files that were ignored because of it."""

    def __len__(self) -> int:
        return len(self.paths)

    def absolute(self, i: int) -> str:
        """Return the absolute path of video `i`."""
        return os.path.join(self.corpora[int(self.corpus[i])].root, self.paths[i])

    def describe(self) -> str:
        """Return a text such as `12 videos in clips`, with the ignored files."""
        ignored = _describe_endings(self.ignored)
        names = ", ".join(corpus.name for corpus in self.corpora)
        return f"{counted(len(self), 'video')} in {names}" + (
            f" (not videos: {ignored})" if ignored else ""
        )


@dataclass(frozen=True)
class Part:
    """Share `number` of `num_parts`, counted from 1."""

    number: int
    num_parts: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `i/n` with 1 ≤ i ≤ n.

        Raises:
            UsageError: The text has another form.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"must be i/n with 1 ≤ i ≤ n, as in 2/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.num_parts}"

    def contains(self, corpus: str, path: str) -> bool:
        """Return whether the video at `path` of the corpus is in this share."""
        key = os.fsencode(corpus) + b"\0" + os.fsencode(path)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.num_parts == self.number - 1

    def share(self, videos: VideoList) -> VideoList:
        """Return the videos of this share, in their order."""
        names = [c.name for c in videos.corpora]
        indices = [
            i
            for i, path in enumerate(videos.paths)
            if self.contains(names[int(videos.corpus[i])], path)
        ]
        return VideoList(
            videos.corpora,
            videos.corpus[np.array(indices, np.int64)],
            [videos.paths[i] for i in indices],
            videos.ignored,
        )


def list_videos(sources: Sequence[str]) -> VideoList:
    """List all videos of the sources, in their order, each file once.

    A source is `[NAME=]WHERE`. WHERE is a folder (searched recursively for files with the ending of
    a video), a quoted glob, one video file, a list (`list.txt` or `@list`: one path per line,
    relative to the list; a trailing label as in `a.mp4 3` is ignored) or a csv file with a column
    `path`. A line of a list that begins with `#` is a comment unless a file has that name. NAME
    defaults to the name of the folder or list. Listed files that do not exist stay in the table, so
    that they get a status and are not silently omitted.

    Raises:
        SourceError: A source has no videos, one name has two folders, or a list is in UTF-16 or
            has Windows paths.
    """
    corpora: dict[str, str] = {}
    rows: dict[tuple[str, str], None] = {}
    ignored: Counter[str] = Counter()
    for source in sources:
        skipped: Counter[str] = Counter()
        name, root, paths = _expand(source, skipped)
        if corpora.setdefault(name, root) != root:
            raise SourceError(
                f"{source}: corpus {name!r} is already {corpora[name]}; give this one another name, as in new={root}"
            )
        if not paths:
            endings = _describe_endings(skipped)
            raise SourceError(
                f"{source}: no videos found" + (f" (other files: {endings})" if endings else "")
            )
        ignored += skipped
        rows.update(dict.fromkeys((name, p) for p in paths))
    if not rows:
        raise SourceError("no videos found: no source given")
    number = {name: i for i, name in enumerate(corpora)}
    return VideoList(
        tuple(Corpus(name, root) for name, root in corpora.items()),
        np.fromiter((number[name] for name, _ in rows), np.int32, len(rows)),
        [path for _, path in rows],
        dict(ignored),
    )


def is_video(path: str) -> bool:
    """Return whether the file has the ending of a video."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def escape_path(path: str) -> str:
    """Percent-escape `%`, control characters and bytes that are not UTF-8.

    All other characters stay as they are.
    """
    # The usual case, made fast: the function is called for every clip.
    if path.isprintable():
        return path.replace("%", "%25")
    return "".join(
        c
        if c.isprintable() and c != "%"
        else "".join(f"%{b:02X}" for b in c.encode("utf-8", "surrogateescape"))
        for c in path
    )


def unescape_path(text: str) -> str:
    """Return the path whose `escape_path` is the text.

    A zero byte, which no path has, stays escaped. Text from a third party then names a file that
    does not exist; a path with a zero byte would make system functions raise ValueError.
    """
    if "%" not in text and "\0" not in text:  # as nearly all are: every clip has a path
        return text
    return unquote_to_bytes(text.replace("\0", "%00").replace("%00", "%2500")).decode(
        "utf-8", "surrogateescape"
    )


def strip_label(line: str) -> str:
    """Remove the label from `path 3` and `path,3`, the lines of lists of labelled videos."""
    match = _LABEL.fullmatch(line)
    return match[1].rstrip(",").rstrip() if match else line


def _expand(source: str, ignored: Counter[str]) -> tuple[str, str, list[str]]:
    """Return the name, the root and the relative paths of one source."""
    match = _NAME.fullmatch(source)
    # A folder may be named `a=b`, so an existing path is not split.
    name, location = (
        (match[1], match[2]) if match and not os.path.lexists(source) else (None, source)
    )
    location = os.path.expanduser(location)
    if location.startswith("@") and not os.path.exists(location):
        return _read_list(source, name, location[1:], csv_file=location.lower().endswith(".csv"))
    if os.path.isdir(location):
        root = os.path.abspath(location)
        return name or _basename(root), root, _walk(root, ignored)
    if os.path.isfile(location):
        ending = os.path.splitext(location)[1].lower()
        if ending in (".txt", ".lst", ".list", ".csv"):
            return _read_list(source, name, location, csv_file=ending == ".csv")
        root = os.path.dirname(os.path.abspath(location))
        return name or _basename(root), root, [os.path.basename(location)]
    if glob.has_magic(location):
        return _expand_glob(name, location, ignored)
    raise SourceError(f"{source}: no such folder, video, list or glob")


def _walk(root: str, ignored: Counter[str]) -> list[str]:
    """List the video files below `root`, relative to it.

    Each folder is visited once, under its real path rather than that of a link. Names with a
    leading dot and folders of prepared copies below `root` are skipped.
    """
    videos: list[str] = []
    visited_folders: set[tuple[int, int]] = set()
    tops = [root]
    # Links to folders are added at the end during the loop.
    for top in tops:
        for folder, folders, names in os.walk(top, onerror=_unreadable):
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            visited = identity in visited_folders
            visited_folders.add(identity)
            if is_prepared := MARKER in names and folder != root and not visited:
                ignored["folder of prepared copies"] += 1
            if is_prepared or visited:
                folders.clear()
                continue
            folders[:] = sorted((f for f in folders if not f.startswith(".")), key=os.fsencode)
            tops += (path for f in folders if os.path.islink(path := os.path.join(folder, f)))
            videos += _filter_videos(
                (os.path.relpath(os.path.join(folder, n), root) for n in names), ignored
            )
    return sorted(videos, key=os.fsencode)


def _filter_videos(paths: Iterable[str], ignored: Counter[str]) -> list[str]:
    videos = []
    for path in paths:
        base = os.path.basename(path)
        if base.startswith("."):
            continue
        if is_video(base):
            videos.append(path)
        else:
            ignored[os.path.splitext(base)[1].lower()] += 1
    return videos


def _expand_glob(
    name: str | None, pattern: str, ignored: Counter[str]
) -> tuple[str, str, list[str]]:
    # The working folder is not part of the pattern, even if its name has magic characters.
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts)
    root = os.path.abspath(os.path.join("", *fixed))
    matches = [os.path.abspath(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    paths = _filter_videos((os.path.relpath(p, root) for p in matches), ignored)
    return name or _basename(root), root, sorted(set(paths), key=os.fsencode)


def _read_list(
    source: str, name: str | None, file: str, *, csv_file: bool
) -> tuple[str, str, list[str]]:
    root = os.path.dirname(os.path.abspath(file))
    try:
        text = read_text(file)
    except OSError as error:
        raise SourceError(f"{source}: {error.strerror}") from None
    if csv_file:
        listed = _paths_of_csv(source, text)
    else:
        parsed = (_path_in_line(line, root) for line in text.split("\n"))
        listed = [path for path in parsed if path is not None]
    refuse_windows_paths(file, root, listed)
    paths = [os.path.normpath(os.path.relpath(p, root) if os.path.isabs(p) else p) for p in listed]
    stem = os.path.splitext(os.path.basename(file))[0]
    return name or stem, root, paths


def _paths_of_csv(source: str, text: str) -> list[str]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if "path" not in (reader.fieldnames or ()):
            columns = ", ".join(reader.fieldnames or ()) or "none"
            raise SourceError(f"{source}: requires a column `path`, it has: {columns}")
        return [row["path"] for row in reader if row["path"]]
    except csv.Error as error:
        raise SourceError(f"{source}: not a csv file ({error})") from None


def _path_in_line(line: str, root: str) -> str | None:
    """Return the path of one line of a list, or None for a comment or an empty line.

    In `path 3` and `path,3` the label is removed, and `#…` is a comment, unless a file has exactly
    that name.
    """
    line = line.strip()
    if not line or os.path.exists(os.path.join(root, line)):
        return line or None
    path = strip_label(line)
    return None if line.startswith("#") and not os.path.exists(os.path.join(root, path)) else path


def _describe_endings(counts: Mapping[str, int]) -> str:
    """Return a text such as `3 .jpg, 1 without ending`."""
    return ", ".join(f"{n} {ending or 'without ending'}" for ending, n in sorted(counts.items()))


def _basename(root: str) -> str:
    return os.path.basename(root.rstrip("/")) or "videos"


def _unreadable(error: OSError) -> None:
    raise SourceError(f"{error.filename}: {error.strerror}") from None
