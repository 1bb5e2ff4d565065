"""RUN/seen_videos.npz: the videos that a run's weights were trained on, identified by content.

The arrays have one row per video: `digest` uint8 [N, 16] (`video.container.digest`, zeros for an
unreadable video) and `stage` uint8 [N] (0: seen by the initialisation, 1: by this run). `path`
holds the bytes of all paths, separated by NUL.
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
SEEN_BY_INIT, SEEN_BY_RUN = 0, 1


@dataclass(frozen=True)
class SeenVideos:
    """Videos that the weights of a run were trained on.

    Attributes:
        digest: [N, 16].
        paths: N paths.
        stage: [N], `SEEN_BY_INIT` or `SEEN_BY_RUN`.
    """

    digest: NDArray[np.uint8]
    paths: list[str]
    stage: NDArray[np.uint8]

    @classmethod
    def from_digests(cls, digests: Sequence[str], paths: Sequence[str]) -> SeenVideos:
        """Return the videos that a run itself trains on.

        Args:
            digests: Digests in hex, "" for an unreadable video.
            paths: Where the videos are located.
        """
        rows = b"".join(bytes.fromhex(text) or bytes(DIGEST_BYTES) for text in digests)
        table = np.frombuffer(rows, np.uint8).reshape(-1, DIGEST_BYTES)
        return cls(table, list(paths), np.full(len(table), SEEN_BY_RUN, np.uint8))

    @classmethod
    def read(cls, run: Path) -> SeenVideos | None:
        """Return the record of a run folder, or None if it has none, as with distinit 0.1.

        Raises:
            CheckpointError: The record cannot be read.
            SourceError: The record is a link that leads out of the folder.
        """
        path = run / SEEN_VIDEOS
        if not is_regular_file(path, run):
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                names = bytes(file["path"]).split(b"\0")
                digests, stage = file["digest"], file["stage"]
        # A damaged file raises errors of many types, among them zlib's and EOFError.
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        # Without videos the split gives one empty name.
        return cls(digests, [os.fsdecode(name) for name in names[: len(digests)]], stage)

    def write(self, run: Path) -> None:
        """Write RUN/seen_videos.npz."""
        buffer = io.BytesIO()
        names = np.frombuffer(b"\0".join(os.fsencode(path) for path in self.paths), np.uint8)
        np.savez_compressed(buffer, digest=self.digest, path=names, stage=self.stage)
        write_whole(run / SEEN_VIDEOS, buffer.getbuffer())

    def with_init_videos(self, init_videos: SeenVideos | None) -> SeenVideos:
        """Return the videos of the initialisation, followed by these."""
        if init_videos is None:
            return self
        init_stage = np.full(len(init_videos.stage), SEEN_BY_INIT, np.uint8)
        return SeenVideos(
            np.concatenate([init_videos.digest, self.digest]),
            init_videos.paths + self.paths,
            np.concatenate([init_stage, self.stage]),
        )

    def stages(self, digests: Sequence[str], paths: Sequence[str]) -> list[set[int]]:
        """Return for each video the stages that saw it: a set of `SEEN_BY_INIT` and `SEEN_BY_RUN`.

        If digests agree and both files can be read, their whole content is compared.

        Args:
            digests: Digests in hex, "" for an unreadable video.
            paths: Where the videos are located.
        """
        return [{int(self.stage[row]) for row in rows} for rows in self.rows(digests, paths)]

    def rows(self, digests: Sequence[str], paths: Sequence[str]) -> list[list[int]]:
        """Return for each video the rows with its content; see `stages`."""
        queries = [bytes.fromhex(text) for text in digests]
        digest_type = np.dtype((np.void, DIGEST_BYTES))
        stored = np.ascontiguousarray(self.digest).view(digest_type).ravel()
        matches = np.isin(stored, np.frombuffer(b"".join(filter(None, queries)), digest_type))
        rows_by_digest: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(matches).tolist():
            rows_by_digest.setdefault(bytes(self.digest[row]), []).append(row)
        return [
            [row for row in rows_by_digest.get(query, ()) if self._has_same_content(row, path)]
            for query, path in zip(queries, paths, strict=True)
        ]

    def _has_same_content(self, row: int, path: str) -> bool:
        if same_content(self.paths[row], path) is not False:
            return True
        # A file that has changed since the run proves nothing about the video that was seen.
        try:
            return digest(self.paths[row]) != bytes(self.digest[row]).hex()
        except VideoError:
            return True
