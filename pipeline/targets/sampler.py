"""Which clip a sample is, with which picks, and whether the teachers are sure enough: all before
decoding.

Shapes: T frames of a clip, N cached frames of a video, n picks, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..clips import seeding
from ..common.errors import TrainingError, UsageError
from ..common.numerics import entropy
from ..store.reader import TargetStore
from .mixture import Mixture
from .picks import PickRule, StartSet, pick, start_set
from .soft_targets import mean_logits

MAX_REDRAWS = 100  # other clips tried for one sample when the filter turns down the first
REMEMBERED = (
    4096  # videos whose frame table is kept: some 8 MB a worker, whatever the size of the corpus
)


@dataclass(frozen=True)
class ClipSample:
    """One clip of one video and its targets.

    frame_count: frames of the video, as far as the store knows. indices[T + ahead]: frames to
    decode, counted from the start of the file; a video shorter than T repeats its last. picked,
    picked_pts [n]: the frames whose logits were averaged.
    logits: teacher → mean picked logits [K] float32; weight: teacher → 1 (counts) or 0 (turned
        down).
    rejected: draws that the filter turned down before this one; attempt: the attempt that this one
        is.
    top, left: where to crop, as shares in [0, 1) of the room there is; flip: mirror it.
    """

    video: int
    frame_count: int
    start: int
    indices: NDArray[np.int64]
    picked: NDArray[np.int64]
    picked_pts: NDArray[np.int64]
    logits: dict[str, NDArray[np.float32]]
    weight: dict[str, float]
    rejected: int
    attempt: int
    top: float
    left: float
    flip: bool

    @property
    def counts(self) -> bool:
        """Whether any head learns from this clip; one that none does is not decoded."""
        return any(self.weight.values())


@dataclass(frozen=True)
class _Video:
    """What the store says of one video: cached frames, pts and rows [N], valid starts. pickable:
    frames that a clip can have, those that are read ahead left out."""

    frames: int
    pickable: int
    cached: NDArray[np.int64]
    pts: NDArray[np.int64]
    rows: NDArray[np.int64]
    starts: StartSet
    count: int


@dataclass(frozen=True)
class _Clip:
    """A clip before its targets are read."""

    video: int
    frame_count: int
    start: int
    picked: NDArray[np.int64]
    picked_pts: NDArray[np.int64]
    rows: NDArray[np.int64]
    top: float
    left: float
    flip: float


class TargetSampler:
    """Draws clips and targets from a store as a pure function of (seed, epoch, sample, attempt).

    videos: ids to draw from, at least one.
    thresholds: teacher → largest entropy in nats (of the softmax of the mean picked logits, τ = 1)
        that counts; teachers that are not named count always. Every head has its own mask.
    reject: "skip" draws another video, at most 100 times, when every head turns a clip down (after
        that the clip has weight zero); "zero-weight" keeps the clip with weight zero (the paper's
        letter).
    shares: mixes groups of videos by their shares of the clips, in place of all `videos` alike;
        what the filter turns down is drawn again from the same group.
    ahead: frames read after a clip's own, which must be there too (flow needs one); never picked.
    fixed: for held-out videos. Sample i is videos[i], the middle start, no flip, the middle crop,
        picks by the video's id; nothing is drawn again.
    """

    def __init__(
        self,
        store: TargetStore,
        *,
        teachers: Sequence[str],
        picks: PickRule,
        clip_length: int,
        videos: NDArray[np.int64],
        seed: int,
        epoch_clips: int,
        flip: float = 0.5,
        thresholds: Mapping[str, float] | None = None,
        reject: Literal["skip", "zero-weight"] = "skip",
        fixed: bool = False,
        ahead: int = 0,
        shares: tuple[Sequence[NDArray[np.int64]], Sequence[float]] | None = None,
    ) -> None:
        if len(videos) == 0:
            raise UsageError(
                f"{store.name} holds no video with targets of {', '.join(teachers)} to draw from"
            )
        self.store = store
        self.teachers = tuple(teachers)
        self.picks = picks
        self.clip_length = clip_length
        self.videos = videos
        self.seed = seed
        self.epoch_clips = epoch_clips
        self.flip = flip
        self.thresholds = dict(thresholds or {})
        self.reject = reject
        self.fixed = fixed
        self.ahead = ahead
        groups, weights = shares or ((videos,), (1.0,))
        self.mixture = Mixture(groups, weights, seed=seed, epoch_clips=epoch_clips)
        self._known: dict[int, _Video] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A worker fills its own memory."""
        return self.__dict__ | {"_known": {}}

    def draw(self, epoch: int, sample: int, attempt: int = 0) -> ClipSample:
        """The clip of a sample, from attempt `attempt` on (a broken file asks for the one after its
        own).

        Raises TrainingError if 100 videos in a row have no window that holds enough cached frames.
        """
        rejected = windowless = 0
        while True:
            clip = self._clip(epoch, sample, attempt)
            if clip is None:
                windowless += 1
                if windowless > MAX_REDRAWS or self.fixed:
                    raise TrainingError(self.no_window())
            else:
                draw = self._judge(clip, rejected, attempt)
                if (
                    draw.counts
                    or self.fixed
                    or self.reject == "zero-weight"
                    or rejected == MAX_REDRAWS
                ):
                    return draw
                rejected += 1
            attempt += 1

    def zoom(self, epoch: int, sample: int, attempt: int) -> float:
        """Where in the range of scales a draw's clip is resized to, a share in [0, 1)."""
        return float(
            seeding.rng_at(self.seed, epoch, sample, attempt, stream=seeding.ZOOMS).random()
        )

    def entropies(self, epoch: int, sample: int) -> NDArray[np.float32] | None:
        """Entropy in nats of the first attempt at a sample, one for each teacher; None without a
        window."""
        clip = self._clip(epoch, sample, 0)
        if clip is None:
            return None
        return np.array([self._read(name, clip.rows)[1] for name in self.teachers], np.float32)

    def has_window(self, video: int) -> bool:
        """Whether the video has a clip that holds enough cached frames."""
        return self._look_up(video).count > 0

    def check_windows(self, tries: int = 1000) -> None:
        """UsageError if none of the first `tries` videos has a window that holds enough cached
        frames."""
        if not any(self.has_window(int(video)) for video in self.videos[:tries]):
            raise UsageError(self.no_window())

    def no_window(self) -> str:
        """Why no clip can be drawn, in words: what the store holds and what was asked for."""
        held = f"the store holds {self.store.sampling.describe()}"
        if self.picks.kind == "center":
            return (
                f"{held}; picks=center needs the frame start + {self.clip_length // 2} of a "
                f"{self.clip_length}-frame clip, which no valid start of these videos has cached"
            )
        most = max((self._most_in_window(int(video)) for video in self.videos[:20]), default=0)
        picks = "pick" if self.picks.n == 1 else "picks"
        return (
            f"{held}; {_article(self.clip_length)} {self.clip_length}-frame clip holds {most}; "
            f"asked for {self.picks.n} {picks}"
        )

    def _most_in_window(self, video: int) -> int:
        cached = self.store.frames(video)[0]
        ends = np.searchsorted(cached, cached + self.clip_length, side="left")
        return int(np.max(ends - np.arange(len(cached)), initial=0))

    def _look_up(self, video: int) -> _Video:
        known = self._known.get(video)
        if known is None:
            cached, pts, rows = self.store.frames(video)
            # A truncated file's length may be unknown: what is cached certainly exists.
            frames = max(
                int(self.store.frame_counts[video]), int(cached[-1]) + 1 if len(cached) else 0
            )
            pickable = max(frames - self.ahead, 1)
            starts = start_set(self.picks, cached, pickable, self.clip_length)
            known = _Video(frames, pickable, cached, pts, rows, starts, starts.count)
            if len(self._known) >= REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[video] = known
        return known

    def _clip(self, epoch: int, sample: int, attempt: int) -> _Clip | None:
        """One attempt at a sample; None if its video has no window that holds enough cached
        frames."""
        if self.fixed:  # by the video, not by its place: the same clip whatever the list
            video = int(self.videos[sample % len(self.videos)])
            random = seeding.rng_at(self.seed, epoch, video, attempt, stream=seeding.HELD_OUT)
        else:
            random = seeding.rng_at(self.seed, epoch, sample, attempt, stream=seeding.EXAMPLES)
            video = self._video(epoch, sample, attempt, random)
        known = self._look_up(video)
        if known.count == 0:
            return None
        # Always the same numbers in the same order, so that a crop does not depend on the pick
        # rule.
        top, left, flip = random.random(), random.random(), random.random()
        start = known.starts.nth(
            known.count // 2 if self.fixed else int(random.integers(known.count))
        )
        at = pick(self.picks, known.cached, start, self.clip_length, random, frames=known.pickable)
        return _Clip(
            video=video,
            frame_count=known.frames,
            start=start,
            picked=known.cached[at],
            picked_pts=known.pts[at],
            rows=known.rows[at],
            top=top,
            left=left,
            flip=flip,
        )

    def _video(self, epoch: int, sample: int, attempt: int, random: np.random.Generator) -> int:
        group, first = self.mixture.first(epoch, sample)
        n = len(group)
        if attempt == 0 or n == 1:
            return int(group[first])
        return int(group[(first + 1 + int(random.integers(n - 1))) % n])  # any but the first

    def _read(
        self, teacher: str, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32] | None, float]:
        """(mean logits [K] if they had to be read, entropy in nats). The entropy of a single frame
        is in the store, from the teacher's own float32 logits."""
        if len(rows) == 1:
            return None, float(self.store.entropy(teacher, rows)[0])
        mean = mean_logits(self.store.logits(teacher, rows))
        return mean, float(entropy(mean))

    def _judge(self, clip: _Clip, rejected: int, attempt: int) -> ClipSample:
        logits: dict[str, NDArray[np.float32]] = {}
        weight: dict[str, float] = {}
        for name in self.teachers:
            mean: NDArray[np.float32] | None = None
            if name in self.thresholds:
                mean, nats = self._read(name, clip.rows)
                weight[name] = 1.0 if nats <= self.thresholds[name] else 0.0
            else:
                weight[name] = 1.0
            logits[name] = mean_logits(self.store.logits(name, clip.rows)) if mean is None else mean
        stop = clip.start + self.clip_length + self.ahead
        indices = np.arange(clip.start, stop, dtype=np.int64)
        if stop > clip.frame_count:
            np.minimum(indices, clip.frame_count - 1, out=indices)
        return ClipSample(
            video=clip.video,
            frame_count=clip.frame_count,
            start=clip.start,
            indices=indices,
            picked=clip.picked,
            picked_pts=clip.picked_pts,
            logits=logits,
            weight=weight,
            rejected=rejected,
            attempt=attempt,
            top=0.5 if self.fixed else clip.top,
            left=0.5 if self.fixed else clip.left,
            flip=not self.fixed and clip.flip < self.flip,
        )


def measure_entropies(sampler: TargetSampler, count: int) -> Iterator[NDArray[np.float32]]:
    """Entropies [teachers] in nats of the sampler's first `count` draws as they come from epoch 0
    on, the filter aside; draws without a window are left out. What a quantile is taken over."""
    for k in range(count):
        found = sampler.entropies(k // sampler.epoch_clips, k % sampler.epoch_clips)
        if found is not None:
            yield found


def _article(number: int) -> str:
    return "an" if str(number).startswith(("8", "11", "18")) else "a"
