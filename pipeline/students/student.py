"""Students: a video backbone with one head per teacher, or one head for labels.

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.video.resnet import (
    BasicBlock,
    Conv2Plus1D,
    Conv3DNoTemporal,
    Conv3DSimple,
)

from ..common.errors import UsageError
from .external import CLIP, external_backbone
from .student_options import BUILTIN_ARCHITECTURES, HeadKind, StudentMeta, StudentOptions

STEM_PLANES, STEM_MIDDLE_PLANES, PLANES = 64, 45, (64, 128, 256, 512)
# BatchNorm's eps in VMZ's ResNet code. Its momentum of 0.9 is PyTorch's 0.1, because in Caffe2
# momentum is the weight of the old average.
VMZ_EPS = 1e-3

_Conv = type[Conv3DSimple] | type[Conv3DNoTemporal] | type[Conv2Plus1D]


class VmzConv2Plus1D(Conv2Plus1D):
    """A (2+1)D convolution whose middle width is computed from its inputs and outputs.

    VMZ computes ⌊3·in·out·k·k / (in·k·k + 3·out)⌋ for each convolution (facebookresearch/VMZ
    c2/lib/models/builder/video_model.py). Torchvision passes the same number to both convolutions
    of a block, which is ignored here.
    """

    def __init__(
        self, in_planes: int, out_planes: int, midplanes: int, stride: int = 1, padding: int = 1
    ) -> None:
        middle = (3 * in_planes * out_planes * 3 * 3) // (in_planes * 3 * 3 + 3 * out_planes)
        super().__init__(in_planes, out_planes, middle, stride, padding)


@dataclass(frozen=True)
class _Plan:
    """The convolutions and blocks of one architecture."""

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
        in_planes = _scaled(STEM_PLANES, options.width)
        self.stem = _stem(plan, options, in_planes)
        layers: list[nn.Sequential] = []
        for stage, (convolution, blocks) in enumerate(
            zip(plan.convolutions, plan.blocks, strict=True)
        ):
            if options.variant == "vmz":
                convolution = VmzConv2Plus1D
            layers.append(
                _layer(convolution, in_planes, planes[stage], blocks, stride=1 if stage == 0 else 2)
            )
            in_planes = planes[stage]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = nn.AdaptiveAvgPool3d(1)
        self.width = in_planes
        self._initialise(eps=VMZ_EPS if options.variant == "vmz" else 1e-5)

    def _initialise(self, eps: float) -> None:
        """Initialise as torchvision does, with the variant's BatchNorm settings."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.eps, module.momentum = eps, 0.1

    def forward(self, clip: Tensor) -> Tensor:
        """Return features [B, D] of clips [B, C, T, H, W]."""
        x = self.stem(clip)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features: Tensor = self.avgpool(x).flatten(1)
        return features


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))


def _stem(plan: _Plan, options: StudentOptions, out: int) -> nn.Sequential:
    """Build the stem, whose numbers of channels are fixed in torchvision, at any width."""
    if not plan.factorised_stem:
        return nn.Sequential(
            nn.Conv3d(
                options.channels, out, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False
            ),
            nn.BatchNorm3d(out),
            nn.ReLU(inplace=True),
        )
    middle = _scaled(STEM_MIDDLE_PLANES, options.width)
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


def _layer(
    convolution: _Conv, in_planes: int, planes: int, num_blocks: int, stride: int
) -> nn.Sequential:
    """Build a stage of basic blocks, the first of which may change width and resolution."""
    downsample = None
    if stride != 1 or in_planes != planes:
        strides = convolution.get_downsample_stride(stride)
        downsample = nn.Sequential(
            nn.Conv3d(in_planes, planes, kernel_size=1, stride=strides, bias=False),
            nn.BatchNorm3d(planes),
        )
    blocks = [BasicBlock(in_planes, planes, convolution, stride, downsample)]
    blocks += [BasicBlock(planes, planes, convolution) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def _key(name: str) -> str:
    """Return a module name for a head: without dots, and different from names of methods."""
    return "head_" + name.replace("%", "%25").replace(".", "%2E")


class MlpHead(nn.Sequential):
    """A head from features [B, D] to outputs [B, K]: linear, GELU, linear, with D hidden units."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.activation = nn.GELU()
        self.output = nn.Linear(width, outputs)
        _initialise_output(self.output)


def _linear_head(width: int, outputs: int) -> nn.Linear:
    head = nn.Linear(width, outputs)
    _initialise_output(head)
    return head


def _initialise_output(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, 0.0, 0.01)
    nn.init.zeros_(layer.bias)


_HEADS: dict[HeadKind, Callable[[int, int], nn.Module]] = {"linear": _linear_head, "mlp": MlpHead}


class Student(nn.Module):
    """A backbone and its heads; made by `build_student`.

    Attributes:
        options: Options of its backbone.
        clip: (T, side) of the clips that it was built for; distinit's backbones also take others.
        meta: Metadata of its file, after `load_student`.
        classes: Number of outputs K of each head, by name.
        head_kinds: Kind of each head, linear or mlp, by name.
        backbone: Module from clips [B, C, T, H, W] to features [B, D] or [B, D, t, h, w].
        frozen: Whether only the heads are trained, see `freeze_backbone`.
    """

    def __init__(
        self,
        options: StudentOptions,
        heads: Mapping[str, int],
        dropout: float = 0.0,
        clip: tuple[int, int] = CLIP,
        head_kinds: HeadKind | Mapping[str, HeadKind] = "linear",
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"dropout is {dropout}, allowed: 0 up to 1, 1 excluded")
        self.options = options
        self.clip = clip
        self.meta = StudentMeta()
        self.classes: dict[str, int] = dict(heads)
        named_kinds = {} if isinstance(head_kinds, str) else head_kinds
        default: HeadKind = head_kinds if isinstance(head_kinds, str) else "linear"
        self.head_kinds: dict[str, HeadKind] = {
            name: named_kinds.get(name, default) for name in heads
        }
        if options.architecture in BUILTIN_ARCHITECTURES:
            self.backbone: nn.Module = (builtin := Backbone(options))
            self._feature_size = builtin.width
        else:
            self.backbone, self._feature_size = external_backbone(options, clip)
        self.frozen = False
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict()
        for name, num_classes in heads.items():
            if num_classes < 1:
                raise UsageError(f"head {name!r} has {num_classes} classes, allowed: 1 or more")
            make_head = _HEADS[self.head_kinds[name]]
            self.heads[_key(name)] = make_head(self._feature_size, num_classes)

    def freeze_backbone(self) -> None:
        """Restrict training to the heads.

        The backbone gets no gradients, and its BatchNorm keeps its statistics.
        """
        self.frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Student:
        """Set the training mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def feature_size(self) -> int:
        """D, the number of features of a clip."""
        return self._feature_size

    def head(self, name: str) -> nn.Module:
        """Return the head of a teacher (or of the labels).

        Raises:
            UsageError: The student has no head of that name.
        """
        if name not in self.classes:
            known = ", ".join(self.classes) or "none"
            raise UsageError(f"head {name!r} is not in this student, it has: {known}")
        return self.heads[_key(name)]

    def features(self, clip: Tensor) -> Tensor:
        """Return features [B, D] of normalised clips [B, C, T, H, W], means over time and space."""
        features: Tensor = self.backbone(clip)
        return features if features.ndim == 2 else features.flatten(2).mean(2)

    def forward(self, clip: Tensor) -> dict[str, Tensor]:
        """Return outputs [B, K] of every head for normalised clips [B, C, T, H, W].

        There is one head per teacher (equation 3 of the paper).
        """
        features = self.dropout(self.features(clip))
        return {name: self.heads[_key(name)](features) for name in self.classes}


def build_student(
    options: StudentOptions,
    heads: Mapping[str, int],
    dropout: float = 0.0,
    *,
    clip: tuple[int, int] = CLIP,
    head_kinds: HeadKind | Mapping[str, HeadKind] = "linear",
) -> Student:
    """Build a student with fresh weights, drawn from torch's global generator.

    Args:
        options: Architecture, variant, width and channels.
        heads: Number of outputs K of each head, by teacher name (or `label` in `finetune`).
        dropout: Probability of dropping a feature before the heads, in training mode.
        clip: (T, side) of the clips. A third-party backbone is run on one such clip to measure its
            number of features.
        head_kinds: Kind of all heads, or by name: linear, or mlp (linear, GELU, linear, with as
            many hidden units as features). Heads that are not named are linear.

    Raises:
        UsageError: A head has no outputs, dropout is outside [0, 1), a factory fails, or a backbone
            does not take such clips or does not return features.

    Example:
        >>> build_student(StudentOptions(width=0.125), {"teacher": 5}).feature_size
        64
    """
    return Student(options, heads, dropout, clip, head_kinds)


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, trained and frozen, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


__all__ = ["Backbone", "Student", "StudentOptions", "build_student", "count_parameters"]
