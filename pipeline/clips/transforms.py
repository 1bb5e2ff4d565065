"""From frames to the input of a video model: crop, mirror, normalise.

The only module of this package that imports torch.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from ..common.settings import Options
from ..video.flow import FLOW_CHANNELS, flow_of
from ..video.geometry import View

# Kinetics statistics of torchvision's video models, RGB in 0 … 1.
MEAN = (0.43216, 0.394666, 0.37645)
STD = (0.22803, 0.22145, 0.216989)
# Of Farnebäck flow in pixels, x and y, of Caffe2's video operator.
FLOW_MEAN = (0.0046635, 0.0046261)
FLOW_STD = (0.972347, 0.755146)


@dataclass(frozen=True)
class Crop:
    """Where a training clip is cut out.

    Attributes:
        top: Share in [0, 1) of the free height.
        left: Share in [0, 1) of the free width.
        flip: Whether the clip is mirrored.
        zoom: Where in the view's range `scale` the resize is, as a share in [0, 1).
    """

    top: float
    left: float
    flip: bool
    zoom: float = 0.0


class ClipView(Options):
    """A square `size`, cropped from a resize (height, width), mirrored with probability `flip`.

    Without `resize`: 128×171 for 112, and in proportion for other sizes (VMZ and torchvision
    references). `scale`: in training the resize is larger by a factor drawn evenly from this range,
    as in (1.0, 1.25); the paper does not use it. Nothing is mirrored outside training.
    """

    size: int = Field(default=112, ge=1)
    resize: tuple[int, int] | None = None
    flip: float = Field(default=0.5, ge=0, le=1)
    scale: tuple[float, float] = Field(
        default=(1.0, 1.0), description="range of a random factor on resize"
    )

    @field_validator("scale")
    @classmethod
    def _range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 16:
            raise ValueError(
                f"scale must be two factors, the smaller first, as in [1.0, 1.25], got {list(scale)}"
            )
        return scale

    def frame_view(self, crop: Crop | None = None) -> View:
        """Return the resize that the decoder does for a clip with this crop.

        Raises:
            ValueError: The crop does not fit into the resize.
        """
        height, width = self.resize or (round(128 * self.size / 112), round(171 * self.size / 112))
        least = min(1.0, self.scale[0])
        if round(least * min(height, width)) < self.size:
            shrunk = f" times scale {least:g}" if least < 1 else ""
            raise ValueError(
                f"resize {height}x{width}{shrunk} is smaller than the crop of {self.size}"
            )
        low, high = self.scale
        factor = 1.0 if crop is None else low + crop.zoom * (high - low)
        return View(resize=(round(factor * height), round(factor * width)))

    def cut(self, images: np.ndarray, crop: Crop | None) -> torch.Tensor:
        """Crop frames uint8 [T, H, W, C] to uint8 [C, T, size, size]; None crops the middle."""
        if crop is None:
            return center_crop(images, self.size)
        height, width = images.shape[1:3]
        top, left = (
            int(crop.top * (height - self.size + 1)),
            int(crop.left * (width - self.size + 1)),
        )
        return crop_and_flip(images, top, left, self.size, crop.flip)

    def cuts(self, images: np.ndarray, crops: Literal[1, 3]) -> list[torch.Tensor]:
        """Cut crops uint8 [3, T, size, size] of one clip.

        One is the middle; three are the beginning, middle and end of the longer side.
        """
        middle = center_crop(images, self.size)
        if crops == 1:
            return [middle]
        down, across = (length - self.size for length in images.shape[1:3])
        ends = [(0, round(across / 2)), (down, round(across / 2))]
        if across >= down:
            ends = [(round(down / 2), 0), (round(down / 2), across)]
        first, last = (crop_and_flip(images, top, left, self.size, False) for top, left in ends)
        return [first, middle, last]


def crop_and_flip(images: np.ndarray, top: int, left: int, size: int, flip: bool) -> torch.Tensor:
    """uint8 [T, H, W, C] → uint8 [C, T, size, size], mirrored left to right if `flip`."""
    height, width = images.shape[1:3]
    if not (0 <= top <= height - size and 0 <= left <= width - size):
        raise ValueError(f"a crop of {size} at ({top}, {left}) does not fit into {height}x{width}")
    window = images[:, top : top + size, left : left + size]
    if flip:
        window = window[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(window.transpose(3, 0, 1, 2)))


def center_crop(images: np.ndarray, size: int) -> torch.Tensor:
    """Crop uint8 [T, H, W, 3] to uint8 [3, T, size, size] at the centre.

    The offset is rounded as torchvision does.
    """
    height, width = images.shape[1:3]
    return crop_and_flip(images, round((height - size) / 2), round((width - size) / 2), size, False)


def of_channels(clip: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert a cropped clip to what a student of so many channels sees.

    For 3 channels it is the clip itself; for 2 its optical flow (see `flow.flow_of`): uint8
    [3, T + 1, H, W] becomes float32 [2, T, H, W] in pixels.
    """
    if channels != FLOW_CHANNELS:
        return clip
    flow = flow_of(clip.permute(1, 2, 3, 0).numpy())
    return torch.from_numpy(np.ascontiguousarray(flow.transpose(3, 0, 1, 2)))


def normalize_clip(clip: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return (x/255 − mean) / std of uint8 [B, 3, T, H, W] in `dtype`, on the clip's own device.

    Flow, float32 [B, 2, T, H, W], gets flow's mean and std.
    """
    if clip.shape[1] == FLOW_CHANNELS:
        mean, std = (
            torch.tensor(v, device=clip.device).view(2, 1, 1, 1) for v in (FLOW_MEAN, FLOW_STD)
        )
        return clip.to(torch.float32).sub(mean).div_(std).to(dtype)
    shape = (3, 1, 1, 1)
    mean = torch.tensor(MEAN, device=clip.device, dtype=torch.float32).view(shape)
    std = torch.tensor(STD, device=clip.device, dtype=torch.float32).view(shape)
    return clip.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)
