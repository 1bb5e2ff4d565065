"""Students: a video ResNet's backbone with one linear head per teacher (or one of labels).

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torchvision.models.video.resnet import (
    BasicBlock,
    Conv2Plus1D,
    Conv3DNoTemporal,
    Conv3DSimple,
)

from ..common.errors import UsageError
from .external import CLIP, external_backbone
from .student_options import BUILTIN_ARCHITECTURES, StudentMeta, StudentOptions

STEM, STEM_MIDDLE, PLANES = 64, 45, (64, 128, 256, 512)
# VMZ's BatchNorm eps (its ResNet code). Its Caffe2 momentum of 0.9 weighs the old average:
# PyTorch's 0.1.
VMZ_EPS = 1e-3

_Conv = type[Conv3DSimple] | type[Conv3DNoTemporal] | type[Conv2Plus1D]


class VmzConv2Plus1D(Conv2Plus1D):
    """A (2+1)D convolution whose middle width fits its own inputs and outputs.

    VMZ computes ⌊3·in·out·k·k / (in·k·k + 3·out)⌋ for each convolution
    (facebookresearch/VMZ c2/lib/models/builder/video_model.py); torchvision passes one number to
    both convolutions of a block, which is ignored here.
    """

    def __init__(
        self, in_planes: int, out_planes: int, midplanes: int, stride: int = 1, padding: int = 1
    ) -> None:
        middle = (3 * in_planes * out_planes * 3 * 3) // (in_planes * 3 * 3 + 3 * out_planes)
        super().__init__(in_planes, out_planes, middle, stride, padding)


@dataclass(frozen=True)
class _Plan:
    """What tells one architecture from another."""

    convolutions: tuple[_Conv, _Conv, _Conv, _Conv]
    blocks: tuple[int, int, int, int]
    factorised_stem: bool = False


_PLANS: dict[str, _Plan] = {
    "r2plus1d_18": _Plan((Conv2Plus1D,) * 4, (2, 2, 2, 2), factorised_stem=True),
    "r2plus1d_34": _Plan((Conv2Plus1D,) * 4, (3, 4, 6, 3), factorised_stem=True),
    "r3d_18": _Plan((Conv3DSimple,) * 4, (2, 2, 2, 2)),
    "r3d_34": _Plan((Conv3DSimple,) * 4, (3, 4, 6, 3)),
    "mc3_18": _Plan(
        (Conv3DSimple, Conv3DNoTemporal, Conv3DNoTemporal, Conv3DNoTemporal), (2, 2, 2, 2)
    ),
}


class Backbone(nn.Module):
    """A video ResNet without its classifier; parameters are named as in torchvision's VideoResNet.

    Maps clips [B, C, T, H, W] to features [B, D], averaged over time and space.
    """

    def __init__(self, options: StudentOptions) -> None:
        super().__init__()
        plan = _PLANS[options.architecture]
        planes = [_scaled(count, options.width) for count in PLANES]
        first = _scaled(STEM, options.width)
        self.stem = _stem(plan, options, first)
        before = first
        layers: list[nn.Sequential] = []
        for stage, (convolution, blocks) in enumerate(
            zip(plan.convolutions, plan.blocks, strict=True)
        ):
            if options.variant == "vmz":
                convolution = VmzConv2Plus1D
            layers.append(
                _layer(convolution, before, planes[stage], blocks, stride=1 if stage == 0 else 2)
            )
            before = planes[stage]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.width = before
        self._initialise(eps=VMZ_EPS if options.variant == "vmz" else 1e-5)

    def _initialise(self, eps: float) -> None:
        """Torchvision's initialisation, with the variant's BatchNorm settings."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.eps, module.momentum = eps, 0.1

    def forward(self, clip: Tensor) -> Tensor:
        """features[B, D] of clip[B, C, T, H, W]."""
        x = self.stem(clip)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features: Tensor = self.avgpool(x).flatten(1)
        return features


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))


def _stem(plan: _Plan, options: StudentOptions, out: int) -> nn.Sequential:
    """Torchvision's stems, which have fixed channel counts of their own, at any width."""
    if not plan.factorised_stem:
        return nn.Sequential(
            nn.Conv3d(
                options.channels, out, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False
            ),
            nn.BatchNorm3d(out),
            nn.ReLU(inplace=True),
        )
    middle = _scaled(STEM_MIDDLE, options.width)
    return nn.Sequential(
        nn.Conv3d(
            options.channels, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False
        ),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, out, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(out),
        nn.ReLU(inplace=True),
    )


def _layer(convolution: _Conv, before: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """One stage of basic blocks; the first may halve the resolution and changes the width."""
    downsample = None
    if stride != 1 or before != planes:
        steps = convolution.get_downsample_stride(stride)
        downsample = nn.Sequential(
            nn.Conv3d(before, planes, kernel_size=1, stride=steps, bias=False),
            nn.BatchNorm3d(planes),
        )
    chain = [BasicBlock(before, planes, convolution, stride, downsample)]
    chain += [BasicBlock(planes, planes, convolution) for _ in range(blocks - 1)]
    return nn.Sequential(*chain)


def _key(name: str) -> str:
    """A head's name as a module name, which may hold no dot and must not shadow a method."""
    return "head_" + name.replace("%", "%25").replace(".", "%2E")


class Student(nn.Module):
    """A backbone and its linear heads; made by `build_student`."""

    def __init__(
        self,
        options: StudentOptions,
        heads: Mapping[str, int],
        dropout: float = 0.0,
        clip: tuple[int, int] = CLIP,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"dropout is {dropout}, allowed: 0 up to 1, 1 excluded")
        self.options = options
        self.meta = StudentMeta()
        """What its file says of it, after `load_student`."""
        self.classes: dict[str, int] = dict(heads)
        if options.architecture in BUILTIN_ARCHITECTURES:
            self.backbone: nn.Module = (own := Backbone(options))
            self._width = own.width
        else:
            self.backbone, self._width = external_backbone(options, clip)
        self.frozen = False
        """Whether the heads alone are trained; see `freeze_backbone`."""
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict()
        for name, classes in heads.items():
            if classes < 1:
                raise UsageError(f"head {name!r} has {classes} classes, allowed: 1 or more")
            linear = nn.Linear(self._width, classes)
            nn.init.normal_(linear.weight, 0.0, 0.01)
            nn.init.zeros_(linear.bias)
            self.heads[_key(name)] = linear

    def freeze_backbone(self) -> None:
        """Train the heads alone: the backbone gets no gradients, and its BatchNorm keeps its
        statistics."""
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        """As of any module; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def feature_size(self) -> int:
        """D, the length of a clip's feature."""
        return self._width

    def head(self, name: str) -> nn.Linear:
        """The linear head of a teacher (or of the labels).

        Raises:
            UsageError: there is no head of that name.
        """
        if name not in self.classes:
            known = ", ".join(self.classes) or "none"
            raise UsageError(f"head {name!r} is not in this student, it has: {known}")
        return cast(nn.Linear, self.heads[_key(name)])

    def features(self, clip: Tensor) -> Tensor:
        """features[B, D] of normalised clip[B, C, T, H, W], averaged over time and space."""
        features: Tensor = self.backbone(clip)
        return features if features.ndim == 2 else features.flatten(2).mean(2)

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """logits[B, K] of every head for normalised clip[B, C, T, H, W] (eq. 3: one head a
        teacher)."""
        features = self.dropout(self.features(clip))
        return {name: self.heads[_key(name)](features) for name in self.classes}


def build_student(
    options: StudentOptions,
    heads: Mapping[str, int],
    dropout: float = 0.0,
    *,
    clip: tuple[int, int] = CLIP,
) -> Student:
    """A student with fresh weights, drawn from torch's global generator.

    Args:
        options: architecture, variant, width and channels.
        heads: number of classes K of each head, by teacher name (or `label` in stage three).
        dropout: probability of dropping a feature before the heads, in training mode.
        clip: (T, side) of the clips it is for: a backbone that is not distinit's own is tried on
            one, which tells its number of features.

    Raises:
        UsageError: a head without classes, a dropout outside [0, 1), a factory that fails, a
            backbone that does not take such clips or gives no features [B, D] or [B, D, t, h, w].
    """
    return Student(options, heads, dropout, clip)


def count_parameters(module: nn.Module) -> int:
    """Number of trainable and frozen parameters, buffers aside."""
    return sum(parameter.numel() for parameter in module.parameters())


__all__ = ["Backbone", "Student", "StudentOptions", "build_student", "count_parameters"]
