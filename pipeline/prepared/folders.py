"""Folders made by `distinit prepare`: what they hold, and where the copy of a video is.

A folder holds DIR/prepared.json (options, and of each corpus where its originals were) and
DIR/CORPUS/PATH.mp4, or with optical flow in place of copies DIR/CORPUS/PATH.h5.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..common.errors import UsageError, VideoError
from ..corpus.sources import MARKER, unescape_path
from ..video.container import digest, reason
from .flow_files import read_flow_map
from .frame_map import SourceRecord, read_map

FORMAT = "distinit prepared copies"
Kind = Literal["copy", "flow"]
ENDINGS: Mapping[Kind, str] = {"copy": ".mp4", "flow": ".h5"}


def kind_of(options: Mapping[str, Any]) -> Kind:
    """Return what a folder made with these options holds."""
    return "flow" if "bound" in options else "copy"


class VideoFile(NamedTuple):
    """A file to read clips from: a video, the copy of one, or its flow.

    original: of a copy or of flow, where the video itself may be located; compared if it exists.
    """

    path: str
    kind: Literal["video"] | Kind = "video"
    original: str | None = None


@dataclass(frozen=True)
class PreparedCorpus:
    """The copies of one corpus, below `root` under the paths of their sources.

    options: how they were made.
    """

    root: str
    options: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """Copies or flow."""
        return kind_of(self.options)

    def path(self, relative: str) -> str:
        """Return the path of the copy of a video, given the video's path relative to its corpus."""
        return os.path.join(self.root, copy_name(relative, self.kind))


def copy_name(relative: str, kind: Kind = "copy") -> str:
    """Convert `a/b.avi` to `a/b.avi.mp4`.

    Lists may name files outside of their folder; the copies stay below it.

    >>> copy_name("../other/c.mp4")
    '%2E%2E/other/c.mp4.mp4'
    """
    parts = (
        "%2E%2E" if part == ".." else part for part in relative.split("/") if part not in ("", ".")
    )
    return "/".join(parts) + ENDINGS[kind]


def prepared_corpora(video_roots: Mapping[str, str]) -> dict[str, PreparedCorpus]:
    """Return those folders of `video_roots` (corpus → folder) that hold copies made by `prepare`.

    A folder of copies of a single corpus serves that corpus under any name. The folder of one
    corpus inside may be named as well.

    Raises:
        UsageError: A folder of copies has none of the corpus.
    """
    prepared = {}
    for name, folder in video_roots.items():
        marker = read_marker(folder)
        if marker is not None:
            names = list(marker["corpora"])
            stored = name if name in names else names[0] if len(names) == 1 else None
            if stored is None:
                raise UsageError(
                    f"--videos {name}={folder}: the copies there are of {', '.join(names) or 'no corpus'}"
                )
            prepared[name] = PreparedCorpus(
                os.path.join(os.path.abspath(folder), stored), marker["options"]
            )
            continue
        above, stored = os.path.split(os.path.abspath(folder))
        marker = read_marker(above)
        if marker is not None and stored in marker["corpora"]:
            prepared[name] = PreparedCorpus(os.path.abspath(folder), marker["options"])
    return prepared


def read_marker(folder: str | os.PathLike[str]) -> dict[str, dict[str, object]] | None:
    """Return what `prepare` recorded of a folder of copies ("options", "corpora").

    None if `prepare` did not make the folder.

    Raises:
        UsageError: The marker cannot be read.
    """
    path = os.path.join(folder, MARKER)
    try:
        with open(path, encoding="utf-8") as file:
            marker = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(marker, dict) or marker.get("format") != FORMAT or marker.get("version") != 1:
        raise UsageError(f"{path}: expected format {FORMAT!r}, version 1")
    return marker


@dataclass(frozen=True)
class CopyFolder:
    """A folder of copies for whoever knows the originals by their paths, as labels do.

    roots: corpus → where its originals were when they were copied. options: how the copies were
        made.
    """

    folder: str
    roots: Mapping[str, str]
    options: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str) -> CopyFolder:
        """Open a folder of copies; UsageError if `prepare` did not make it."""
        marker = read_marker(folder)
        if marker is None:
            raise UsageError(
                f"--videos {folder}: holds no {MARKER}; expected a folder made by distinit prepare"
            )
        corpora: Mapping[str, Any] = marker["corpora"]
        roots = {name: unescape_path(corpus["root"]) for name, corpus in corpora.items()}
        return cls(os.path.abspath(folder), roots, marker["options"])

    @property
    def kind(self) -> Kind:
        """Copies or flow."""
        return kind_of(self.options)

    def find(self, root: str, relative: str) -> str:
        """Return the copy of the original `root`/`relative`, which need not exist any more.

        An original below a corpus' folder (or named by its list) has its copy by that path. If the
        originals had another location when they were copied, `relative` itself is looked for in
        each corpus.

        Raises:
            VideoError: There is no copy, or there are two.
        """
        original = os.path.normpath(os.path.join(root, relative))
        behind_links = os.path.normpath(os.path.join(os.path.realpath(root), relative))
        for name, before in self.roots.items():
            below = (
                os.path.relpath(original, before),
                os.path.relpath(behind_links, os.path.realpath(before)),
            )
            for path in (*below, original):
                if os.path.exists(copy := self._copy(name, path)):
                    return copy
        copies = [copy for name in self.roots if os.path.exists(copy := self._copy(name, relative))]
        if len(copies) == 1:
            return copies[0]
        if copies:
            raise VideoError(
                f"{len(copies)} copies in {self.folder} may be its: {copies[0]} and {copies[1]}"
            )
        raise VideoError(f"no copy in {self.folder}: its status.csv says why")

    def _copy(self, corpus: str, relative: str) -> str:
        return os.path.join(self.folder, corpus, copy_name(relative, self.kind))


def check_current(source: SourceRecord, original: str) -> None:
    """Raise VideoError if the original exists and is not the file that the copy was made of."""
    try:
        now = os.stat(original)
    except (OSError, ValueError):
        return
    if now.st_size == source.size and now.st_mtime_ns == source.mtime_ns:
        return
    try:
        same = digest(original) == source.digest
    except (VideoError, OSError) as error:
        raise VideoError(f"the original of its copy cannot be read: {reason(error)}") from error
    if not same:
        raise VideoError("the original has changed since it was copied: run distinit prepare again")


def source_of(file: VideoFile) -> SourceRecord:
    """Return the record of the video that a copy or flow file was made of.

    Raises:
        VideoError: The file cannot be read.
    """
    return (read_map if file.kind == "copy" else read_flow_map)(file.path).source


def source_digest(file: VideoFile) -> str:
    """Return the digest of a video's own content; of a copy or flow file, that of its source.

    Raises:
        VideoError: The file cannot be read.
    """
    if file.kind == "video":
        return digest(file.path)
    return source_of(file).digest
