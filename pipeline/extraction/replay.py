"""Compute rows of a store again: decode the frames, run the model, compare its outputs.

Outputs are computed in batches of the recorded size in which each row has its original position.
The same torch on the same kind of device then gives the same bits. With another torch or device the
last bits differ, for which there is a tolerance: of logits in standard deviations of a row, of
features by their cosine.

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

# Allowed difference of a row of logits in addition to its rounding: root mean square over classes,
# in standard deviations of the row. In fp32 another batch size changes a row by 2e-6; bf16 differs
# from fp32 by up to 0.12, and the next cached frame by 0.2 or more (docs/benchmarks.md).
LOGITS_TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}
# Allowed difference of a row of features in addition to its rounding, in lengths of the row.
FEATURES_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


class Replay:
    """The comparison of one teacher's stored rows with its current output.

    Args:
        store: The store.
        name: The teacher's name in the store.
        output: The output of the loaded model.
    """

    def __init__(self, store: TargetStore, name: str, output: TeacherOutput) -> None:
        self.store, self.name, self.output, self.teacher = store, name, output, output.teacher
        self.commits = store.index.teachers[name]
        self.num_rows, self.num_equal, self.largest_difference = 0, 0, 0.0
        # Shard → number of rows beyond the tolerance, and the largest difference of these.
        self._wrong_rows: dict[int, tuple[int, float]] = {}

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
        encoded = codec.encode(values)
        equal = np.all([_rows_equal(stored[a], encoded[a]) for a in stored], axis=0)
        self.num_equal += int(equal.sum())
        compare = _compare_logits if codec.output == "logits" else _compare_features
        errors, allowed, differences = compare(codec, stored, values, self.teacher.precision)
        self.largest_difference = max(
            self.largest_difference, float(np.nanmax(differences, initial=0))
        )
        # An error that is not a number is not within the tolerance either.
        wrong = ~(errors <= allowed)
        if wrong.any():
            shard = int(rows[0]) // self.store.index.shard_rows
            count, largest = self._wrong_rows.get(shard, (0, 0.0))
            self._wrong_rows[shard] = (
                count + int(wrong.sum()),
                max(largest, float(np.max(errors[wrong]))),
            )
        self.num_rows += len(rows)

    def findings(self, path: str) -> list[Finding]:
        """Return a finding per shard with rows that differed since the last call."""
        wrong_rows, self._wrong_rows = self._wrong_rows, {}
        return [
            Finding(
                f"{path}: the teacher computes different {self.output.output} of {count} frames, "
                f"off by up to {largest:.3g}",
                shard,
                self.name,
            )
            for shard, (count, largest) in wrong_rows.items()
        ]

    def summary(self) -> dict[str, Any]:
        """Return the number of compared rows, and how close they are.

        `bit_equal` is the share of rows that are equal to the bit. `largest_difference` is in
        standard deviations of a row for logits, and 1 − cosine for features.
        """
        return {
            "rows": self.num_rows,
            "bit_equal": self.num_equal / self.num_rows if self.num_rows else None,
            "largest_difference": self.largest_difference,
            "device": self.teacher.device.type,
            "torch": torch.__version__.split("+")[0],
        }


@dataclass
class _Batch:
    """A batch for one forward pass.

    Args:
        images: Images uint8 [B, h, w, 3]; zeros where no image was fed.
        replays: The teachers whose rows are compared.
        key: The shard, and the number of the batch in it.
        positions: The positions in the batch of the images that were fed.
        rows: Their rows in the store.
    """

    images: NDArray[np.uint8]
    replays: list[Replay]
    key: tuple[int, int]
    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class Rerun:
    """Runs a model again, with one forward pass for all of its outputs that the store holds.

    It is fed the rows of one video after the other.

    Args:
        teacher: The model.
        replays: The teachers of the store that are its outputs.
        executor: Its threads run the batches; None for the thread of the caller.
        max_running: The number of batches that may run or wait in the executor.
    """

    def __init__(
        self,
        teacher: Teacher,
        replays: Sequence[Replay],
        executor: ThreadPoolExecutor | None = None,
        max_running: int = 1,
    ) -> None:
        self.teacher, self.replays = teacher, tuple(replays)
        self._executor, self._max_running = executor, max_running
        self._batches: dict[int, _Batch] = {}
        self._running: deque[tuple[_Batch, Future[dict[str, Tensor]]]] = deque()

    def feed(self, images: NDArray[np.uint8], rows: NDArray[np.int64], segment: int) -> None:
        """Add images [n, h, w, 3] of a segment to batches, and run the batches that are complete.

        Args:
            images: Images uint8 [n, h, w, 3].
            rows: Their rows [n] in the store, ascending.
            segment: Their segment.
        """
        by_size: dict[int, list[Replay]] = {}
        for replay in self.replays:
            if replay.has(segment):
                by_size.setdefault(replay.batch_size(segment), []).append(replay)
        for size, replays in by_size.items():
            for image, row in zip(images, rows.tolist(), strict=True):
                shard, row_in_shard = divmod(row, replays[0].store.index.shard_rows)
                key, position = (shard, row_in_shard // size), row_in_shard % size
                batch = self._batches.get(size)
                if batch is None or (batch.key, batch.replays) != (key, replays):
                    self._start(size)
                    zeros = np.zeros((size, *self.teacher.input_shape, 3), np.uint8)
                    batch = self._batches[size] = _Batch(zeros, replays, key)
                batch.images[position] = image
                batch.positions.append(position)
                batch.rows.append(row)

    def run(self) -> None:
        """Run the incomplete batches too, and compare all outputs with the store."""
        for size in list(self._batches):
            self._start(size)
        self._compare(0)

    def _start(self, size: int) -> None:
        """Start the batch of that size, if it has images."""
        batch = self._batches.pop(size, None)
        if batch is None:
            return
        keys = [replay.output.key for replay in batch.replays]
        if self._executor is None:
            future: Future[dict[str, Tensor]] = Future()
            future.set_result(self.teacher.compute(batch.images, keys))
        else:
            future = self._executor.submit(self.teacher.compute, batch.images, keys)
        self._running.append((batch, future))
        self._compare(self._max_running)

    def _compare(self, max_running: int) -> None:
        """Compare the outputs of the oldest batches until at most `max_running` are left."""
        while len(self._running) > max_running:
            batch, future = self._running.popleft()
            outputs = future.result()
            for replay in batch.replays:
                values = outputs[replay.output.key].numpy()[batch.positions]
                replay.compare(values, np.array(batch.rows))


def file_difference(store: TargetStore, video: int, path: str) -> str | None:
    """Describe why a file is not the one that the teachers saw; return None if it is."""
    try:
        current = digest(path)
    except VideoError as error:
        return str(error)
    stored = store.digest(video)
    if current == stored:
        return None
    return f"changed, its digest is {current}, the teachers saw {stored}"


def replay_segment(
    store: TargetStore,
    segment: int,
    path: str,
    pool: DecodePool,
    view_of: Mapping[Rerun, int],
    max_rows: int | None = None,
) -> str | None:
    """Decode the frames of a segment again and feed them to the models.

    Args:
        store: The store.
        segment: A segment with rows.
        path: The file of its video.
        pool: Decodes the file.
        view_of: Model → index of its view among those of `pool`.
        max_rows: Number of rows to compare, from the first on; None for all.

    Returns:
        A description of how the frames differ from those of the store; None if they are equal.
    """
    rows = store.rows_of_segments(np.array([segment]))[:max_rows]
    index, pts = store.read_table("index", rows), store.read_table("pts", rows)
    first, end = int(store.index.first[segment]), int(store.index.end[segment])
    job = DecodeJob(
        segment, path, store.sampling, first, None if end < 0 else end, max_rows and len(rows)
    )
    num_decoded, differs = 0, False
    for event in pool.stream([job]):
        if isinstance(event, Failed):
            return event.reason
        if not isinstance(event, Block) or differs:
            continue
        block = slice(num_decoded, num_decoded + len(event.index))
        differs = not (
            np.array_equal(index[block], event.index) and np.array_equal(pts[block], event.pts)
        )
        if not differs:
            num_decoded = block.stop
            for rerun, view in view_of.items():
                rerun.feed(event.images[view], rows[block], segment)
    if differs:
        return "other frames (index or pts) are sampled than are stored"
    if num_decoded < len(rows):
        return f"{num_decoded} frames are sampled, {len(rows)} are stored"
    return None


_Comparison = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""For each row [n]: its error, the allowed error, and the difference that is reported."""


def _compare_logits(
    codec: Codec, stored: Mapping[str, NDArray[Any]], logits: NDArray[np.float32], precision: str
) -> _Comparison:
    """Compare logits [n, K] by their root mean square difference."""
    errors = np.sqrt(np.square(codec.decode(stored) - logits).mean(axis=1))
    spread = logits.std(axis=1)
    allowed = codec.rounding(stored) + LOGITS_TOLERANCE[precision] * spread
    return errors, allowed, errors / np.maximum(spread, 1e-12)


def _compare_features(
    codec: Codec, stored: Mapping[str, NDArray[Any]], features: NDArray[np.float32], precision: str
) -> _Comparison:
    """Compare features [n, D] by 1 − cosine, under pca:D after projection on the store's basis."""
    if codec.basis is not None and codec.mean is not None:
        projected = (features - codec.mean) @ codec.basis.T @ codec.basis + codec.mean
        features = np.asarray(projected, np.float32)
    decoded = codec.decode(stored)
    errors = cosine_error(features, decoded)
    numbers = stored[codec.output]
    if "scale" in stored:
        rounded = np.abs(stored["scale"]) / 2
    else:
        rounded = np.abs(numbers.astype(np.float32)).max(axis=1, initial=0) * 2**-11
    # If rounding changes every number by its bound, the row changes by this length; 1 − cosine is
    # at most half the square of the relative length.
    length = np.maximum(np.sqrt(np.square(decoded).sum(axis=1)), 1e-12)
    relative = rounded * np.sqrt(numbers.shape[1]) / length + FEATURES_TOLERANCE[precision]
    return errors, np.asarray(np.square(relative) / 2, np.float32), errors


def _batch_size(run: Mapping[str, Any]) -> int:
    """Return the size of the batches that rows were computed in.

    Rows that were copied from several runs are no longer in their batches. They are compared within
    the tolerance, for which any size is right.
    """
    while "mixed" in run:
        run = run["mixed"][0]
    return int(run["batch_size"])


def _rows_equal(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    same = a == b
    return np.asarray(same if same.ndim == 1 else same.all(axis=1))
