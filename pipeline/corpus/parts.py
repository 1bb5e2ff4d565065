"""Split a list of videos between machines that share nothing.

The share of a video depends only on the name of its corpus and its path in it. Each machine
computes its own share, also where the folders have different locations or one machine lists a
file that another lacks, and no video changes its share when the list grows. The shares are
therefore of nearly, not exactly, the same size.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

import numpy as np

from ..common.errors import UsageError
from .sources import VideoList


@dataclass(frozen=True)
class Part:
    """Share `number` of `of`, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `i/n` with 1 ≤ i ≤ n; UsageError for anything else."""
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"must be i/n with 1 ≤ i ≤ n, as in 2/8, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, corpus: str, path: str) -> bool:
        """Return whether the video at `path` of the corpus is in this share."""
        key = os.fsencode(corpus) + b"\0" + os.fsencode(path)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.of == self.number - 1

    def share(self, videos: VideoList) -> VideoList:
        """Return the videos of this share, in their order."""
        names = [c.name for c in videos.corpora]
        keep = [
            i
            for i, path in enumerate(videos.paths)
            if self.holds(names[int(videos.corpus[i])], path)
        ]
        return VideoList(
            videos.corpora,
            videos.corpus[np.array(keep, np.int64)],
            [videos.paths[i] for i in keep],
            videos.ignored,
        )
