"""Stop a run whose videos all fail for one reason before that reason is recorded.

It is hardly the videos' own.
"""

from __future__ import annotations

import os
import re

from .errors import DistInitError

_VARYING = re.compile(r"0x[0-9a-f]+|/[^\s:,'\"]+|'[^']*'|\"[^\"]*\"|\d+(\.\d+)?", re.IGNORECASE)


class SameFailure:
    """Watches the outcome of the first `limit` videos of a run; 0: of none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: dict[int, str] = {}
        self._kind: str | None = None
        self.watching = limit > 0

    def see(self, video: int, reason: str | None, path: str) -> None:
        """Add the reason of a video, None if it is usable.

        Raises:
            DistInitError: It is the last that was waited for, and all failed for one reason.
        """
        if not self.watching or video in self._seen:
            return
        kind = _kind(reason, path) if reason is not None else None
        if reason is None or self._kind not in (None, kind):
            self.watching = False
            return
        self._kind = kind
        self._seen[video] = reason
        if len(self._seen) >= self._limit:
            self._stop(f"the first {len(self._seen)} videos")

    def finish(self) -> None:
        """End the watch: there are no more videos.

        Raises:
            DistInitError: All of them failed for one reason.
        """
        if self.watching and self._seen:
            self._stop("the one video" if len(self._seen) == 1 else f"all {len(self._seen)} videos")

    def _stop(self, which: str) -> None:
        reason = next(iter(self._seen.values()))
        raise DistInitError(
            f"{which} failed for one reason, nothing of them is recorded: {reason}; "
            "if it is the videos' own, --max-failures 0 records it and continues"
        )


def _kind(reason: str, path: str) -> str:
    """Return the reason without what varies from video to video: its name, numbers, addresses."""
    for name in (path, os.path.basename(path)):
        reason = reason.replace(name, "")
    return _VARYING.sub("", reason)
