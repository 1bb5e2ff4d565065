"""The image teacher of the object × motion corpus: a narrow ResNet-18 that knows only digits.

`build` is the factory for `extract-targets --teacher object_teacher:build`. Its twin in three
dimensions is r3d_18 of the same width, so that `finetune --init inflate:FILE` fits. It has no max
pool after the first convolution, because r3d_18 has none.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from motion_corpus import backgrounds, scans, scene
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from distinit.pipeline.clips.clip_options import NORMALIZATION

# Mean and deviation of students, so that the inflated twin is exact.
MEAN, STD = NORMALIZATION[3]

# Short side of resized frames, and of the crops that teacher and students are trained on.
RESIZED, SIDE = 48, 40


def build(width: float = 0.25) -> nn.Module:
    """Build a ResNet-18 with `width` times its channels: images [B, 3, h, w] → logits [B, 10]."""
    net = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10)
    channels = int(64 * width)
    net.inplanes = channels
    net.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
    net.bn1 = nn.BatchNorm2d(channels)
    net.maxpool = nn.Identity()
    for stage in range(4):
        layer = net._make_layer(BasicBlock, channels * 2**stage, 2, stride=1 if stage == 0 else 2)
        setattr(net, f"layer{stage + 1}", layer)
    net.fc = nn.Linear(8 * channels, 10)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def train(
    path: Path, folder: Path, *, width: float, images: int, seed: int = 0, batch: int = 64
) -> float:
    """Train the teacher on still images like the frames of the videos, and save its weights.

    Returns:
        Its accuracy on unseen scans.
    """
    draw = np.random.default_rng(seed + 1)
    torch.manual_seed(seed)
    scanned, behind = scans(of_teacher=True), backgrounds(folder)
    behind = behind[len(behind) // 4 :]
    held = np.flatnonzero(np.arange(len(scanned.digits)) % 10 == 0)
    learned = np.setdiff1d(np.arange(len(scanned.digits)), held)

    def some(of: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = draw.choice(of, count)
        pictures = []
        for scan in chosen:
            mine, other = draw.choice(len(behind), 2, replace=False)
            picture = next(scene(draw, scanned.images[scan], behind[mine], behind[other], None))
            picture = cv2.resize(picture, (RESIZED, RESIZED), interpolation=cv2.INTER_AREA)
            top, left = draw.integers(0, RESIZED - SIDE + 1, 2)
            pictures.append(picture[top : top + SIDE, left : left + SIDE])
        clean = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        scaled = (clean - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return scaled, torch.from_numpy(scanned.digits[chosen]).long()

    net = build(width).train()
    steps = images // batch
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        pictures, digits = some(learned, batch)
        loss = nn.functional.cross_entropy(net(pictures), digits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"teacher: step {step}/{steps}, loss {loss.item():.3f}", flush=True)
    net.eval()
    with torch.no_grad():
        pictures, digits = some(held, 1000)
        right = (net(pictures).argmax(dim=1) == digits).float().mean().item()
    torch.save(net.state_dict(), path)
    return right
