"""Files of features that `distinit embed` writes: what is in them, and how they are read.

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
    """Features float64 [V, D], means over clips, of the videos that were read, and `about` them."""

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
    """Return the content of an open file; any error is damage."""
    kind, version = file.attrs.get("format"), int(file.attrs.get("format_version", 0))
    if (kind, version) != (FORMAT, FORMAT_VERSION):
        raise ValueError(f"format {kind!r}, version {version}")
    videos, features = list(file["videos"].asstr()[:]), file["features"][:].astype(np.float64)
    if len(videos) != len(features):
        raise ValueError(f"{len(videos)} videos and {len(features)} rows of features")
    if features.ndim == 3:
        features = features.mean(axis=1)
    about = plain_data(json.loads(file.attrs["about"]))
    good = (np.abs(features) < 1e15).all(axis=1)  # finite, and so are their squares
    names = [video for video, ok in zip(videos, good, strict=True) if ok]
    return FeatureFile(names, features[good], about if isinstance(about, dict) else {})
