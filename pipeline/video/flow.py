"""Optical flow of clips, for students of two channels: Farnebäck's method as in Caffe2.

Parameters of Caffe2's video operator (`caffe2/video/optical_flow.cc`): the flow is taken from the
grey frames of the clip as cropped and mirrored, so that a mirrored clip's horizontal flow is
negative of itself; T frames of flow need T + 1 pictures. OpenCV is an extra: pip install
"distinit[flow]".

Shapes: T frames, H W pixels.
"""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import numpy as np

from ..common.errors import UsageError

FLOW_CHANNELS = 2
_PARAMETERS = {
    "pyr_scale": 0.5**0.5,
    "levels": 5,
    "winsize": 10,
    "iterations": 2,
    "poly_n": 7,
    "poly_sigma": 1.5,
}
_GAUSSIAN_WINDOW = 256  # OPTFLOW_FARNEBACK_GAUSSIAN
# 0.299, 0.587, 0.114 in 1/32768, as OpenCV has them.
_GREY = np.array([9798, 19235, 3735], np.int32)


def pictures_needed(length: int, channels: int) -> int:
    """Return how many frames to decode for a clip of `length` frames: one more for flow."""
    return length + 1 if channels == FLOW_CHANNELS else length


def require_opencv(what: str = "student.channels=2") -> Any:
    """Return OpenCV, limited to one thread since loaders are parallel over clips.

    Raises:
        UsageError: It is not installed.
    """
    try:
        opencv = importlib.import_module("cv2")
    except ImportError:
        raise UsageError(
            f'{what} needs OpenCV for optical flow: pip install "distinit[flow]"'
        ) from None
    opencv.setNumThreads(1)
    return opencv


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] RGB → uint8 [...] luma, as OpenCV rounds it."""
    return ((image.astype(np.int32) @ _GREY + 16384) >> 15).astype(np.uint8)


def flow_between(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the flow float32 [H, W, 2] between two grey pictures uint8 [H, W].

    It is how far (x, y) in pixels each point of the first is displaced in the second, x to the
    right, y down. Between two equal pictures it is zero, where Farnebäck's method finds motion
    along the border; clips that end before their length repeat a frame.
    """
    if np.array_equal(before, after):
        return np.zeros((*before.shape, 2), np.float32)
    flow: np.ndarray = require_opencv().calcOpticalFlowFarneback(
        before, after, None, flags=_GAUSSIAN_WINDOW, **_PARAMETERS
    )
    return flow


def flow_of(images: np.ndarray) -> np.ndarray:
    """uint8 [T + 1, H, W, 3] RGB → float32 [T, H, W, 2]: the flow from each frame to the next."""
    frames = [flow_between(before, after) for before, after in pairwise(grey(images))]
    return np.stack(frames) if frames else np.empty((0, *images.shape[1:3], 2), np.float32)
