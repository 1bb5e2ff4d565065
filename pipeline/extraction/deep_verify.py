"""Verify a store against its videos and teachers: decode a sample and run the teachers again.

Frames must be the same, by index and pts. Outputs are computed in batches of the recorded size in
which each row has its original place, so that the same torch on the same kind of device gives the
same bits; elsewhere the last bits differ, for which there is a tolerance: for logits in standard
deviations of a row, for features by cosine.

Shapes: B rows of a batch, n rows, D numbers of an output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.devices import resolve_device
from ..common.errors import DistInitError, UsageError, VideoError
from ..common.progress_bar import progress_bar
from ..store import layout as fmt
from ..store.encoding import Codec, arrays_of, cosine_error, rounding
from ..store.index import OK
from ..store.reader import TargetStore, check_video_roots
from ..store.verify import Finding
from ..teachers.engines import use_engine
from ..teachers.fingerprint import Fingerprint
from ..teachers.probes import fingerprints
from ..teachers.recorded import load_recorded
from ..teachers.teacher import TeacherOutput
from ..video.container import digest
from ..video.pool.decode_pool import DecodeJob, DecodePool, Done, Failed

# How far a row may be off in addition to its rounding: root mean square over classes, in standard
# deviations of the row. In fp32 another batch size makes 2e-6; bf16 is up to 0.12 off fp32, the
# next cached frame 0.2 or more (docs/benchmarks.md).
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}
# The same of features, in lengths of the row.
FEATURES_TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}


class Replay:
    """One teacher of the store, run again. Feed it the rows of one video after the other."""

    def __init__(self, store: TargetStore, name: str, of: TeacherOutput) -> None:
        self.store, self.name, self.of, self.teacher = store, name, of, of.teacher
        self.commits = store.index.teachers[name]
        self.rows, self.equal, self.worst = 0, 0, 0.0
        self._off: dict[int, tuple[int, float]] = {}
        self._batch = np.zeros((0, *of.teacher.input_shape, 3), np.uint8)
        self._at = (-1, -1)  # shard and batch
        self._places: list[int] = []
        self._waiting: list[int] = []

    def has(self, segment: int) -> bool:
        """Return whether the store has this teacher's rows of a segment."""
        committed = int(self.store.index.shard[segment]) in self.commits.shards
        return committed and segment not in self.commits.failed

    def feed(self, images: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        """Take images [n, h, w, 3] of the store's rows [n], ascending.

        The teacher runs whenever a batch is full.
        """
        for image, row in zip(images, rows.tolist(), strict=True):
            shard, inside = divmod(row, self.store.index.shard_rows)
            size = _batch_size(self.commits.commits[shard]["run"])
            place = inside % size
            if self._waiting and (shard, inside // size) != self._at:
                self.run()
            self._at = shard, inside // size
            if len(self._batch) != size:
                self._batch = np.zeros((size, *self._batch.shape[1:]), np.uint8)
            self._batch[place] = image
            self._places.append(place)
            self._waiting.append(row)

    def run(self) -> None:
        """Run the teacher on the waiting images and compare with what is stored."""
        if not self._places:
            return
        values = self.of.compute(self._batch).numpy()[self._places]
        rows = np.array(self._waiting)
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
            count, worst = self._off.get(self._at[0], (0, 0.0))
            self._off[self._at[0]] = (count + int(bad.sum()), max(worst, float(np.max(off[bad]))))
        self.rows += len(rows)
        self._batch[:] = 0
        self._places, self._waiting = [], []

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


def deep_check(
    store: TargetStore,
    count: int,
    *,
    seed: int = 0,
    video_roots: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
    allow_teachers: Collection[str] = (),
    device: str = "auto",
) -> tuple[list[Finding], dict[str, Any]]:
    """Check `count` random videos; return the findings and what was compared.

    Args:
        store: The store.
        count: Number of videos.
        seed: Of the choice of videos.
        video_roots: Corpus → its current folder.
        weights: Teacher in the store → its weights file.
        allow_teachers: Teachers whose code may run and whose weights may be downloaded although the
            store names them (`load_recorded`).
        device: Where teachers run.

    Raises:
        UsageError: The store does not have a corpus or teacher that is named.
        DeviceError: There is no such device.
    """
    check_video_roots(store, video_roots or {})
    for name in weights or {}:
        store.teacher(name)
    findings: list[Finding] = []
    replays = []
    for name in store.teachers:
        try:
            of = _load(store, name, weights or {}, allow_teachers, resolve_device(device))
            replays.append(Replay(store, name, of))
            if (node := store.fingerprint(name)) is not None:
                found = fingerprints(of.teacher)[of.key]
                Fingerprint.parse(node, f"teachers/{name}").check(found, name, store.name)
        except DistInitError as error:
            findings.append(Finding(str(error), None, name))
    videos = np.flatnonzero((store.video_state == OK) & (store.row_counts > 0))
    chosen = np.sort(np.random.default_rng(seed).permutation(videos)[:count])
    views = list(dict.fromkeys(r.teacher.view for r in replays))
    with (
        DecodePool(processes=1, views=views) as pool,
        progress_bar("decoding again", len(chosen), "videos") as bar,
    ):
        for video in chosen.tolist():
            path = store.video_path(video, video_roots)
            findings += _check_video(
                store, video, path, pool, {r: views.index(r.teacher.view) for r in replays}
            )
            for replay in replays:
                replay.run()
                findings += replay.findings(path)
            bar.advance(1)
    return findings, {
        "videos": len(chosen),
        "seed": seed,
        "teachers": {r.name: r.summary() for r in replays},
    }


def _load(
    store: TargetStore,
    name: str,
    weights: Mapping[str, str],
    allowed: Collection[str],
    device: torch.device,
) -> TeacherOutput:
    """Load the store's teacher on this machine; DistInitError if it is a different one."""
    record = store.teachers[name]
    node = fmt.read_nodes(store.files, "teachers", [name])[name]
    where = f"{store.name}/teachers/{name}/zarr.json"
    teacher = load_recorded(
        node.get("provenance", {}), where, weights=weights.get(name), trusted=allowed
    )
    teacher.to(device, str(record.run.get("precision")))
    use_engine(teacher, "auto", str(record.run.get("engine", "torch")))
    if record.classes and len(teacher.classes) == len(record.classes):
        teacher.classes = list(record.classes)  # their names may have come from a file
    of = TeacherOutput(teacher, teacher.outputs[-1])  # the one that the record asks for
    here = of.identity()
    for key, recorded in record.identity.items():
        if here.get(key) != recorded:
            raise UsageError(
                f"not the teacher that was extracted: its {key} is {here.get(key)}, was {recorded}"
            )
    return of


def _check_video(
    store: TargetStore, video: int, path: str, pool: DecodePool, view_of: Mapping[Replay, int]
) -> Iterator[Finding]:
    """Decode a video again; feeds the teachers."""
    try:
        here = digest(path)
    except VideoError as error:
        yield Finding(f"{path}: {error}")
        return
    if here != store.digest(video):
        yield Finding(
            f"{path}: changed, its digest is {here}, the teachers saw {store.digest(video)}"
        )
        return
    for s in store.segments(video).tolist():
        shard, row, count = (
            int(x[s]) for x in (store.index.shard, store.index.row, store.index.rows)
        )
        rows = np.arange(row, row + count)
        stored = store.read_table("index", rows), store.read_table("pts", rows)
        end = int(store.index.end[s])
        job = DecodeJob(
            s, path, store.sampling, int(store.index.first[s]), None if end < 0 else end
        )
        done, differs = 0, False
        for event in pool.stream([job]):
            if isinstance(event, Failed):
                yield Finding(f"{path}: {event.reason}", shard)
            elif isinstance(event, Done):
                if done != count and not differs:
                    yield Finding(f"{path}: {done} frames are sampled, {count} are stored", shard)
            elif not differs:
                at = slice(done, done + len(event.index))
                differs = not (
                    np.array_equal(stored[0][at], event.index)
                    and np.array_equal(stored[1][at], event.pts)
                )
                if differs:
                    yield Finding(
                        f"{path}: other frames (index or pts) are sampled than are stored", shard
                    )
                    continue
                done = at.stop
                for replay, view in view_of.items():
                    if replay.has(s):
                        replay.feed(event.images[view], rows[at])


_Compared = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Of each row [n]: how far it is off, how far it may be, and the difference that is reported."""


def _compare_logits(
    codec: Codec, stored: Mapping[str, NDArray[Any]], logits: NDArray[np.float32], precision: str
) -> _Compared:
    off = np.sqrt(np.square(codec.decode(stored) - logits).mean(axis=1))
    spread = logits.std(axis=1)
    allowed = rounding(stored, codec.encoding) + TOLERANCE[precision] * spread
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
