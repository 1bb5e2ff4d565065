"""Fill shards: decode their videos, run the teachers and stage the files, without committing them.

A video is decoded once for all teachers. The decode pool returns videos in the planned order for
any number of processes. Batches take rows in that order, end with their shard and are padded to the
batch size. The same plan therefore gives the same batches, and so the same bits, for any number of
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
    """One segment to decode.

    `stored` holds the (index, pts) [n] of its rows if the store has the frames already.
    """

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
    """One shard: its segments in order, and the encodings of the teachers whose rows it lacks."""

    shard: int
    segments: tuple[SegmentTask, ...]
    teachers: dict[str, Encoding]
    frames_stored: bool
    num_rows_stored: int = 0
    hashes: bool = False
    """Whether the store lacks the hashes of its frames."""


@dataclass
class _Outcome:
    """The rows of a segment in the working arrays, and the result of decoding it."""

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

    Args:
        task: The shard.
        index: Frame indices [n].
        pts: Presentation timestamps [n].
        video: Videos [n].
        stored: Teacher → name of an array → its values [n, ...] in the store's encoding.
        error: Teacher → errors of the encoding [n].
        finite: Teacher → whether its outputs can be stored [n].
        codecs: Teacher → its encoding.
        grey: Grey pictures uint8 [n, 32, 32], for the hashes of the frames; [0, 32, 32] if the task
            has no hashes.
        num_rows: Number of rows that are decoded.
        outcomes: The segments that are decoded.
        running: The rows of each batch that the teachers compute, in order.
    """

    task: ShardTask
    index: NDArray[np.int64]
    pts: NDArray[np.int64]
    video: NDArray[np.int32]
    stored: dict[str, dict[str, NDArray[Any]]]
    error: dict[str, NDArray[np.float32]]
    finite: dict[str, NDArray[np.bool_]]
    codecs: dict[str, Codec]
    grey: NDArray[np.uint8]
    num_rows: int = 0
    outcomes: list[_Outcome] = field(default_factory=list)
    running: deque[tuple[slice, Future[Outputs]]] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether the teachers have computed all batches."""
        return all(future.done() for _, future in self.running)

    def submit(self, runner: TeacherRunner, batch: Batch) -> None:
        """Start the teachers on a batch of the latest rows."""
        rows = slice(self.num_rows - batch.count, self.num_rows)
        if self.task.teachers:
            self.running.append((rows, runner.submit(batch, self.task.teachers)))
        else:
            runner.give_back(batch)

    def collect(self, *, wait: bool = False) -> None:
        """Encode the outputs of the batches that are done.

        Args:
            wait: Whether to wait for all batches.

        Raises:
            TeacherError: A teacher failed.
        """
        while self.running and (wait or self.running[0][1].done()):
            rows, future = self.running.popleft()
            for name, values in future.result().items():
                self._encode(name, rows, values[: rows.stop - rows.start])

    def _encode(self, name: str, rows: slice, values: NDArray[np.float32]) -> None:
        """Encode a teacher's outputs [n, D] of these rows."""
        codec, stored = self.codecs[name], self.stored[name]
        self.finite[name][rows] = storable(values)
        encoded = codec.encode(values)
        for array, encoded_rows in encoded.items():
            stored[array][rows] = encoded_rows
        # Rows that are not finite would warn; their segments fail later.
        with np.errstate(all="ignore"):
            if codec.output == "logits":
                stored["entropy"][rows] = entropy(values)
            self.error[name][rows] = codec.error(values, codec.decode(encoded))

    def grow(self) -> None:
        """Double the arrays."""
        num_added = max(len(self.index), 64)

        def grown(array: NDArray[Any]) -> NDArray[Any]:
            added = np.empty((num_added, *array.shape[1:]), array.dtype)
            return np.concatenate([array, added])

        self.index, self.pts, self.video = grown(self.index), grown(self.pts), grown(self.video)
        if self.task.hashes:
            self.grey = grown(self.grey)
        groups: list[dict[str, Any]] = [*self.stored.values(), self.error, self.finite]
        for arrays in groups:
            for name in arrays:
                arrays[name] = grown(arrays[name])


class ShardFiller:
    """Fills shards with decoded frames and the outputs of teachers.

    Args:
        root: The store.
        runner: Runs the teachers.
        pool: Decodes the videos.
        sampling: The sampling of the store.
        shard_rows: The number of rows per shard.
        advance: Called with numbers of decoded rows, for a progress bar.
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

        Decoding and teachers run ahead of the shard that is yielded. When this ends, by an error or
        by being closed too, the pool and the runner are ready for another call: a worker reuses
        both.
        """
        # Tasks that were given to the pool, and shards whose last batches the teachers compute.
        waiting: deque[ShardTask] = deque()
        decoded: deque[_Rows] = deque()

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
            # The stream is closed here, since the traceback of an error refers to this frame, and
            # so to the stream, for as long as dask keeps the error.
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
        """Decode a shard's segments and submit its batches; yield after each block of frames.

        Args:
            rows: The arrays of the shard.
            event: The first event of its first segment.
            events: The events after that one.
            decoded: Receives the arrays.
        """
        batch = self.runner.take()
        for number, segment in enumerate(rows.task.segments):
            if number:
                event = next(events)
            outcome = _Outcome(segment, rows.num_rows, rows.num_rows)
            while isinstance(event, Block):
                batch = self._take(rows, segment, event, batch)
                yield
                event = next(events)
            outcome.stop = rows.num_rows
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
        """Stage a shard after its last batch."""
        rows.collect(wait=True)
        folder = new_staging(self.root, rows.task.shard)
        try:
            return self._stage(rows.task, rows, folder)
        except BaseException:
            # The disk may be full: free the space for the next attempt.
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _allocate(self, task: ShardTask) -> _Rows:
        # The bound of a file whose probe failed is 0. If it yields rows, the arrays grow.
        n = sum(segment.bound for segment in task.segments)
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
        """Return the encoding of a teacher's rows, which never changes."""
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
        # The last view is the one whose pictures are hashed.
        greys = grey(block.images[-1]) if rows.task.hashes else None
        for i in range(len(block.index)):
            if rows.num_rows == len(rows.index):
                rows.grow()
            if greys is not None:
                rows.grey[rows.num_rows] = greys[i]
            rows.index[rows.num_rows], rows.pts[rows.num_rows] = block.index[i], block.pts[i]
            rows.video[rows.num_rows] = segment.video
            for buffer, images in zip(batch.images, block.images, strict=False):
                buffer[batch.count] = images[i]
            rows.num_rows, batch.count = rows.num_rows + 1, batch.count + 1
            if batch.full:
                rows.submit(self.runner, batch)
                batch = self.runner.take()
                rows.collect()
        return batch

    def _conclude(self, outcome: _Outcome, event: Done | Failed, rows: _Rows) -> None:
        """Complete the outcome of a segment by the last event of its decoding."""
        segment = outcome.task
        num_rows = outcome.stop - outcome.start
        if isinstance(event, Failed):
            outcome.failed = event.reason
            return
        outcome.frames, outcome.note, outcome.counted = (
            event.frames,
            event.note,
            event.clock == "counted",
        )
        try:
            # The digest is computed after decoding, which detects a file that changed meanwhile.
            current_digest = digest(segment.path)
        except VideoError as error:
            outcome.failed = str(error)
            return
        if not segment.digest:
            outcome.failed = "could not be read when it was listed; --retry-failed tries it again"
        elif current_digest != segment.digest:
            outcome.failed = "the file changed after it was listed"
        elif segment.stored is not None:
            index, pts = segment.stored
            decoded = slice(outcome.start, outcome.stop)
            if (
                num_rows != len(index)
                or (rows.index[decoded] != index).any()
                or (rows.pts[decoded] != pts).any()
            ):
                outcome.failed = (
                    f"its frames differ from those in the store ({num_rows} sampled, "
                    f"{len(index)} stored)"
                )
        elif event.more or num_rows > segment.bound:
            outcome.overflow = max(num_rows, segment.bound + 1)
        elif num_rows == 0:
            outcome.failed = event.note or "no frame could be decoded"

    def _stage(self, task: ShardTask, rows: _Rows, folder: Path) -> ShardResult:
        frames, placement = self._stage_frames(task, rows, folder)
        teachers = {
            name: self._stage_teacher(name, task, rows, placement, folder) for name in task.teachers
        }
        hashes = self._stage_hashes(task, rows, placement, folder) if task.hashes else None
        return ShardResult(task.shard, frames, teachers, str(folder), hashes)

    def _stage_teacher(
        self, name: str, task: ShardTask, rows: _Rows, placement: _Placement, folder: Path
    ) -> TeacherPart:
        """Stage the rows of one teacher; a segment with a row that is not finite fails."""
        part, codec = TeacherPart(), self._codec(name)
        full = {
            s.name: np.full((placement.num_rows, *s.row), s.fill, s.dtype)
            for s in self._specs(name)
        }
        is_stored = np.zeros(placement.num_rows, bool)
        errors: list[NDArray[np.float32]] = []
        for outcome, first in placement.segments:
            decoded = slice(outcome.start, outcome.stop)
            placed = slice(first, first + outcome.stop - outcome.start)
            finite = rows.finite[name][decoded]
            if not finite.all():
                frame = int(rows.index[decoded][~finite][0])
                part.failed[outcome.task.id] = (
                    f"the teacher's {codec.output} of frame {frame} are not finite"
                )
                continue
            for array, values in full.items():
                values[placed] = rows.stored[name][array][decoded]
            is_stored[placed] = True
            errors.append(rows.error[name][decoded])
            part.rows += outcome.stop - outcome.start
        part.error = error_record(np.concatenate(errors or [np.empty(0, np.float32)]), codec.output)
        if codec.output == "features":
            arrays = arrays_of(codec.encoding, codec.output)
            part.sums = Sums.of(codec, {a: full[a][is_stored] for a in arrays})
        if task.frames_stored:
            part.failed.update({o.task.id: o.failed for o in rows.outcomes if o.failed})
        for spec in self._specs(name):
            part.files += stage_array(folder, spec, task.shard, full[spec.name], self.shard_rows)
        return part

    def _stage_hashes(
        self, task: ShardTask, rows: _Rows, placement: _Placement, folder: Path
    ) -> HashPart:
        """Stage the hashes of a shard's frames; the hash R depends on the whole segment."""
        part = HashPart()
        if task.frames_stored:
            part.failed = {o.task.id: o.failed for o in rows.outcomes if o.failed}
        full = [np.full(placement.num_rows, spec.fill, spec.dtype) for spec in fmt.hash_specs()]
        for outcome, first in placement.segments:
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

        Returns:
            The frame tables, None if the store has them; and the placement of the rows in the
            shard.
        """
        usable = [o for o in rows.outcomes if o.failed is None and o.overflow is None]
        if task.frames_stored:
            starts = _starts([len(s.stored[0]) if s.stored else 0 for s in task.segments])
            start_of = {s.id: first for s, first in zip(task.segments, starts, strict=True)}
            placed = [(o, start_of[o.task.id]) for o in usable]
            return None, _Placement(placed, task.num_rows_stored)
        starts = _starts([o.stop - o.start for o in usable])
        num_rows = sum(o.stop - o.start for o in usable)
        placement = _Placement(list(zip(usable, starts, strict=True)), num_rows)
        start_of = {o.task.id: first for o, first in placement.segments}
        part = FramesPart()
        for o in rows.outcomes:
            is_usable = o.task.id in start_of
            part.segment.append(o.task.id)
            part.first_row.append(start_of.get(o.task.id, 0))
            part.rows.append(o.stop - o.start if is_usable else 0)
            part.frames.append(o.frames)
            if o.failed is not None:
                part.failed[o.task.id] = o.failed
            elif o.overflow is not None:
                part.overflow[o.task.id] = o.overflow
            if is_usable and o.note:
                part.notes[o.task.id] = o.note
            if is_usable and o.counted:
                part.counted.append(o.task.id)
        decoded = np.concatenate(
            [np.arange(o.start, o.stop) for o in usable] or [np.empty(0, np.int64)]
        )
        columns: dict[str, NDArray[Any]] = {
            "video": rows.video,
            "index": rows.index,
            "pts": rows.pts,
        }
        for spec in fmt.frame_specs():
            values = columns[spec.name][decoded]
            part.files += stage_array(folder, spec, task.shard, values, self.shard_rows)
        return part, placement


@dataclass(frozen=True)
class _Placement:
    """The placement of decoded rows in a shard.

    Args:
        segments: The segments whose rows are stored, each with its first row in the shard.
        num_rows: The number of rows of the shard.
    """

    segments: list[tuple[_Outcome, int]]
    num_rows: int


def _starts(lengths: list[int]) -> list[int]:
    """Return the first row of each of consecutive segments."""
    return [int(x) for x in np.cumsum([0, *lengths])[:-1]]
