"""predictions.h5: what a model said about every test video, from which every number is recomputed.

Layout (HDF5, V test videos, N clips, K classes, D features; row v of every table is the video
`videos[v]`):

    attributes   format "distinit-predictions", format_version 2, protocol (JSON), identity (JSON)
    classes      string [K] videos       string [V]         path relative to the data set,
    percent-escaped, each once: the key labels       int32 [V]          index into classes sources
    string [V]         the recording a video was cut from, empty where that is not known status
    string [V]         "ok", "failed", or "pending" in the file of an unfinished evaluation reasons
    string [V]         why a video failed, or what is damaged in one that was read, else empty
    frames       int64 [V]          frames of the video, −1 where not known starts       int64 [V,
    N]       first frame of each clip, −1 where there is none clip_scores  float32 [V, N, K]  of
    each clip what is averaged, NaN where there is none: the softmax, or the logits
                                    where protocol.scores is "logits"
    video_scores float32 [V, K]     mean of clip_scores over the clips; checked when read features
    float32 [V, N, D]  of each clip what the head sees, NaN where there is none; left out where D is
    0

With several crops a clip, N counts every crop of every clip, those of one clip side by side.

The file carries a digest of itself (see `sealed`) and every table of numbers fletcher32 checksums,
which any reader of HDF5 compares: a damaged file is an error and not a number. Files of version 0.1
have the checksums alone.
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
LOGITS = "logits"  # of protocol.scores
_TABLES = {
    **dict.fromkeys(("classes", "videos", "sources", "status", "reasons"), (STRING, 1)),
    **dict.fromkeys(("labels", "frames"), ("i", 1)),
    "starts": ("i", 2),
    "clip_scores": ("f", 3),
    "video_scores": ("f", 2),
    "features": ("f", 3),
}
log = logging.getLogger(__name__)


class PredictionsError(DistInitError, OSError):
    """A predictions file is missing, foreign, damaged or unfinished."""


@dataclass
class Predictions:
    """The tables of the file above, in memory; `protocol` and `identity` are JSON-able."""

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
        """All videos pending; `features` is D."""
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
            # As they come back from a file: tuples as lists, so that the two compare equal.
            protocol=json.loads(json.dumps(protocol)),
            identity=json.loads(json.dumps(identity)),
            sources=[""] * v if sources is None else list(sources),
            features=np.full((v, clips, features), np.nan, dtype=np.float32),
        )

    @property
    def pending(self) -> list[int]:
        return [i for i, status in enumerate(self.status) if status == PENDING]

    @property
    def video_scores(self) -> np.ndarray:
        """float32 [V, K]: mean over clips, NaN for videos without scores."""
        return mean_scores(self.clip_scores)

    @property
    def groups(self) -> np.ndarray | None:
        """int64 [V], equal for videos of one recording; None unless the recording of every video is
        known."""
        if not all(self.sources):
            return None
        return np.unique(self.sources, return_inverse=True)[1].astype(np.int64)

    @property
    def resampled(self) -> dict[str, Any]:
        """What the bootstrap draws, and how many of them there are."""
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
        """scores[N, K], starts[N], features[N, D] of one video that was read; `note` says what is
        damaged in it.

        Tables made without features keep none.
        """
        if features is not None and self.features.shape[2]:
            self.features[video] = features
        self.clip_scores[video] = scores
        self.starts[video] = starts
        self.frames[video] = frames
        self.status[video], self.reasons[video] = OK, note

    def fail(self, video: int, reason: str) -> None:
        self.status[video], self.reasons[video] = FAILED, reason

    def rows(self, videos: Sequence[int]) -> dict[str, Any]:
        """What these tables say of some videos, for `take` of another process."""
        rows = list(videos)
        tables = {
            name: getattr(self, name)[rows]
            for name in ("frames", "starts", "clip_scores", "features")
        }
        texts = {name: [getattr(self, name)[v] for v in rows] for name in ("status", "reasons")}
        return {"videos": rows, **tables, **texts}

    def take(self, rows: dict[str, Any]) -> None:
        """Enters the rows that another process has filled in."""
        for name in ("frames", "starts", "clip_scores", "features"):
            getattr(self, name)[rows["videos"]] = rows[name]
        for i, video in enumerate(rows["videos"]):
            self.status[video], self.reasons[video] = rows["status"][i], rows["reasons"][i]

    def failures(self) -> list[dict[str, str]]:
        """The videos that could not be read, as {video, reason}, in the file's order."""
        return self._reasons(FAILED)

    def damaged(self) -> list[dict[str, str]]:
        """The videos that were read but are damaged, as {video, reason}, in the file's order."""
        return self._reasons(OK)

    def _reasons(self, status: str) -> list[dict[str, str]]:
        rows = zip(self.videos, self.status, self.reasons, strict=True)
        return [
            {"video": escape_path(video), "reason": reason}
            for video, own, reason in rows
            if own == status and reason
        ]

    def adopt(self, earlier: Predictions) -> int:
        """Takes over what an earlier, interrupted evaluation of the same model and videos has; how
        many videos."""
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
        self.status, self.reasons = earlier.status, earlier.reasons
        self.frames, self.starts, self.clip_scores = (
            earlier.frames,
            earlier.starts,
            earlier.clip_scores,
        )
        self.features = earlier.features
        return len(self.videos) - len(self.pending)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Atomic: the file at `path` is the old one or the whole new one. OSError when the disk is
        full."""
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
        texts = {
            "classes": [escape_path(name) for name in self.classes],
            "videos": [escape_path(name) for name in self.videos],
            "sources": [escape_path(name) for name in self.sources],
            "status": self.status,
            "reasons": [escape_path(reason) for reason in self.reasons],
        }
        for name, text in texts.items():
            file.create_dataset(name, data=np.array(text, dtype=object), dtype=strings)
        numbers = {
            "labels": self.labels,
            "frames": self.frames,
            "starts": self.starts,
            "clip_scores": self.clip_scores,
            "video_scores": self.video_scores,
        }
        if self.features.shape[2]:
            numbers["features"] = self.features
        for name, values in numbers.items():
            file.create_dataset(name, data=values, fletcher32=True)

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
                found = cls._parse(path, file)
        except FileNotFoundError as error:
            raise PredictionsError(f"{path}: no such predictions file") from error
        except Hdf5Error as error:
            raise PredictionsError(f"{path}: not a readable predictions file ({error})") from error
        if not sealed:
            log.warning(
                "%s: written by distinit 0.1, without a digest: damage to its names cannot be found",
                path,
            )
        return found

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
        found = cls(
            classes=[unescape_path(name) for name in file["classes"].asstr()[:]],
            videos=[unescape_path(name) for name in file["videos"].asstr()[:]],
            labels=file["labels"][:],
            status=list(file["status"].asstr()[:]),
            reasons=[unescape_path(reason) for reason in file["reasons"].asstr()[:]],
            frames=file["frames"][:],
            starts=file["starts"][:],
            clip_scores=file["clip_scores"][:],
            protocol=json.loads(file.attrs["protocol"]),
            identity=json.loads(file.attrs["identity"]),
            sources=[unescape_path(name) for name in file["sources"].asstr()[:]],
            features=file["features"][:]
            if "features" in file
            else np.empty((*file["starts"].shape, 0), np.float32),
        )
        odd = _inconsistency(found)
        if odd is not None:
            raise PredictionsError(f"{path}: not a readable predictions file ({odd})")
        stored = file["video_scores"][:]
        if stored.shape != found.video_scores.shape or not np.allclose(
            stored, found.video_scores, rtol=1e-6, atol=1e-6, equal_nan=True
        ):
            raise PredictionsError(f"{path}: video_scores are not the mean of clip_scores")
        return found


def _inconsistency(found: Predictions) -> str | None:
    """Return what of the tables does not fit together or is no such value; None for a file that
    `write` has written."""
    v, n, k = len(found.videos), found.starts.shape[-1], len(found.classes)
    shapes = {
        "labels": (v,), "frames": (v,), "starts": (v, n), "clip_scores": (v, n, k),
        "features": (v, n, found.features.shape[-1]),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = getattr(found, name)
        if values.shape != shape:
            return f"{name} is {list(values.shape)}, expected {list(shape)}"
        if values.dtype.kind not in "if":
            return f"{name} holds values that are no numbers"
    for name in ("status", "reasons", "sources"):
        if len(getattr(found, name)) != v:
            return f"{name} has {len(getattr(found, name))} rows, expected {v}"
    if min(v, n, k) == 0:
        return f"{v} videos, {n} clips, {k} classes, expected one or more of each"
    if len(set(found.videos)) != v or len(set(found.classes)) != k:
        return "a video or a class is listed twice"
    if found.labels.dtype.kind != "i" or found.labels.min() < 0 or found.labels.max() >= k:
        return (
            f"labels are from {found.labels.min()} to {found.labels.max()}, expected 0 to {k - 1}"
        )
    if not set(found.status) <= {OK, FAILED, PENDING}:
        return f"a status is none of {OK}, {FAILED} and {PENDING}"
    for name in ("protocol", "identity"):
        try:
            plain = plain_data(getattr(found, name))
        except ValueError as error:
            return f"{name} is {error}"
        parts = plain.get("fused", []) if isinstance(plain, dict) else None
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            return f"{name} is no mapping of the format"
    return None


def metrics_from_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Every number of an evaluation, recomputed from its predictions file; JSON-able.

    `per_clip`, `top1`, `top5` and `class_mean` are {value, low, high} with 95 % bootstrap
    intervals; `intervals` says what was resampled: recordings where each video's is known, else
    videos. `per_class` gives the right and the tested videos of each class. Fused scores are of
    videos, and have no `per_clip`.

    Raises PredictionsError for a file that cannot be read or whose evaluation is not finished.
    """
    found = Predictions.read(path)
    if found.pending:
        raise PredictionsError(
            f"{path}: the evaluation is not finished, {len(found.pending)} of {len(found.videos)} videos are pending"
        )
    top1 = video_values(found.clip_scores, found.labels)["top1"]
    per_class = {
        name: {
            "right": int(top1[found.labels == k].sum()),
            "videos": int((found.labels == k).sum()),
        }
        for k, name in enumerate(found.classes)
    }
    estimates = accuracies(found.clip_scores, found.labels, found.groups)
    if "fused" in found.protocol:
        del estimates["per_clip"]
    return {
        "videos": len(found.videos),
        "failed": found.failures(),
        "damaged": found.damaged(),
        "clips_per_video": int(found.clip_scores.shape[1]),
        **{name: estimate.as_dict() for name, estimate in estimates.items()},
        "intervals": found.resampled,
        "per_class": per_class,
        "protocol": found.protocol,
    }


def require_classes(
    classes: Sequence[str], expected: Sequence[str], *, here: str, there: str
) -> None:
    """Raises CheckpointError when two class lists differ: `here` and `there` name where each comes
    from."""
    if list(classes) == list(expected):
        return
    if len(classes) != len(expected):
        difference = f"{len(classes)} classes against {len(expected)}"
    else:
        first = next(i for i, (a, b) in enumerate(zip(classes, expected, strict=True)) if a != b)
        difference = f"class {first} is {classes[first]!r} against {expected[first]!r}"
    raise CheckpointError(f"the class list of {here} differs from that of {there}: {difference}")
