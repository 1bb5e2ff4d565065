"""Read the files of features that `distinit embed` writes.

Layout (HDF5; V videos, N clips, D features; row v of every table is `videos[v]`):

    attributes  format "distinit-features", format_version 1, about (JSON: model, clips, …)
    videos      string [V]     percent-escaped paths
    status      string [V]     "ok" or "failed"
    reasons     string [V]     why a video is unreadable or truncated, else empty
    features    float32 [V, D] or [V, N, D], NaN if the video is unreadable
    starts      int64 [V, N]   first frame of each clip
    frames      int64 [V]      number of frames of the video
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.documents import plain_data
from ..common.errors import SourceError
from ..common.hdf5 import STRING, Hdf5Error, Tables, open_hdf5
from ..common.sealed import check_seal

FORMAT, FORMAT_VERSION = "distinit-features", 1
_TABLES: Tables = {
    **dict.fromkeys(("videos", "status", "reasons"), (STRING, 1)),
    "starts": ("i", 2),
    "frames": ("i", 1),
    "features": ("f", (2, 3)),
}


@dataclass(frozen=True)
class FeatureFile:
    """Mean features over clips, float64 [V, D], of readable videos; `about` describes the model."""

    videos: list[str]
    features: np.ndarray
    about: dict[str, Any]


def read_features(path: str | os.PathLike[str]) -> FeatureFile:
    """Load a file of features.

    Raises:
        SourceError: The file is missing, of another kind or version, or damaged.
    """
    try:
        if os.path.exists(path):
            check_seal(path, SourceError)
        with open_hdf5(path, _TABLES) as file:
            return _parse(file)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file of features") from None
    except Hdf5Error as error:
        raise SourceError(
            f"{path}: not a file of features that distinit embed wrote as .h5 ({error})"
        ) from error


def _parse(file: Any) -> FeatureFile:
    """Parse an open file; `open_hdf5` turns every exception into one about a damaged file."""
    kind, version = file.attrs.get("format"), int(file.attrs.get("format_version", 0))
    if (kind, version) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"format {kind!r}, version {version}")
    videos, features = list(file["videos"].asstr()[:]), file["features"][:].astype(np.float64)
    if len(videos) != len(features):
        raise ValueError(f"{len(videos)} videos and {len(features)} rows of features")
    if features.ndim == 3:
        features = features.mean(axis=1)
    about = plain_data(json.loads(file.attrs["about"]))
    # Features of unreadable videos are NaN. The bound keeps the squares of all others finite.
    usable = (np.abs(features) < 1e15).all(axis=1)
    names = [video for video, is_usable in zip(videos, usable, strict=True) if is_usable]
    return FeatureFile(names, features[usable], about if isinstance(about, dict) else {})
