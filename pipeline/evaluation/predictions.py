"""predictions.h5: the predictions of a model for every test video; metrics are recomputed from it.

Layout (HDF5; V test videos, N clips, K classes, D features; row v of every table is `videos[v]`):

    attributes    format "distinit-predictions", format_version 2, protocol (JSON), identity (JSON)
    classes       string [K]
    videos        string [V]         the key: path relative to the data set, percent-escaped, unique
    labels        int32 [V]          index into classes
    sources       string [V]         recording that a video was cut from, empty if unknown
    status        string [V]         "ok", "failed", or "pending" while an evaluation is unfinished
    reasons       string [V]         why a video is unreadable or truncated, else empty
    frames        int64 [V]          number of frames of the video, −1 if unknown
    starts        int64 [V, N]       first frame of each clip, −1 if the video was not read
    clip_scores   float32 [V, N, K]  softmax of each clip, or its logits if protocol.scores is
                                     "logits"; NaN if the video was not read
    video_scores  float32 [V, K]     mean of clip_scores over the clips; checked when read
    features      float32 [V, N, D]  input of the head for each clip, NaN if the video was not read;
                                     the table is missing if D is 0

With several crops per clip, N counts every crop of every clip; the crops of one clip are adjacent.

The file holds a digest of itself (see `sealed`), and every table of numbers has fletcher32
checksums, which any HDF5 reader compares, so that damage is an error instead of a wrong number.
Files of version 0.1 have only the checksums.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..common.documents import plain_data
from ..common.errors import CheckpointError, DistInitError, first_line
from ..common.files import replacing
from ..common.hdf5 import STRING, Hdf5Error, Hdf5Writer, open_hdf5
from ..common.sealed import check_seal
from ..corpus.sources import escape_path, unescape_path
from .metrics import accuracies, mean_scores, video_values

FORMAT = "distinit-predictions"
FORMAT_VERSION = 2
OK, FAILED, PENDING = "ok", "failed", "pending"
# A value of protocol.scores.
LOGITS = "logits"
_TEXTS = ("classes", "videos", "sources", "status", "reasons")
_TABLES = {
    **dict.fromkeys(_TEXTS, (STRING, 1)),
    **dict.fromkeys(("labels", "frames"), ("i", 1)),
    "starts": ("i", 2),
    "clip_scores": ("f", 3),
    "video_scores": ("f", 2),
    "features": ("f", 3),
}
# The tables of numbers that a test fills in.
_RESULTS = ("frames", "starts", "clip_scores", "features")
log = logging.getLogger(__name__)


class PredictionsError(DistInitError, OSError):
    """A predictions file is missing, of another kind, damaged or unfinished."""


@dataclass
class Predictions:
    """The tables of the file in memory; `protocol` and `identity` are JSON-serializable."""

    classes: list[str]
    videos: list[str]
    labels: np.ndarray
    status: list[str]
    reasons: list[str]
    frames: np.ndarray
    starts: np.ndarray
    clip_scores: np.ndarray
    protocol: dict[str, Any]
    identity: dict[str, Any]
    sources: list[str]
    features: np.ndarray

    @classmethod
    def empty(
        cls,
        classes: Sequence[str],
        videos: Sequence[str],
        labels: Sequence[int],
        clips: int,
        *,
        protocol: dict[str, Any],
        identity: dict[str, Any],
        sources: Sequence[str] | None = None,
        features: int = 0,
    ) -> Predictions:
        """Create tables in which every video is pending.

        Args:
            classes: Names of the K classes.
            videos: Paths of the V videos.
            labels: Class index of each video.
            clips: N, the number of scored clips per video, crops included.
            protocol: Settings of the test that change scores.
            identity: Data set, labels and weights that were tested.
            sources: Recording of each video, by default unknown.
            features: D, the width of the features to store; 0 stores none.
        """
        v = len(videos)
        return cls(
            classes=list(classes),
            videos=list(videos),
            labels=np.asarray(labels, dtype=np.int32),
            status=[PENDING] * v,
            reasons=[""] * v,
            frames=np.full(v, -1, dtype=np.int64),
            starts=np.full((v, clips), -1, dtype=np.int64),
            clip_scores=np.full((v, clips, len(classes)), np.nan, dtype=np.float32),
            # As JSON returns them, with tuples as lists, so that they equal those read from a file.
            protocol=json.loads(json.dumps(protocol)),
            identity=json.loads(json.dumps(identity)),
            sources=[""] * v if sources is None else list(sources),
            features=np.full((v, clips, features), np.nan, dtype=np.float32),
        )

    @property
    def pending(self) -> list[int]:
        """Indices of the videos without a result."""
        return [i for i, status in enumerate(self.status) if status == PENDING]

    @property
    def video_scores(self) -> np.ndarray:
        """Mean scores over clips, float32 [V, K]; NaN for videos without scores."""
        return mean_scores(self.clip_scores)

    @property
    def groups(self) -> np.ndarray | None:
        """Number of the recording of each video, int64 [V]; None unless all are known."""
        if not all(self.sources):
            return None
        return np.unique(self.sources, return_inverse=True)[1].astype(np.int64)

    @property
    def resampled(self) -> dict[str, Any]:
        """The unit that the bootstrap resamples, and the number of units."""
        groups = self.groups
        if groups is None:
            return {"resampled": "videos", "units": len(self.videos)}
        return {"resampled": "sources", "units": int(groups.max()) + 1}

    def set_scores(
        self,
        video: int,
        scores: np.ndarray,
        starts: np.ndarray,
        frames: int,
        note: str = "",
        features: np.ndarray | None = None,
    ) -> None:
        """Record the result of a video that was read.

        Args:
            video: Its index.
            scores: [N, K].
            starts: First frame of each clip, [N].
            frames: Number of frames of the video.
            note: Which part of the video cannot be decoded, "" if none.
            features: [N, D]; ignored by tables that were created without features.
        """
        if features is not None and self.features.shape[2]:
            self.features[video] = features
        self.clip_scores[video] = scores
        self.starts[video] = starts
        self.frames[video] = frames
        self.status[video], self.reasons[video] = OK, note

    def fail(self, video: int, reason: str) -> None:
        """Record that a video is unreadable, with the reason."""
        self.status[video], self.reasons[video] = FAILED, reason

    def export_rows(self, videos: Sequence[int]) -> dict[str, Any]:
        """Return the rows of some videos, for `merge_rows` in another process."""
        rows = list(videos)
        tables = {name: getattr(self, name)[rows] for name in _RESULTS}
        texts = {name: [getattr(self, name)[v] for v in rows] for name in ("status", "reasons")}
        return {"videos": rows, **tables, **texts}

    def merge_rows(self, rows: dict[str, Any]) -> None:
        """Copy rows of another process into these tables."""
        for name in _RESULTS:
            getattr(self, name)[rows["videos"]] = rows[name]
        for i, video in enumerate(rows["videos"]):
            self.status[video], self.reasons[video] = rows["status"][i], rows["reasons"][i]

    def failures(self) -> list[dict[str, str]]:
        """List the unreadable videos as {video, reason}, in the order of the file."""
        return self._with_reason(FAILED)

    def truncated(self) -> list[dict[str, str]]:
        """List the truncated videos, which were decoded in part, as {video, reason}."""
        return self._with_reason(OK)

    def _with_reason(self, status: str) -> list[dict[str, str]]:
        rows = zip(self.videos, self.status, self.reasons, strict=True)
        return [
            {"video": escape_path(video), "reason": reason}
            for video, state, reason in rows
            if state == status and reason
        ]

    def resume_from(self, earlier: Predictions) -> int:
        """Copy the results of an earlier evaluation of the same model, videos and protocol.

        Returns:
            The number of videos with a result; 0 if the earlier evaluation was a different one.
        """
        same = (
            earlier.identity == self.identity
            and earlier.protocol == self.protocol
            and earlier.classes == self.classes
            and earlier.videos == self.videos
            and np.array_equal(earlier.labels, self.labels)
            and earlier.features.shape == self.features.shape
        )
        if not same:
            return 0
        for name in ("status", "reasons", *_RESULTS):
            setattr(self, name, getattr(earlier, name))
        return len(self.videos) - len(self.pending)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically.

        Raises:
            PredictionsError: The file cannot be written, for example because the disk is full.
        """
        target = Path(path)
        try:
            with replacing(target) as part, Hdf5Writer(part, sealed=True) as writer:
                self._fill(writer.file)
        except OSError as error:
            raise PredictionsError(
                f"{target}: cannot write the predictions ({first_line(error)})"
            ) from error

    def _fill(self, file: h5py.File) -> None:
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["protocol"] = json.dumps(self.protocol)
        file.attrs["identity"] = json.dumps(self.identity)
        strings = h5py.string_dtype()
        for name in _TEXTS:
            text = np.array([escape_path(each) for each in getattr(self, name)], dtype=object)
            file.create_dataset(name, data=text, dtype=strings)
        numbers = ["labels", "frames", "starts", "clip_scores", "video_scores"]
        for name in numbers + ["features"] * bool(self.features.shape[2]):
            file.create_dataset(name, data=getattr(self, name), fletcher32=True)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Predictions:
        """Load a file.

        Raises:
            PredictionsError: The file is missing, of another kind or version, damaged or
                inconsistent.
        """
        try:
            sealed = os.path.exists(path) and check_seal(path, PredictionsError)
            with open_hdf5(path, _TABLES) as file:
                predictions = cls._parse(path, file)
        except FileNotFoundError as error:
            raise PredictionsError(f"{path}: no such predictions file") from error
        except Hdf5Error as error:
            raise PredictionsError(f"{path}: not a readable predictions file ({error})") from error
        if not sealed:
            log.warning(
                "%s: written by distinit 0.1, without a digest: damage to its names cannot be detected",
                path,
            )
        return predictions

    @classmethod
    def _parse(cls, path: str | os.PathLike[str], file: h5py.File) -> Predictions:
        if file.attrs.get("format") != FORMAT:
            raise PredictionsError(
                f"{path}: not a predictions file (format {file.attrs.get('format')!r})"
            )
        version = int(file.attrs["format_version"])
        if version != FORMAT_VERSION:
            raise PredictionsError(
                f"{path}: predictions of format {version}, this version reads {FORMAT_VERSION}"
            )
        columns: dict[str, Any] = {
            name: [unescape_path(each) for each in file[name].asstr()[:]] for name in _TEXTS
        }
        columns |= {name: file[name][:] for name in ("labels", "frames", "starts", "clip_scores")}
        tables = cls(
            **columns,
            protocol=json.loads(file.attrs["protocol"]),
            identity=json.loads(file.attrs["identity"]),
            features=file["features"][:]
            if "features" in file
            else np.empty((*file["starts"].shape, 0), np.float32),
        )
        problem = _inconsistency(tables)
        if problem is not None:
            raise PredictionsError(f"{path}: not a readable predictions file ({problem})")
        stored = file["video_scores"][:]
        if stored.shape != tables.video_scores.shape or not np.allclose(
            stored, tables.video_scores, rtol=1e-6, atol=1e-6, equal_nan=True
        ):
            raise PredictionsError(f"{path}: video_scores are not the mean of clip_scores")
        return tables


def _inconsistency(tables: Predictions) -> str | None:
    """Describe the first inconsistency of the tables; None if they are consistent."""
    v, n, k = len(tables.videos), tables.starts.shape[-1], len(tables.classes)
    shapes = {
        "labels": (v,), "frames": (v,), "starts": (v, n), "clip_scores": (v, n, k),
        "features": (v, n, tables.features.shape[-1]),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = getattr(tables, name)
        if values.shape != shape:
            return f"{name} is {list(values.shape)}, expected {list(shape)}"
        if values.dtype.kind not in "if":
            return f"{name} holds values that are not numbers"
    for name in ("status", "reasons", "sources"):
        if len(getattr(tables, name)) != v:
            return f"{name} has {len(getattr(tables, name))} rows, expected {v}"
    if min(v, n, k) == 0:
        return f"{v} videos, {n} clips, {k} classes, expected at least one of each"
    if len(set(tables.videos)) != v or len(set(tables.classes)) != k:
        return "a video or a class is listed twice"
    labels = tables.labels
    if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= k:
        return f"labels are from {labels.min()} to {labels.max()}, expected 0 to {k - 1}"
    if not set(tables.status) <= {OK, FAILED, PENDING}:
        return f"a status is not one of {OK}, {FAILED} and {PENDING}"
    for name in ("protocol", "identity"):
        try:
            plain = plain_data(getattr(tables, name))
        except ValueError as error:
            return f"{name} is {error}"
        parts = plain.get("fused", []) if isinstance(plain, dict) else None
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            return f"{name} is not a mapping of the format"
    return None


def metrics_from_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Recompute every metric of an evaluation from its predictions file.

    Returns:
        JSON-serializable metrics. `per_clip`, `top1`, `top5` and `class_mean` are {value, low,
        high} with 95 % bootstrap intervals; `intervals` names the resampled unit: recordings if the
        recording of every video is known, else videos. `per_class` has the numbers of correct and
        of tested videos of each class. Fused scores are per video and have no `per_clip`.

    Raises:
        PredictionsError: The file cannot be read, or its evaluation is not finished.
    """
    predictions = read_finished(path)
    labels = predictions.labels
    top1 = video_values(predictions.clip_scores, labels)["top1"]
    per_class = {
        name: {"right": int(top1[labels == k].sum()), "videos": int((labels == k).sum())}
        for k, name in enumerate(predictions.classes)
    }
    estimates = accuracies(predictions.clip_scores, labels, predictions.groups)
    if "fused" in predictions.protocol:
        del estimates["per_clip"]
    return {
        "videos": len(predictions.videos),
        "failed": predictions.failures(),
        "damaged": predictions.truncated(),
        "clips_per_video": int(predictions.clip_scores.shape[1]),
        **{name: estimate.as_dict() for name, estimate in estimates.items()},
        "intervals": predictions.resampled,
        "per_class": per_class,
        "protocol": predictions.protocol,
    }


def read_finished(path: str | os.PathLike[str]) -> Predictions:
    """Load a predictions file whose evaluation is finished.

    Raises:
        PredictionsError: The file cannot be read, or videos are pending.
    """
    predictions = Predictions.read(path)
    if predictions.pending:
        raise PredictionsError(
            f"{path}: the evaluation is not finished, {len(predictions.pending)} of "
            f"{len(predictions.videos)} videos are pending"
        )
    return predictions


def require_classes(
    classes: Sequence[str], expected: Sequence[str], *, origin: str, expected_origin: str
) -> None:
    """Check that two class lists are equal.

    Args:
        classes: The classes to check.
        expected: The classes that are required.
        origin: Name of the origin of `classes` in the message.
        expected_origin: Name of the origin of `expected` in the message.

    Raises:
        CheckpointError: The lists differ.
    """
    if list(classes) == list(expected):
        return
    if len(classes) != len(expected):
        difference = f"{len(classes)} classes, expected {len(expected)}"
    else:
        first = next(i for i, (a, b) in enumerate(zip(classes, expected, strict=True)) if a != b)
        difference = f"class {first} is {classes[first]!r}, expected {expected[first]!r}"
    raise CheckpointError(
        f"the class list of {origin} differs from that of {expected_origin}: {difference}"
    )
