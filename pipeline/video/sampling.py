"""Select the frames of a video to cache: every nth, at a rate, or key frames only."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from ..common.settings import CliOption, Options

if TYPE_CHECKING:
    import numpy as np

    from .probe import Probe


class Sampling(Options):
    """The frames to cache: one of `every` (frames), `fps`, `keyframes`; every 4th by default."""

    every: Annotated[
        int | None,
        CliOption(group="Sampling", metavar="N", shown="4", replaces=("fps", "keyframes")),
    ] = Field(default=None, ge=1, description="cache every Nth frame")
    fps: Annotated[
        float | None, CliOption(group="Sampling", metavar="RATE", replaces=("every", "keyframes"))
    ] = Field(default=None, gt=0, le=1000, description="cache frames at this rate instead")
    keyframes: Annotated[bool, CliOption(group="Sampling", replaces=("every", "fps"))] = Field(
        default=False, description="cache key frames only: much less to decode"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_every(cls, data: object) -> object:
        """Sample every 4th frame by default."""
        if not isinstance(data, dict) or data.get("keyframes"):
            return data
        chosen = data.get("every") is not None or data.get("fps") is not None
        return data if chosen else {**data, "every": 4}

    @model_validator(mode="after")
    def _exactly_one(self) -> Sampling:
        chosen = [self.every is not None, self.fps is not None, self.keyframes]
        if sum(chosen) != 1:
            raise ValueError("choose one of every, fps, keyframes")
        return self

    def describe(self) -> str:
        """Return it in words: "every 4th frame", "2 frames per second", "key frames"."""
        if self.keyframes:
            return "key frames"
        if self.fps is not None:
            return f"{self.fps:g} frames per second"
        every = self.every or 1
        if every == 1:
            return "every frame"
        suffix = (
            "th"
            if every % 100 in (11, 12, 13)
            else {1: "st", 2: "nd", 3: "rd"}.get(every % 10, "th")
        )
        return f"every {every}{suffix} frame"

    def select(self, pts: np.ndarray, is_key: np.ndarray, time_base: Fraction) -> np.ndarray:
        """Return the indices int64 [N], ascending, of the sampled frames.

        `pts` int64 [T], strictly ascending, and `is_key` bool [T] describe all frames of a video.
        At a rate, the last frame with time ≤ first + k/fps is sampled for each k = 0, 1, … up to
        the last frame's time; a frame is sampled once, even for several k.
        """
        import numpy as np  # not for --help, which builds this model

        if self.keyframes:
            return np.flatnonzero(is_key).astype(np.int64)
        if self.fps is None:
            return np.arange(0, len(pts), self.every or 1, dtype=np.int64)
        if len(pts) == 0:
            return np.zeros(0, np.int64)
        # In units in which both times are integers, (pts - first)·a is compared with k·b.
        rate = Fraction(self.fps).limit_denominator(1_000_000)
        a = time_base.numerator * rate.numerator
        b = time_base.denominator * rate.denominator
        span = int(pts[-1]) - int(pts[0])
        fits_int64 = span * a < 2**62
        offsets = (pts - pts[0]) * a if fits_int64 else (pts.astype(object) - int(pts[0])) * a
        # Frame i is sampled when some k has offset[i] ≤ k·b < offset[i+1]; the smallest such k is a
        # ceiling.
        ceiling = -(-offsets // b)
        sampled = np.empty(len(pts), bool)
        sampled[:-1] = ceiling[:-1] * b < offsets[1:]
        sampled[-1] = offsets[-1] % b == 0
        return np.flatnonzero(sampled).astype(np.int64)

    def rows_bound(self, probe: Probe) -> int:
        """Return how many rows to reserve for a probed video.

        It is an upper bound if the counts of the probe are exact.
        """
        if self.keyframes:
            return max(1, probe.keyframes)
        if self.fps is None:
            return max(1, -(-probe.frames // (self.every or 1)))
        if not math.isfinite(probe.duration):
            return max(1, probe.frames)
        slack = 1.0 if probe.exact else 1.1
        return max(1, min(probe.frames, int(probe.duration * slack * self.fps) + 2))
