"""Frames of test videos as small pictures; a page contains each video once.

Frames are read from the videos that a run was tested on if these can be opened, and otherwise from
the prepared copies that it used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.documents import is_regular_file
from ..common.errors import DistInitError, VideoError
from ..corpus.sources import escape_path
from ..evaluation.labels import read_split
from ..evaluation.predictions import Predictions
from ..prepared.copies import read_copy
from ..prepared.folders import CopyFolder
from ..video.frames import read_frames
from ..video.geometry import View
from .html_page import jpeg_url
from .runs import Run

# Positions of the frames as fractions of a video's length.
POSITIONS = (1 / 6, 1 / 2, 5 / 6)
# Size of a frame in pixels.
HEIGHT = 80
MAX_WIDTH = 160
QUALITY = 65
# Videos with pictures on one page: 200 take about 1.5 MB.
MAX_VIDEOS = 200


@dataclass(frozen=True)
class Strip:
    """Frames of a video next to each other: `jpeg` as a data URL, size in pixels."""

    name: str
    jpeg: str
    width: int
    height: int


@dataclass(frozen=True)
class Example:
    """A test video: its path and strip; without a strip, `problem` is the reason."""

    video: str
    strip: Strip | None
    problem: str | None = None


class ExampleVideos:
    """Read strips of at most `max_videos` test videos of runs.

    Attributes:
        strips: The strips read so far, in the order of reading.
    """

    def __init__(self, root: str | None = None, max_videos: int = MAX_VIDEOS) -> None:
        """Create a reader.

        Args:
            root: Folder where the videos are located now, by default that of each run's data set.
            max_videos: Number of videos to read; further ones have no pictures.
        """
        self.root, self.max_videos = root, max_videos
        self.strips: list[Strip] = []
        self._examples: dict[tuple[str, str, str], Example] = {}
        self._folders: dict[tuple[str, str, str], str] = {}

    def example(self, run: Run, predictions: Predictions, video: int) -> Example:
        """Return a test video of a run, by its index in the run's predictions."""
        path, copies = predictions.videos[video], str(run.config.get("copies") or "")
        if self.max_videos == 0:
            return Example(escape_path(path), None, "--examples 0 opens no video")
        folder = self._folder(run)
        key = (folder, copies, path)
        if key not in self._examples:
            frames = int(predictions.frames[video])
            self._examples[key] = self._read(folder, copies, path, frames)
        return self._examples[key]

    def _read(self, folder: str, copies: str, path: str, num_frames: int) -> Example:
        name = escape_path(path)
        if len(self.strips) >= self.max_videos:
            return Example(name, None, f"the page has frames of {self.max_videos} videos already")
        if num_frames < 1:
            return Example(name, None, "unreadable when it was tested")
        index = np.array([int(position * num_frames) for position in POSITIONS], np.int64)
        try:
            images = _frames(folder, copies, path, index)
        except (DistInitError, OSError, ValueError) as error:
            return Example(name, None, str(error))
        self.strips.append(_strip(f"video-{len(self.strips) + 1}", images))
        return Example(name, self.strips[-1])

    def _folder(self, run: Run) -> str:
        """Return the folder that the paths of a run's videos are relative to, "" if unknown."""
        if self.root is not None:
            return self.root
        key = (str(run.config.get("dataset")), str(run.config.get("root") or ""), run.split)
        if key not in self._folders:
            self._folders[key] = _dataset_folder(*key)
        return self._folders[key]


def _dataset_folder(dataset: str, root: str, split: str) -> str:
    kind, _, location = dataset.partition(":")
    if kind == "csv":
        return root or os.path.dirname(os.path.abspath(location))
    if kind == "folder":
        return location
    # A run can come from another person, and may name a pipe, which must not be opened.
    if kind == "kinetics" and not os.path.isfile(location):
        return root
    try:
        # The official data sets may be located in a folder below the given one.
        return read_split(dataset, int(split), root or None).root
    except (DistInitError, OSError, ValueError):
        return root


def _frames(folder: str, copies: str, path: str, index: np.ndarray) -> np.ndarray:
    """Read frames of a video or, if it cannot be read, of its copy.

    Args:
        folder: Folder that `path` is relative to, "" if unknown.
        copies: Folder of prepared copies, or "".
        path: Path of the video.
        index: Frame indices [F].

    Returns:
        RGB uint8 [F, h, w, 3].

    Raises:
        DistInitError: Neither can be read.
    """
    view, file = View(resize=HEIGHT), Path(folder, path)
    if folder and is_regular_file(file):
        try:
            return read_frames(str(file), index, view).images
        except (VideoError, OSError):
            if not copies:
                raise
    elif not copies:
        raise VideoError("missing here: --root DIR names the folder of the test videos")
    prepared = CopyFolder.open(copies)
    if prepared.kind != "copy":
        raise VideoError(
            "missing here, and its copy is optical flow: --root DIR names the folder of the test videos"
        )
    return read_copy(prepared.find(folder, path), index, view).images


def _strip(name: str, images: np.ndarray) -> Strip:
    """Encode frames RGB uint8 [F, h, w, 3] as one picture, cut to MAX_WIDTH each."""
    margin = max(0, images.shape[2] - MAX_WIDTH) // 2
    images = images[:, :HEIGHT, margin : images.shape[2] - margin]
    picture = np.concatenate(list(images), axis=1)
    return Strip(name, jpeg_url(picture, QUALITY), picture.shape[1], picture.shape[0])
