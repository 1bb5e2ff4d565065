"""Optical flow of clips, for students of two channels: Farnebäck's method as in Caffe2.

The parameters are those of Caffe2's video operator (`caffe2/video/optical_flow.cc`). The flow is
computed from the grey frames of the cropped and mirrored clip, so that mirroring negates the
horizontal flow. T frames of flow need T + 1 pictures. OpenCV is an extra: pip install
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


def require_opencv(option: str = "student.channels=2") -> Any:
    """Return OpenCV, limited to one thread since loaders are parallel over clips.

    Raises:
        UsageError: It is not installed.
    """
    try:
        opencv = importlib.import_module("cv2")
    except ImportError:
        raise UsageError(
            f'{option} needs OpenCV for optical flow: pip install "distinit[flow]"'
        ) from None
    opencv.setNumThreads(1)
    return opencv


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luma uint8 [...] of RGB pictures uint8 [..., 3], rounded as OpenCV does."""
    return ((image.astype(np.int32) @ _GREY + 16384) >> 15).astype(np.uint8)


def flow_between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the flow float32 [H, W, 2] between two grey pictures uint8 [H, W].

    The flow is the displacement (x, y) of each point in pixels, x to the right and y down. It is
    zero between equal pictures, which occur because short clips repeat a frame; Farnebäck's method
    would return motion along the border.
    """
    if np.array_equal(first, second):
        return np.zeros((*first.shape, 2), np.float32)
    flow: np.ndarray = require_opencv().calcOpticalFlowFarneback(
        first, second, None, flags=_GAUSSIAN_WINDOW, **_PARAMETERS
    )
    return flow


def optical_flow(images: np.ndarray) -> np.ndarray:
    """Return the flow float32 [T, H, W, 2] between RGB frames uint8 [T + 1, H, W, 3]."""
    frames = [flow_between(first, second) for first, second in pairwise(grey(images))]
    return np.stack(frames) if frames else np.empty((0, *images.shape[1:3], 2), np.float32)
