"""Fill shards: decode, run the teachers, stage the files. What a worker does; it never commits.

One decode serves all teachers. Videos come from the decode pool in the planned order whatever
number of processes decodes, batches take rows in that order, never cross a shard and are padded to
the batch size: the same plan gives the same batches, and so the same bits, for any number of
decoders and after any kill.

Shapes: B rows of a batch, H W pixels of a view, K classes of a teacher.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import VideoError
from ..common.numerics import entropy
from ..store import layout as fmt
from ..store.encoding import Codec, Sums, arrays_of, error_record, storable
from ..store.staging import FramesPart, HashPart, ShardResult, TeacherPart, new_staging, stage_array
from ..store.storage import LocalFiles
from ..store.store_options import Encoding
from ..video.container import digest
from ..video.perceptual_hash import SIDE, grey, hash_p, hash_r
from ..video.pool.decode_pool import Block, DecodeJob, DecodePool, Done, Failed
from ..video.sampling import Sampling
from .teacher_runner import Batch, Outputs, TeacherRunner


@dataclass(frozen=True)
class SegmentTask:
    """One segment to decode; `stored` holds (index, pts) [n] of rows that the store has already."""

    id: int
    video: int
    path: str
    digest: str
    first: int
    end: int | None
    bound: int
    stored: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None


@dataclass(frozen=True)
class ShardTask:
    """One shard: its segments in order, and the teachers whose rows it lacks.

    Each teacher comes with its encoding.
    """

    shard: int
    segments: tuple[SegmentTask, ...]
    teachers: dict[str, Encoding]
    frames_stored: bool
    num_rows_stored: int = 0
    hashes: bool = False
    """Whether the store lacks the hashes of its frames."""


@dataclass
class _Outcome:
    """Where a segment's rows stand in the working arrays, and what became of it."""

    task: SegmentTask
    start: int
    stop: int
    frames: int = -1
    counted: bool = False
    note: str | None = None
    failed: str | None = None
    overflow: int | None = None


@dataclass
class _Rows:
    """Working arrays of one shard, in decoding order; rows of failed segments are dropped later.

    stored: teacher → its arrays as the store keeps them, by name. running: rows whose batches are
    at the teachers, in order.
    """

    task: ShardTask
    index: NDArray[np.int64]
    pts: NDArray[np.int64]
    video: NDArray[np.int32]
    stored: dict[str, dict[str, NDArray[Any]]]
    error: dict[str, NDArray[np.float32]]
    good: dict[str, NDArray[np.bool_]]
    codecs: dict[str, Codec]
    grey: NDArray[np.uint8]
    """[n, 32, 32] of each row, for its hashes; nothing where these are not asked for."""
    used: int = 0
    outcomes: list[_Outcome] = field(default_factory=list)
    running: deque[tuple[slice, Future[Outputs]]] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether all batches that were submitted are through the teachers."""
        return all(future.done() for _, future in self.running)

    def submit(self, runner: TeacherRunner, batch: Batch) -> None:
        """Send the rows that came last, as many as the batch holds, through the teachers."""
        at = slice(self.used - batch.count, self.used)
        if self.task.teachers:
            self.running.append((at, runner.submit(batch, self.task.teachers)))
        else:
            runner.give_back(batch)

    def collect(self, *, wait: bool = False) -> None:
        """Enter the outputs of batches that are through; raises what a teacher raised."""
        while self.running and (wait or self.running[0][1].done()):
            at, future = self.running.popleft()
            for name, values in future.result().items():
                self._enter(name, at, values[: at.stop - at.start])

    def _enter(self, name: str, at: slice, values: NDArray[np.float32]) -> None:
        codec, stored = self.codecs[name], self.stored[name]
        self.good[name][at] = storable(values)
        encoded = codec.encode(values)
        for array, rows in encoded.items():
            stored[array][at] = rows
        with np.errstate(all="ignore"):  # rows that are not storable
            if codec.output == "logits":
                stored["entropy"][at] = entropy(values)
            self.error[name][at] = codec.error(values, codec.decode(encoded))


class ShardFiller:
    """Fills shards of the store at `root` with frames of `pool` and the outputs of `runner`.

    advance: called with the number of rows decoded, for the progress bar.
    """

    def __init__(
        self,
        root: Path,
        runner: TeacherRunner,
        pool: DecodePool,
        *,
        sampling: Sampling,
        shard_rows: int,
        advance: Callable[[int], Any] = lambda n: None,
    ) -> None:
        self.root, self.runner, self.pool = root, runner, pool
        self.outputs = runner.outputs
        self.sampling, self.shard_rows = sampling, shard_rows
        self.advance = advance
        self._codecs: dict[str, Codec] = {}

    def fill(self, tasks: Iterable[ShardTask]) -> Iterator[ShardResult]:
        """Yield shards in the order of `tasks`.

        Frames are decoded and teachers run ahead across the borders of shards. Ends with its pool
        and runner ready for another call, also when it raises or is closed: a worker keeps both.
        """
        waiting: deque[ShardTask] = deque()  # given to the pool
        decoded: deque[_Rows] = deque()  # the teachers are at the last batches of these

        def jobs() -> Iterator[DecodeJob]:
            for task in tasks:
                waiting.append(task)
                for s in task.segments:
                    yield DecodeJob(
                        s.id,
                        s.path,
                        self.sampling,
                        s.first,
                        s.end,
                        None if s.bound == 0 else s.bound,
                    )

        try:
            # Closed here: the traceback of an error holds this frame, and so the stream, for as
            # long as dask keeps it.
            with closing(self.pool.stream(jobs())) as events:
                for event in events:
                    while not waiting[0].segments:
                        decoded.append(self._allocate(waiting.popleft()))
                    for _ in self._decode(
                        self._allocate(waiting.popleft()), event, events, decoded
                    ):
                        while decoded and decoded[0].ready:
                            yield self._finish(decoded.popleft())
            decoded += [self._allocate(task) for task in waiting]
            while decoded:
                yield self._finish(decoded.popleft())
        finally:
            self.runner.take_back()

    def _decode(
        self, rows: _Rows, event: Any, events: Iterator[Any], decoded: deque[_Rows]
    ) -> Iterator[None]:
        """Decode a shard's segments and submit its batches; yields after each block of frames."""
        batch = self.runner.take()
        for n, segment in enumerate(rows.task.segments):
            if n:
                event = next(events)
            outcome = _Outcome(segment, rows.used, rows.used)
            while isinstance(event, Block):
                batch = self._take(rows, segment, event, batch)
                yield
                event = next(events)
            outcome.stop = rows.used
            self._conclude(outcome, event, rows)
            rows.outcomes.append(outcome)
            self.advance(outcome.stop - outcome.start)
        if batch.count:
            rows.submit(self.runner, batch)
        else:
            self.runner.give_back(batch)
        decoded.append(rows)
        yield

    def _finish(self, rows: _Rows) -> ShardResult:
        """Stage a shard once its last batch is through."""
        rows.collect(wait=True)
        folder = new_staging(self.root, rows.task.shard)
        try:
            return self._stage(rows.task, rows, folder)
        except BaseException:  # mostly a full disk: leave the free space to the next attempt
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _allocate(self, task: ShardTask) -> _Rows:
        # A file whose probe failed has bound 0 and may yield rows all the same: then the arrays
        # grow.
        n = sum(s.bound for s in task.segments)
        return _Rows(
            task,
            np.empty(n, np.int64),
            np.empty(n, np.int64),
            np.empty(n, np.int32),
            {
                name: {s.name: np.empty((n, *s.row), s.dtype) for s in self._specs(name)}
                for name in task.teachers
            },
            {name: np.empty(n, np.float32) for name in task.teachers},
            {name: np.empty(n, np.bool_) for name in task.teachers},
            {name: self._codec(name) for name in task.teachers},
            np.empty((n if task.hashes else 0, SIDE, SIDE), np.uint8),
        )

    def _codec(self, name: str) -> Codec:
        """Return how the store holds a teacher's rows; it never changes."""
        if name not in self._codecs:
            files = LocalFiles(self.root)
            fmt.check_root(files)
            node = fmt.read_nodes(files, "teachers", [name])[name]
            self._codecs[name] = fmt.read_codec(files, name, node)
        return self._codecs[name]

    def _specs(self, name: str) -> list[fmt.ArraySpec]:
        codec = self._codec(name)
        return fmt.teacher_specs(name, codec.width, codec.encoding, codec.output)

    def _take(self, rows: _Rows, segment: SegmentTask, block: Block, batch: Batch) -> Batch:
        """Copy a block's frames into batches and submit each full one; return the unfilled one."""
        # The last picture of a frame is the one that its hashes are computed from.
        greys = grey(block.images[-1]) if rows.task.hashes else None
        for i in range(len(block.index)):
            if rows.used == len(rows.index):
                _double(rows)
            if greys is not None:
                rows.grey[rows.used] = greys[i]
            rows.index[rows.used], rows.pts[rows.used] = block.index[i], block.pts[i]
            rows.video[rows.used] = segment.video
            for buffer, images in zip(batch.images, block.images, strict=False):
                buffer[batch.count] = images[i]
            rows.used, batch.count = rows.used + 1, batch.count + 1
            if batch.full:
                rows.submit(self.runner, batch)
                batch = self.runner.take()
                rows.collect()
        return batch

    def _conclude(self, outcome: _Outcome, event: Done | Failed, rows: _Rows) -> None:
        segment = outcome.task
        n = outcome.stop - outcome.start
        if isinstance(event, Failed):
            outcome.failed = event.reason
            return
        outcome.frames, outcome.note, outcome.counted = (
            event.frames,
            event.note,
            event.clock == "counted",
        )
        try:
            # After the decode, so that a file that changed meanwhile is caught too.
            now = digest(segment.path)
        except VideoError as error:
            outcome.failed = str(error)
            return
        if not segment.digest:
            outcome.failed = "could not be read when it was listed; --retry-failed tries it again"
        elif now != segment.digest:
            outcome.failed = "the file changed after it was listed"
        elif segment.stored is not None:
            index, pts = segment.stored
            at = slice(outcome.start, outcome.stop)
            if n != len(index) or (rows.index[at] != index).any() or (rows.pts[at] != pts).any():
                outcome.failed = (
                    f"its frames differ from those in the store ({n} sampled, {len(index)} stored)"
                )
        elif event.more or n > segment.bound:
            outcome.overflow = max(n, segment.bound + 1)
        elif n == 0:
            outcome.failed = event.note or "no frame could be decoded"

    def _stage(self, task: ShardTask, rows: _Rows, folder: Path) -> ShardResult:
        frames, place = self._stage_frames(task, rows, folder)
        teachers: dict[str, TeacherPart] = {}
        for name in task.teachers:
            part, codec = TeacherPart(), self._codec(name)
            full = {
                s.name: np.full((place.total, *s.row), s.fill, s.dtype) for s in self._specs(name)
            }
            kept = np.zeros(place.total, bool)
            errors: list[NDArray[np.float32]] = []
            for outcome, first in place.kept:
                at = slice(outcome.start, outcome.stop)
                if not rows.good[name][at].all():
                    frame = int(rows.index[at][~rows.good[name][at]][0])
                    part.failed[outcome.task.id] = (
                        f"the teacher's {codec.output} of frame {frame} are not finite"
                    )
                    continue
                for array, values in full.items():
                    values[first : first + at.stop - at.start] = rows.stored[name][array][at]
                kept[first : first + at.stop - at.start] = True
                errors.append(rows.error[name][at])
                part.rows += at.stop - at.start
            part.error = error_record(
                np.concatenate(errors or [np.empty(0, np.float32)]), codec.output
            )
            if codec.output == "features":
                arrays = arrays_of(codec.encoding, codec.output)
                part.sums = Sums.of(codec, {a: full[a][kept] for a in arrays})
            if task.frames_stored:
                part.failed.update({o.task.id: o.failed for o in rows.outcomes if o.failed})
            for spec in self._specs(name):
                values = full[spec.name]
                part.files += stage_array(folder, spec, task.shard, values, self.shard_rows)
            teachers[name] = part
        hashes = self._stage_hashes(task, rows, place, folder) if task.hashes else None
        return ShardResult(task.shard, frames, teachers, str(folder), hashes)

    def _stage_hashes(
        self, task: ShardTask, rows: _Rows, place: _Placement, folder: Path
    ) -> HashPart:
        """Stage the hashes of a shard's frames: R is of a segment as a whole."""
        part = HashPart()
        if task.frames_stored:
            part.failed = {o.task.id: o.failed for o in rows.outcomes if o.failed}
        full = [np.full(place.total, spec.fill, spec.dtype) for spec in fmt.hash_specs()]
        for outcome, first in place.kept:
            pictures = rows.grey[outcome.start : outcome.stop]
            for values, hashes in zip(full, (hash_p(pictures), *hash_r(pictures)), strict=True):
                values[first : first + len(pictures)] = hashes
            part.rows += len(pictures)
        for spec, values in zip(fmt.hash_specs(), full, strict=True):
            part.files += stage_array(folder, spec, task.shard, values, self.shard_rows)
        return part

    def _stage_frames(
        self, task: ShardTask, rows: _Rows, folder: Path
    ) -> tuple[FramesPart | None, _Placement]:
        """Stage the frame tables unless the store has them.

        Returns the place of each segment's rows.
        """
        good = [o for o in rows.outcomes if o.failed is None and o.overflow is None]
        if task.frames_stored:
            first = _starts([len(s.stored[0]) if s.stored else 0 for s in task.segments])
            by_id = {s.id: at for s, at in zip(task.segments, first, strict=True)}
            return None, _Placement([(o, by_id[o.task.id]) for o in good], task.num_rows_stored)
        first = _starts([o.stop - o.start for o in good])
        total = sum(o.stop - o.start for o in good)
        place = _Placement(list(zip(good, first, strict=True)), total)
        start_of = {o.task.id: at for o, at in place.kept}
        part = FramesPart()
        for o in rows.outcomes:
            ok = o.task.id in start_of
            part.segment.append(o.task.id)
            part.first_row.append(start_of.get(o.task.id, 0))
            part.rows.append(o.stop - o.start if ok else 0)
            part.frames.append(o.frames)
            if o.failed is not None:
                part.failed[o.task.id] = o.failed
            elif o.overflow is not None:
                part.overflow[o.task.id] = o.overflow
            if ok and o.note:
                part.notes[o.task.id] = o.note
            if ok and o.counted:
                part.counted.append(o.task.id)
        keep = np.concatenate([np.arange(o.start, o.stop) for o in good] or [np.empty(0, np.int64)])
        columns: dict[str, NDArray[Any]] = {
            "video": rows.video,
            "index": rows.index,
            "pts": rows.pts,
        }
        for spec in fmt.frame_specs():
            values = columns[spec.name][keep]
            part.files += stage_array(folder, spec, task.shard, values, self.shard_rows)
        return part, place


@dataclass(frozen=True)
class _Placement:
    """Segments that keep their rows, with their first row in the shard, and the shard's rows."""

    kept: list[tuple[_Outcome, int]]
    total: int


def _starts(lengths: list[int]) -> list[int]:
    return [int(x) for x in np.cumsum([0, *lengths])[:-1]]


def _double(rows: _Rows) -> None:
    grow = max(len(rows.index), 64)

    def more(a: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([a, np.empty((grow, *a.shape[1:]), a.dtype)])

    rows.index, rows.pts, rows.video = more(rows.index), more(rows.pts), more(rows.video)
    rows.grey = more(rows.grey) if rows.task.hashes else rows.grey
    groups: list[dict[str, Any]] = [*rows.stored.values(), rows.error, rows.good]
    for arrays in groups:
        for name in arrays:
            arrays[name] = more(arrays[name])
