"""Folders made by `distinit prepare`: their contents, and the path of each video's copy.

DIR/prepared.json holds the options and the original folder of each corpus. Copies are stored as
DIR/CORPUS/PATH.mp4, optical flow as DIR/CORPUS/PATH.h5.
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
    """Return whether a folder made with these options holds copies or flow."""
    return "flow" if "bound" in options else "copy"


class VideoFile(NamedTuple):
    """A file to read clips from: a video, a copy of one, or its flow.

    original: Path of the video itself, for a copy or flow. If it exists, it is compared.
    """

    path: str
    kind: Literal["video"] | Kind = "video"
    original: str | None = None


@dataclass(frozen=True)
class PreparedCorpus:
    """The copies of one corpus, below `root` under the paths of their sources.

    options: The options that they were made with.
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

    A folder with the copies of a single corpus serves that corpus under any name. The subfolder of
    one corpus may be given as well.

    Raises:
        UsageError: A folder of copies holds none of its corpus.
    """
    prepared = {}
    for name, folder in video_roots.items():
        marker = read_marker(folder)
        if marker is not None:
            stored_corpora = list(marker["corpora"])
            only = stored_corpora[0] if len(stored_corpora) == 1 else None
            stored_name = name if name in stored_corpora else only
            if stored_name is None:
                raise UsageError(
                    f"--videos {name}={folder}: the folder holds copies of {', '.join(stored_corpora) or 'no corpus'}"
                )
            prepared[name] = PreparedCorpus(
                os.path.join(os.path.abspath(folder), stored_name), marker["options"]
            )
            continue
        parent, stored_name = os.path.split(os.path.abspath(folder))
        marker = read_marker(parent)
        if marker is not None and stored_name in marker["corpora"]:
            prepared[name] = PreparedCorpus(os.path.abspath(folder), marker["options"])
    return prepared


def read_marker(folder: str | os.PathLike[str]) -> dict[str, dict[str, object]] | None:
    """Return the record that `prepare` wrote into a folder of copies ("options", "corpora").

    Return None if `prepare` did not make the folder.

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
    """A folder of copies that are looked up by the paths of their originals, as labels give them.

    roots: The folder of the originals, per corpus, at the time of copying. options: The options
        that the copies were made with.
    """

    folder: str
    roots: Mapping[str, str]
    options: Mapping[str, Any]

    @classmethod
    def open(cls, folder: str) -> CopyFolder:
        """Open a folder of copies; raise UsageError if `prepare` did not make it."""
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
        """Return the path of the copy of `root`/`relative`; the original need not exist any more.

        The copy has the path of the original relative to the folder of its corpus, or the path in
        the list of its corpus. If the originals have been moved since they were copied, each corpus
        is searched for `relative` itself.

        Raises:
            VideoError: No copy matches, or more than one does.
        """
        original = os.path.normpath(os.path.join(root, relative))
        resolved = os.path.normpath(os.path.join(os.path.realpath(root), relative))
        for name, recorded_root in self.roots.items():
            relative_paths = (
                os.path.relpath(original, recorded_root),
                os.path.relpath(resolved, os.path.realpath(recorded_root)),
            )
            for path in (*relative_paths, original):
                if os.path.exists(copy := self._copy_path(name, path)):
                    return copy
        copies = [
            copy for name in self.roots if os.path.exists(copy := self._copy_path(name, relative))
        ]
        if len(copies) == 1:
            return copies[0]
        if copies:
            raise VideoError(
                f"{len(copies)} copies in {self.folder} match its path: {copies[0]} and {copies[1]}"
            )
        raise VideoError(f"no copy in {self.folder}: see status.csv for the reason")

    def _copy_path(self, corpus: str, relative: str) -> str:
        return os.path.join(self.folder, corpus, copy_name(relative, self.kind))


def check_current(source: SourceRecord, original: str) -> None:
    """Raise VideoError if the original exists and is not the file that was copied."""
    try:
        status = os.stat(original)
    except (OSError, ValueError):
        return
    if status.st_size == source.size and status.st_mtime_ns == source.mtime_ns:
        return
    try:
        unchanged = digest(original) == source.digest
    except (VideoError, OSError) as error:
        raise VideoError(f"the original of its copy cannot be read: {reason(error)}") from error
    if not unchanged:
        raise VideoError("the original has changed since it was copied: run distinit prepare again")


def read_source_record(file: VideoFile) -> SourceRecord:
    """Read the record of the source from a copy or flow file.

    Raises:
        VideoError: The file cannot be read.
    """
    return (read_map if file.kind == "copy" else read_flow_map)(file.path).source


def source_digest(file: VideoFile) -> str:
    """Return the digest of a video; for a copy or flow file, the digest of its source.

    Raises:
        VideoError: The file cannot be read.
    """
    if file.kind == "video":
        return digest(file.path)
    return read_source_record(file).digest
