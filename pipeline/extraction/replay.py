"""Rows of a store computed again: frames decoded, a model run over them, its outputs compared.

Outputs are computed in batches of the recorded size in which each row has its original place, so
that the same torch on the same kind of device gives the same bits; elsewhere the last bits differ,
for which there is a tolerance: for logits in standard deviations of a row, for features by cosine.

Shapes: B rows of a batch, n rows, D numbers of an output.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.errors import VideoError
from ..store.encoding import Codec, arrays_of, cosine_error
from ..store.reader import TargetStore
from ..store.verify import Finding
from ..teachers.teacher import Teacher, TeacherOutput
from ..video.container import digest
from ..video.pool.decode_pool import Block, DecodeJob, DecodePool, Failed

# How far a row may be off in addition to its rounding: root mean square over classes, in standard
# deviations of the row. In fp32 another batch size makes 2e-6; bf16 is up to 0.12 off fp32, the
# next cached frame 0.2 or more (docs/benchmarks.md).
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}
# The same of features, in lengths of the row.
FEATURES_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


class Replay:
    """One teacher of the store, whose rows are compared with what its output is now."""

    def __init__(self, store: TargetStore, name: str, of: TeacherOutput) -> None:
        self.store, self.name, self.of, self.teacher = store, name, of, of.teacher
        self.commits = store.index.teachers[name]
        self.rows, self.equal, self.worst = 0, 0, 0.0
        self._off: dict[int, tuple[int, float]] = {}

    def has(self, segment: int) -> bool:
        """Return whether the store has this teacher's rows of a segment."""
        committed = int(self.store.index.shard[segment]) in self.commits.shards
        return committed and segment not in self.commits.failed

    def batch_size(self, segment: int) -> int:
        """Return the size of the batches in which the rows of a segment were computed."""
        return _batch_size(self.commits.commits[int(self.store.index.shard[segment])]["run"])

    def compare(self, values: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        """Compare outputs [n, D] with the store's rows [n] of one shard."""
        codec = self.store.teachers[self.name].codec
        arrays = arrays_of(codec.encoding, codec.output)
        stored = {a: self.store.read_stored(self.name, a, rows) for a in arrays}
        now = codec.encode(values)
        self.equal += int(np.all([_rows_equal(stored[a], now[a]) for a in stored], axis=0).sum())
        compare = _compare_logits if codec.output == "logits" else _compare_features
        off, allowed, difference = compare(codec, stored, values, self.teacher.precision)
        self.worst = max(self.worst, float(np.nanmax(difference, initial=0)))
        bad = ~(off <= allowed)  # also where it is nan
        if bad.any():
            shard = int(rows[0]) // self.store.index.shard_rows
            count, worst = self._off.get(shard, (0, 0.0))
            self._off[shard] = (count + int(bad.sum()), max(worst, float(np.max(off[bad]))))
        self.rows += len(rows)

    def findings(self, path: str) -> list[Finding]:
        """Return what differed since the last call."""
        off, self._off = self._off, {}
        return [
            Finding(
                f"{path}: of {n} frames the teacher computes other {self.of.output}, off by up to {worst:.3g}",
                shard,
                self.name,
            )
            for shard, (n, worst) in off.items()
        ]

    def summary(self) -> dict[str, Any]:
        """Describe how many rows were compared and how close they are.

        Names the share equal to the bit, and the largest difference: of logits in deviations of its
        row, of features 1 − cosine.
        """
        return {
            "rows": self.rows,
            "bit_equal": self.equal / self.rows if self.rows else None,
            "largest_difference": self.worst,
            "device": self.teacher.device.type,
            "torch": torch.__version__.split("+")[0],
        }


@dataclass
class _Batch:
    """Images uint8 [B, h, w, 3] that wait for a forward pass, for which outputs, and their rows."""

    images: NDArray[np.uint8]
    replays: list[Replay]
    at: tuple[int, int]  # shard and batch
    places: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class Rerun:
    """A model run again, one forward pass for all of its outputs that the store holds.

    Feed it the rows of one video after the other. Batches run in the threads of `pool`, at most
    `most` of them at a time; without one, in the caller's.
    """

    def __init__(
        self,
        teacher: Teacher,
        replays: Sequence[Replay],
        pool: ThreadPoolExecutor | None = None,
        most: int = 1,
    ) -> None:
        self.teacher, self.replays = teacher, tuple(replays)
        self._pool, self._most = pool, most
        self._batches: dict[int, _Batch] = {}
        self._running: deque[tuple[_Batch, Future[dict[str, Tensor]]]] = deque()

    def feed(self, images: NDArray[np.uint8], rows: NDArray[np.int64], segment: int) -> None:
        """Take images [n, h, w, 3] of the store's rows [n], ascending, of a segment.

        The model runs whenever a batch is full.
        """
        by_size: dict[int, list[Replay]] = {}
        for replay in self.replays:
            if replay.has(segment):
                by_size.setdefault(replay.batch_size(segment), []).append(replay)
        for size, replays in by_size.items():
            for image, row in zip(images, rows.tolist(), strict=True):
                shard, inside = divmod(row, replays[0].store.index.shard_rows)
                at, place = (shard, inside // size), inside % size
                batch = self._batches.get(size)
                if batch is None or (batch.at, batch.replays) != (at, replays):
                    self._start(size)
                    empty = np.zeros((size, *self.teacher.input_shape, 3), np.uint8)
                    batch = self._batches[size] = _Batch(empty, replays, at)
                batch.images[place] = image
                batch.places.append(place)
                batch.rows.append(row)

    def run(self) -> None:
        """Run the model on the images that wait, and compare with what is stored."""
        for size in list(self._batches):
            self._start(size)
        self._compare(0)

    def _start(self, size: int) -> None:
        """Run the batch of that size, if there is one."""
        batch = self._batches.pop(size, None)
        if batch is None:
            return
        keys = [replay.of.key for replay in batch.replays]
        if self._pool is None:
            done: Future[dict[str, Tensor]] = Future()
            done.set_result(self.teacher.compute(batch.images, keys))
        else:
            done = self._pool.submit(self.teacher.compute, batch.images, keys)
        self._running.append((batch, done))
        self._compare(self._most)

    def _compare(self, most: int) -> None:
        """Compare what has run, until at most so many batches still run."""
        while len(self._running) > most:
            batch, done = self._running.popleft()
            values = done.result()
            for replay in batch.replays:
                replay.compare(values[replay.of.key].numpy()[batch.places], np.array(batch.rows))


def other_file(store: TargetStore, video: int, path: str) -> str | None:
    """Return why a file is not that of a video that the teachers saw; None if it is."""
    try:
        here = digest(path)
    except VideoError as error:
        return str(error)
    seen = store.digest(video)
    return None if here == seen else f"changed, its digest is {here}, the teachers saw {seen}"


def replay_segment(
    store: TargetStore,
    segment: int,
    path: str,
    pool: DecodePool,
    view_of: Mapping[Rerun, int],
    most: int | None = None,
) -> str | None:
    """Decode the frames of a segment again and feed the models; return why there are others.

    Args:
        store: The store.
        segment: One that holds rows.
        path: The file of its video.
        pool: Decodes it.
        view_of: The models, each with the place of its view among those of `pool`.
        most: Rows, the first ones; default all.
    """
    rows = store.rows_of_segments(np.array([segment]))[:most]
    index, pts = store.read_table("index", rows), store.read_table("pts", rows)
    first, end = int(store.index.first[segment]), int(store.index.end[segment])
    job = DecodeJob(
        segment, path, store.sampling, first, None if end < 0 else end, most and len(rows)
    )
    done, differs = 0, False
    for event in pool.stream([job]):
        if isinstance(event, Failed):
            return event.reason
        if not isinstance(event, Block) or differs:
            continue
        at = slice(done, done + len(event.index))
        differs = not (
            np.array_equal(index[at], event.index) and np.array_equal(pts[at], event.pts)
        )
        if not differs:
            done = at.stop
            for rerun, view in view_of.items():
                rerun.feed(event.images[view], rows[at], segment)
    if differs:
        return "other frames (index or pts) are sampled than are stored"
    return None if done == len(rows) else f"{done} frames are sampled, {len(rows)} are stored"


_Compared = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Of each row [n]: how far it is off, how far it may be, and the difference that is reported."""


def _compare_logits(
    codec: Codec, stored: Mapping[str, NDArray[Any]], logits: NDArray[np.float32], precision: str
) -> _Compared:
    off = np.sqrt(np.square(codec.decode(stored) - logits).mean(axis=1))
    spread = logits.std(axis=1)
    allowed = codec.rounding(stored) + TOLERANCE[precision] * spread
    return off, allowed, off / np.maximum(spread, 1e-12)


def _compare_features(
    codec: Codec, stored: Mapping[str, NDArray[Any]], features: NDArray[np.float32], precision: str
) -> _Compared:
    """Compare in the space that the store keeps: under pca:D, features in the span of its basis."""
    if codec.basis is not None and codec.mean is not None:
        inside = (features - codec.mean) @ codec.basis.T @ codec.basis + codec.mean
        features = np.asarray(inside, np.float32)
    kept = codec.decode(stored)
    off = cosine_error(features, kept)
    numbers = stored[codec.output]
    if "scale" in stored:
        rounded = np.abs(stored["scale"]) / 2
    else:
        rounded = np.abs(numbers.astype(np.float32)).max(axis=1, initial=0) * 2**-11
    # Every number off by as much as rounding can do is an error of this length; 1 − cosine is at
    # most half its square.
    length = np.maximum(np.sqrt(np.square(kept).sum(axis=1)), 1e-12)
    relative = rounded * np.sqrt(numbers.shape[1]) / length + FEATURES_TOLERANCE[precision]
    return off, np.asarray(np.square(relative) / 2, np.float32), off


def _batch_size(run: Mapping[str, Any]) -> int:
    """Return the size of the batches that rows were computed in.

    Rows that were copied from several runs have no batch any more, and any size will do: they are
    compared within the tolerance.
    """
    while "mixed" in run:
        run = run["mixed"][0]
    return int(run["batch_size"])


def _rows_equal(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    same = a == b
    return np.asarray(same if same.ndim == 1 else same.all(axis=1))
