"""Crop, mirror and normalise frames into the input of a video model.

This module and `read` are the only ones of this package that import torch.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch

from ..video.flow import FLOW_CHANNELS, optical_flow
from .clip_options import NORMALIZATION


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
    """Crop uint8 [T, H, W, C] to uint8 [C, T, size, size] at the centre.

    The offset is rounded as torchvision does.
    """
    height, width = images.shape[1:3]
    return crop_and_flip(images, round((height - size) / 2), round((width - size) / 2), size, False)


def of_channels(clip: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert a cropped clip to the input of a student with `channels` channels.

    For 3 channels it is the clip itself; for 2 its optical flow (see `flow.optical_flow`): uint8
    [3, T + 1, H, W] becomes float32 [2, T, H, W] in pixels.
    """
    if channels != FLOW_CHANNELS:
        return clip
    flow = optical_flow(clip.permute(1, 2, 3, 0).numpy())
    return torch.from_numpy(np.ascontiguousarray(flow.transpose(3, 0, 1, 2)))


def normalize_clip(clip: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return (x/255 − mean) / std of uint8 [B, 3, T, H, W] in `dtype`, on the clip's own device.

    Flow, float32 [B, 2, T, H, W], gets flow's mean and std.
    """
    if clip.shape[1] == FLOW_CHANNELS:
        mean, std = (
            torch.tensor(v, device=clip.device).view(2, 1, 1, 1)
            for v in NORMALIZATION[FLOW_CHANNELS]
        )
        return clip.to(torch.float32).sub(mean).div_(std).to(dtype)
    shape = (3, 1, 1, 1)
    mean, std = (
        torch.tensor(v, device=clip.device, dtype=torch.float32).view(shape)
        for v in NORMALIZATION[3]
    )
    return clip.to(torch.float32).div_(255).sub_(mean).div_(std).to(dtype)
