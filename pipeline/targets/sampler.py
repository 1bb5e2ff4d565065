"""Which clip a sample is, with which picks, and whether the filter keeps it: all before decoding.

Shapes: T frames of a clip, N cached frames of a video, n picks, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..clips import seeding
from ..clips.clip_options import ClipView, Crop
from ..common.errors import TrainingError, UsageError
from ..store.reader import TargetStore
from .class_head import ClassHead
from .mixture import Mixture
from .picks import PickRule, StartSet, pick, start_set
from .teacher_targets import Seen, TeacherTargets, mean_outputs

# Other clips tried for one sample when the filter rejects the first.
MAX_REDRAWS = 100
# Videos whose frame table is kept: some 8 MB per worker, whatever the size of the corpus.
REMEMBERED = 4096


@dataclass(frozen=True)
class ClipSample:
    """One clip of one video and its targets.

    frame_count: frames of the video, as far as the store knows. indices[T + ahead]: frames to
    decode, counted from the start of the file; a video shorter than T repeats its last. picked,
    picked_pts [n]: the frames whose outputs were averaged.
    targets: teacher → mean picked outputs [K] float32; weight: teacher → 1 (counts), 0 (rejected).
    rejected: draws that the filter rejected before this one; attempt: the attempt that this one is.
    top, left: where to crop, as shares in [0, 1) of the possible range; flip: mirror it.
    """

    video: int
    frame_count: int
    start: int
    indices: NDArray[np.int64]
    picked: NDArray[np.int64]
    picked_pts: NDArray[np.int64]
    targets: dict[str, NDArray[np.float32]]
    weight: dict[str, float]
    rejected: int
    attempt: int
    top: float
    left: float
    flip: bool

    @property
    def counts(self) -> bool:
        """Whether any head learns from this clip; otherwise it is not decoded."""
        return any(self.weight.values())


@dataclass(frozen=True)
class _Video:
    """What the store records of one video: cached frames, pts and rows [N], valid starts.

    pickable: frames that a clip can have, without those that are read ahead.
    """

    frames: int
    pickable: int
    cached: NDArray[np.int64]
    pts: NDArray[np.int64]
    rows: NDArray[np.int64]
    starts: StartSet


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


@dataclass(eq=False, repr=False)
class TargetSampler:
    """Draw clips and targets from a store as a pure function of (seed, epoch, sample, attempt).

    Args:
        store: An open store.
        teachers: Whose targets are read.
        picks: Which cached frames of a clip make its targets.
        clip_frames: T.
        videos: Ids to draw from, at least one.
        seed: Seed of all draws.
        epoch_clips: Samples per epoch.
        flip: Probability that a clip is mirrored.
        view: What clips look like: teachers with cells average those under a clip's crop; all cells
            without it.
        max_entropy: teacher → largest entropy in nats (of the softmax of the mean picked logits,
            τ = 1) that counts; teachers that are not named count always. Every head has its own
            mask.
        filter_mode: "skip" draws another video, at most 100 times, when every head rejects a clip
            (after that the clip has weight zero); "zero-weight" keeps the clip with weight zero
            (as in the paper).
        fixed: Set for held-out videos. Sample i is videos[i], the middle start, no flip, the middle
            crop, picks by the video's id; nothing is drawn again.
        ahead: Frames read after a clip's own, which must exist too (flow requires one); never
            picked.
        teacher_dropping: Probability with which each teacher is dropped from a clip, unless its
            loss there is the highest; see `dropped`.
        heads: teacher → what makes logits of its features.
        shares: Groups of videos and their shares of the clips, in place of drawing all `videos`
            equally often; a rejected clip is drawn again from the same group.

    Raises:
        UsageError: There is no video to draw from.

    Example:
        `TargetSampler(store, teachers=("resnet50",), picks=PickRule.parse("random"),
        clip_frames=8, videos=store.usable(), seed=0, epoch_clips=1000).draw(0, 5)`
    """

    store: TargetStore
    _: KW_ONLY
    teachers: Sequence[str]
    picks: PickRule
    clip_frames: int
    videos: NDArray[np.int64]
    seed: int
    epoch_clips: int
    flip: float = 0.5
    view: ClipView | None = None
    max_entropy: Mapping[str, float] = field(default_factory=dict)
    filter_mode: Literal["skip", "zero-weight"] = "skip"
    fixed: bool = False
    ahead: int = 0
    teacher_dropping: float = 0.0
    heads: InitVar[Mapping[str, ClassHead] | None] = None
    shares: InitVar[tuple[Sequence[NDArray[np.int64]], Sequence[float]] | None] = None
    _known: dict[int, _Video] = field(init=False, default_factory=dict)

    def __post_init__(
        self,
        heads: Mapping[str, ClassHead] | None,
        shares: tuple[Sequence[NDArray[np.int64]], Sequence[float]] | None,
    ) -> None:
        if len(self.videos) == 0:
            raise UsageError(
                f"{self.store.name} holds no video with targets of {', '.join(self.teachers)} to "
                "draw from"
            )
        self.teachers, self.max_entropy = tuple(self.teachers), dict(self.max_entropy or {})
        self.targets = {
            name: TeacherTargets(self.store, name, (heads or {}).get(name))
            for name in self.teachers
        }
        groups, weights = shares or ((self.videos,), (1.0,))
        self.mixture = Mixture(groups, weights, seed=self.seed, epoch_clips=self.epoch_clips)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the tables of videos: a worker fills its own."""
        return self.__dict__ | {"_known": {}}

    def draw(self, epoch: int, sample: int, attempt: int = 0) -> ClipSample:
        """Return the clip of a sample, from attempt `attempt` on.

        The caller asks for the next attempt if the file is unreadable.

        Raises:
            TrainingError: More than 100 attempts (one for a held-out video) have no window that
                holds enough cached frames.
        """
        rejected = windowless = 0
        while True:
            clip = self._clip(epoch, sample, attempt)
            if clip is None:
                windowless += 1
                if windowless > MAX_REDRAWS or self.fixed:
                    raise TrainingError(self.no_window())
            else:
                draw = self._judge(clip, rejected, (epoch, sample, attempt))
                if (
                    draw.counts
                    or self.fixed
                    or self.filter_mode == "zero-weight"
                    or rejected == MAX_REDRAWS
                ):
                    return draw
                rejected += 1
            attempt += 1

    def zoom(self, epoch: int, sample: int, attempt: int) -> float:
        """Return where in the range of scales a clip is resized to, a share in [0, 1)."""
        return float(
            seeding.rng_at(self.seed, epoch, sample, attempt, stream=seeding.ZOOMS).random()
        )

    def dropped(self, epoch: int, sample: int) -> dict[str, bool]:
        """Return teacher → whether it is dropped from a sample; empty where none ever is.

        A function of (seed, epoch, sample), so that neither the number of processes nor a resume
        changes it.
        """
        if self.fixed or not self.teacher_dropping:
            return {}
        random = seeding.rng_at(self.seed, epoch, sample, stream=seeding.DROPPED_TEACHERS)
        drops = random.random(len(self.teachers)) < self.teacher_dropping
        return dict(zip(self.teachers, drops.tolist(), strict=True))

    def entropies(self, epoch: int, sample: int) -> NDArray[np.float32] | None:
        """Return the entropy in nats of the first attempt at a sample for each teacher.

        NaN for features without a head; None without a window.
        """
        clip = self._clip(epoch, sample, 0)
        if clip is None:
            return None
        seen = self._seen(clip, (epoch, sample, 0))
        nats = [self.targets[name].mean_and_entropy(clip.rows, seen)[1] for name in self.teachers]
        return np.array(nats, np.float32)

    def has_window(self, video: int) -> bool:
        """Check whether the video has a clip that holds enough cached frames."""
        return self._look_up(video).starts.count > 0

    def check_windows(self, tries: int = 1000) -> None:
        """Check that one of the first `tries` videos has a window with enough cached frames.

        Raises:
            UsageError: None has.
        """
        if not any(self.has_window(int(video)) for video in self.videos[:tries]):
            raise UsageError(self.no_window())

    def no_window(self) -> str:
        """Explain why no clip can be drawn: what the store holds and what was asked for."""
        held = f"the store holds {self.store.sampling.describe()}"
        if self.picks.kind == "center":
            return (
                f"{held}; picks=center needs the frame start + {self.clip_frames // 2} of a "
                f"{self.clip_frames}-frame clip, which no valid start of these videos has cached"
            )
        most = max((self._most_in_window(int(video)) for video in self.videos[:20]), default=0)
        picks = "pick" if self.picks.n == 1 else "picks"
        return (
            f"{held}; {_article(self.clip_frames)} {self.clip_frames}-frame clip holds {most}; "
            f"asked for {self.picks.n} {picks}"
        )

    def _most_in_window(self, video: int) -> int:
        cached = self.store.frames(video)[0]
        ends = np.searchsorted(cached, cached + self.clip_frames, side="left")
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
            starts = start_set(self.picks, cached, pickable, self.clip_frames)
            known = _Video(frames, pickable, cached, pts, rows, starts)
            if len(self._known) >= REMEMBERED:
                self._known.pop(next(iter(self._known)))
            self._known[video] = known
        return known

    def _clip(self, epoch: int, sample: int, attempt: int) -> _Clip | None:
        """Return one attempt at a sample; None if its video has no window with enough frames."""
        if self.fixed:  # keyed by the video, so that the list of videos does not matter
            video = int(self.videos[sample % len(self.videos)])
            random = seeding.rng_at(self.seed, epoch, video, attempt, stream=seeding.HELD_OUT)
        else:
            random = seeding.rng_at(self.seed, epoch, sample, attempt, stream=seeding.EXAMPLES)
            video = self._video(epoch, sample, attempt, random)
        known = self._look_up(video)
        count = known.starts.count
        if count == 0:
            return None
        # Always the same numbers in the same order, so that a crop does not depend on the pick
        # rule.
        top, left, flip = random.random(), random.random(), random.random()
        start = known.starts.nth(count // 2 if self.fixed else int(random.integers(count)))
        at = pick(self.picks, known.cached, start, self.clip_frames, random, frames=known.pickable)
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

    @property
    def has_cells(self) -> bool:
        """Whether targets depend on where a clip is cut."""
        return any(targets.has_cells for targets in self.targets.values())

    def _seen(self, clip: _Clip, key: tuple[int, int, int]) -> Seen:
        """Return what the student sees of the frames of attempt `key` (epoch, sample, attempt)."""
        mirrored = not self.fixed and clip.flip < self.flip
        if self.view is None or not self.has_cells:
            return Seen(clip.video, mirrored)
        low, high = self.view.scale
        zoom = self.zoom(*key) if low < high and not self.fixed else 0.0
        crop = None if self.fixed else Crop(clip.top, clip.left, mirrored, zoom)
        return Seen(clip.video, mirrored, self.view.region(crop))

    def _judge(self, clip: _Clip, rejected: int, key: tuple[int, int, int]) -> ClipSample:
        seen = self._seen(clip, key)
        targets: dict[str, NDArray[np.float32]] = {}
        weight: dict[str, float] = {}
        for name, of in self.targets.items():
            mean, weight[name] = None, 1.0
            if name in self.max_entropy:
                mean, nats = of.mean_and_entropy(clip.rows, seen)
                weight[name] = 1.0 if nats <= self.max_entropy[name] else 0.0
            targets[name] = mean_outputs(of.read(clip.rows, seen)) if mean is None else mean
        stop = clip.start + self.clip_frames + self.ahead
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
            targets=targets,
            weight=weight,
            rejected=rejected,
            attempt=key[2],
            top=0.5 if self.fixed else clip.top,
            left=0.5 if self.fixed else clip.left,
            flip=seen.mirrored,
        )


def measure_entropies(sampler: TargetSampler, count: int) -> Iterator[NDArray[np.float32]]:
    """Yield entropies [teachers] in nats of the sampler's first `count` draws, without the filter.

    They begin with epoch 0; draws without a window are left out. A quantile is taken over them.
    """
    for k in range(count):
        entropies = sampler.entropies(k // sampler.epoch_clips, k % sampler.epoch_clips)
        if entropies is not None:
            yield entropies


def _article(number: int) -> str:
    return "an" if str(number).startswith(("8", "11", "18")) else "a"
