"""Choose the cached frames that give a clip its target, and where a clip may start.

A clip of T consecutive frames covers the window [start, start + T) of its video. The store holds
some of the video's frames; a pick is always one of those inside the window, and n picks are
distinct. A valid start is one whose window holds at least n cached frames, so the rule also decides
where a clip may start. A video shorter than T has the one start 0: its clip repeats the last frame,
its window is the whole video.

    every 4th frame cached, T = 8, start = 3:   3 . . . . . . 10
                                                  4       8         two cached frames in the window

Shapes: N cached frames of one video, ascending, counted from the start of its file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..common.errors import UsageError

Kind = Literal["center", "random", "uniform"]
ALLOWED = "center, random, random:N, uniform:N"


@dataclass(frozen=True)
class PickRule:
    """A rule: `center` (the frame start + T//2), `random:n`, or `uniform:n` (evenly spread).

    Example:
        `PickRule.parse("random:2")`
    """

    kind: Kind
    n: int = 1

    @classmethod
    def parse(cls, text: str) -> PickRule:
        """Read `center`, `random`, `random:N` or `uniform:N`; UsageError for anything else."""
        kind, colon, count = text.strip().partition(":")
        if kind == "center" and not colon:
            return cls("center", 1)
        if kind == "random" and not colon:
            return cls("random", 1)
        if kind in ("random", "uniform") and count.isascii() and count.isdigit() and int(count) > 0:
            return cls("random" if kind == "random" else "uniform", int(count))
        raise UsageError(f"picks must be one of {ALLOWED} with N ≥ 1, got {text!r}")

    def __str__(self) -> str:
        if self.kind == "center" or (self.kind == "random" and self.n == 1):
            return self.kind
        return f"{self.kind}:{self.n}"


@dataclass(frozen=True)
class StartSet:
    """The valid clip starts of one video, as disjoint ascending intervals [first, last]."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Return how many starts there are up to the end of each interval."""
        return np.cumsum(self.last - self.first + 1)

    @property
    def count(self) -> int:
        """Return how many starts there are."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def nth(self, k: int) -> int:
        """Return the k-th valid start in ascending order, 0 ≤ k < count."""
        if not 0 <= k < self.count:
            raise IndexError(f"start {k} of {self.count}")
        i = int(self.ends.searchsorted(k, side="right"))
        before = int(self.ends[i - 1]) if i else 0
        return int(self.first[i]) + k - before


def center_frame(start: int, frames: int, clip_frames: int) -> int:
    """Return a clip's center frame, start + ⌊T/2⌋; of a video shorter than T, its own middle."""
    return start + min(clip_frames, frames) // 2


def start_set(rule: PickRule, cached: NDArray[np.int64], frames: int, clip_frames: int) -> StartSet:
    """Return the valid starts of clips in a video.

    Args:
        rule: How frames are picked; a window must hold enough of them.
        cached: Frames that the store holds, ascending [N].
        frames: Frames of the video.
        clip_frames: Frames of a clip.
    """
    last_start = max(frames - clip_frames, 0)
    if rule.kind == "center":
        lo = cached - center_frame(0, frames, clip_frames)
        hi = lo
    else:
        # The window holds cached[i] … cached[i+n−1] for starts in [cached[i+n−1] − T + 1,
        # cached[i]].
        if len(cached) < rule.n:
            lo = hi = np.empty(0, np.int64)
        else:
            hi = cached[: len(cached) - rule.n + 1]
            lo = cached[rule.n - 1 :] - clip_frames + 1
    lo = np.maximum(lo, 0)
    hi = np.minimum(hi, last_start)
    keep = lo <= hi
    lo, hi = lo[keep].astype(np.int64), hi[keep].astype(np.int64)
    # Both ends ascend, so each interval that does not touch the one before begins another.
    gaps = np.flatnonzero(lo[1:] > hi[:-1] + 1) + 1
    return StartSet(np.concatenate([lo[:1], lo[gaps]]), np.concatenate([hi[gaps - 1], hi[-1:]]))


def window(cached: NDArray[np.int64], start: int, clip_frames: int) -> tuple[int, int]:
    """Return the positions [a, b) in `cached` that are inside the window [start, start + T)."""
    return int(cached.searchsorted(start)), int(cached.searchsorted(start + clip_frames))


def pick(
    rule: PickRule,
    cached: NDArray[np.int64],
    start: int,
    clip_frames: int,
    rng: np.random.Generator,
    *,
    frames: int | None = None,
) -> NDArray[np.int64]:
    """Return the positions in `cached` of the picks of a clip, ascending and distinct [n].

    Args:
        rule: How frames are picked.
        cached: Frames that the store holds, ascending [N].
        start: First frame of the clip.
        clip_frames: Frames of the clip.
        rng: Generator for random picks.
        frames: Frames of the video; they matter to `center` in videos shorter than the clip.

    Raises:
        ValueError: The window does not hold the frames that the rule requires: not a valid start.
    """
    a, b = window(cached, start, clip_frames)
    if rule.kind == "center":
        wanted = center_frame(start, clip_frames if frames is None else frames, clip_frames)
        at = int(np.searchsorted(cached, wanted))
        if at >= len(cached) or cached[at] != wanted:
            raise ValueError(f"the center frame {wanted} of the clip at {start} is not cached")
        return np.array([at], np.int64)
    if b - a < rule.n:
        raise ValueError(
            f"the clip at {start} holds {b - a} cached frames, {rule.n} are to be picked"
        )
    if rule.kind == "uniform":
        # The middles of n equal parts of the cached frames in the window.
        return a + (2 * np.arange(rule.n, dtype=np.int64) + 1) * (b - a) // (2 * rule.n)
    if rule.n == 1:  # the same number as below, in a fifth of the time
        return np.array([a + int(rng.integers(b - a))], np.int64)
    return a + np.sort(rng.choice(b - a, size=rule.n, replace=False)).astype(np.int64)
