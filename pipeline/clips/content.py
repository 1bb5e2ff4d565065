"""Whether two files have the same content, where their digests agree.

The digest of a video (`container.digest`) covers its size, head and tail: enough to tell compressed
videos apart, too little for raw ones that begin and end in black.
"""

from __future__ import annotations

import filecmp
import os
from typing import Literal, NamedTuple

from ..prepared.flow_files import read_flow_map
from ..prepared.folders import Kind
from ..prepared.frame_map import read_map
from ..video.container import digest


class VideoFile(NamedTuple):
    """A file to read clips from: a video, the copy of one, or its flow.

    original: of a copy or of flow, where the video itself may be located; compared if it exists.
    """

    path: str
    kind: Literal["video"] | Kind = "video"
    original: str | None = None


def same_content(a: str, b: str) -> bool | None:
    """Compare every byte of two files, once per process and pair; None where one cannot be read."""
    try:
        return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)
    except (OSError, ValueError):
        return None


def source_digest(file: VideoFile) -> str:
    """Return the digest of a video's own content; of a copy or flow file, that of its source.

    Raises:
        VideoError: The file cannot be read.
    """
    if file.kind == "video":
        return digest(file.path)
    return (read_map if file.kind == "copy" else read_flow_map)(file.path).source.digest
