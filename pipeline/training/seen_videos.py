"""RUN/seen_videos.npz: the videos that a run's weights come from, identified by content.

Arrays, a row per video: `digest` uint8 [N, 16] (`video.container.digest`, zeros where it could not
be read), `stage` uint8 [N] (0: seen by the initialisation, 1: by this run), and `path`, the bytes
of all paths, NUL between them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.documents import is_regular_file
from ..common.errors import CheckpointError, VideoError
from ..common.files import write_whole
from ..common.run_dir import SEEN_VIDEOS
from ..video.container import digest, same_content

DIGEST_BYTES = 16
INIT, OWN = 0, 1


@dataclass(frozen=True)
class SeenVideos:
    """Videos: digest [N, 16], path, and by whom each was seen, stage [N] of INIT or OWN."""

    digest: NDArray[np.uint8]
    paths: list[str]
    stage: NDArray[np.uint8]

    @classmethod
    def of(cls, digests: Sequence[str], paths: Sequence[str]) -> SeenVideos:
        """Return the videos that a run itself trains on.

        Args:
            digests: In hex, "" for an unreadable video.
            paths: Where the videos are located.
        """
        rows = b"".join(bytes.fromhex(each) or bytes(DIGEST_BYTES) for each in digests)
        table = np.frombuffer(rows, np.uint8).reshape(-1, DIGEST_BYTES)
        return cls(table, list(paths), np.full(len(table), OWN, np.uint8))

    @classmethod
    def read(cls, run: Path) -> SeenVideos | None:
        """Return the record of a run folder; None for a folder without one, as of distinit 0.1.

        Raises:
            CheckpointError: The record cannot be read.
            SourceError: It is a link that leads out of the folder.
        """
        path = run / SEEN_VIDEOS
        if not is_regular_file(path, run):
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                names = bytes(file["path"]).split(b"\0")
                found = cls(file["digest"], [os.fsdecode(name) for name in names], file["stage"])
        except (
            Exception
        ) as error:  # whatever damage makes of it, zlib's errors and EOFError among them
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if len(found.paths) != len(found.digest):  # without videos the split gives one empty name
            found = cls(found.digest, found.paths[: len(found.digest)], found.stage)
        return found

    def write(self, run: Path) -> None:
        """Write RUN/seen_videos.npz."""
        buffer = io.BytesIO()
        names = np.frombuffer(b"\0".join(os.fsencode(path) for path in self.paths), np.uint8)
        np.savez_compressed(buffer, digest=self.digest, path=names, stage=self.stage)
        write_whole(run / SEEN_VIDEOS, buffer.getbuffer())

    def after(self, earlier: SeenVideos | None) -> SeenVideos:
        """Return these videos and those of the initialisation."""
        if earlier is None:
            return self
        stage = np.concatenate([np.full(len(earlier.stage), INIT, np.uint8), self.stage])
        return SeenVideos(
            np.concatenate([earlier.digest, self.digest]), earlier.paths + self.paths, stage
        )

    def stages(self, digests: Sequence[str], paths: Sequence[str]) -> list[set[int]]:
        """Return for each video by whom it was seen: a set of INIT and OWN.

        Where digests agree and both files can be read, their whole content decides.

        Args:
            digests: In hex, "" for an unreadable video.
            paths: Where the videos are located.
        """
        return [{int(self.stage[row]) for row in rows} for rows in self.rows(digests, paths)]

    def rows(self, digests: Sequence[str], paths: Sequence[str]) -> list[list[int]]:
        """Return for each video the rows that hold it; see `stages`."""
        asked = [bytes.fromhex(each) for each in digests]
        kind = np.dtype((np.void, DIGEST_BYTES))
        seen = np.ascontiguousarray(self.digest).view(kind).ravel()
        known = np.isin(seen, np.frombuffer(b"".join(each for each in asked if each), kind))
        rows_of: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(known).tolist():
            rows_of.setdefault(bytes(self.digest[row]), []).append(row)
        return [
            [row for row in rows_of.get(each, ()) if self._same(row, path)]
            for each, path in zip(asked, paths, strict=True)
        ]

    def _same(self, row: int, path: str) -> bool:
        if same_content(self.paths[row], path) is not False:
            return True
        # A file that has changed since is no evidence.
        try:
            return digest(self.paths[row]) != bytes(self.digest[row]).hex()
        except VideoError:
            return True
