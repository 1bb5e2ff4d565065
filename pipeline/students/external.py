"""Backbones that are not built here: torchvision's other video models, and anybody's factory.

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.video import S3D

from ..common.errors import UsageError, third_party
from ..common.plugins import call_factory
from .student_options import StudentOptions

CLIP = (8, 112)  # T and H = W that a backbone is tried on where nothing else is said
# What torchvision calls its classifiers.
_CLASSIFIERS = ("fc", "head", "classifier")


def external_backbone(options: StudentOptions, clip: tuple[int, int]) -> tuple[nn.Module, int]:
    """(module, D): from clips [B, C, T, H, W] to features [B, D] or [B, D, t, h, w], with fresh
    weights.

    Its parameters keep their own names. It is tried on one clip of clip = (T, H = W), which tells
    D.

    Raises:
        UsageError: the builder or factory fails, the module does not take such clips or gives no
            features.
    """
    if options.is_factory:
        module = _from_factory(options)
    else:
        module = _from_torchvision(options)
    return module, _features_of(module, options, clip)


def _from_torchvision(options: StudentOptions) -> nn.Module:
    name = options.architecture
    if "weights" in options.options:
        raise UsageError(f"student.options.weights: {name} begins with fresh weights")
    with third_party(f"student {name!r}", UsageError):  # the builders check little themselves
        model: nn.Module = get_model(name, weights=None, **options.options)
    classifier = next(part for part in _CLASSIFIERS if hasattr(model, part))
    setattr(model, classifier, nn.Identity())
    if isinstance(model, S3D):
        model.avgpool = (
            nn.Identity()
        )  # made for 224 pixels; the mean over time and space follows anyway
    if options.channels != 3:
        _take_channels(model, options)
    return model


def _take_channels(model: nn.Module, options: StudentOptions) -> None:
    """Another first convolution, with as many of its kernels' slices as there are channels."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv3d) and module.in_channels == 3 and module.groups == 1:
            first = nn.Conv3d(
                options.channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            with torch.no_grad():
                first.weight.copy_(module.weight[:, : options.channels])
                if module.bias is not None and first.bias is not None:
                    first.bias.copy_(module.bias)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, first)
            return
    raise UsageError(
        f"student {options.architecture!r} has no first convolution that could take {options.channels} channels"
    )


def _from_factory(options: StudentOptions) -> nn.Module:
    who = f"student {options.architecture!r}"
    made = call_factory(
        options.architecture, who, options.options, offered={"channels": options.channels}
    )
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"{who}: the factory returned a {type(made).__name__}, allowed: torch.nn.Module"
        )
    return made


def _features_of(module: nn.Module, options: StudentOptions, clip: tuple[int, int]) -> int:
    """D, from a black clip in evaluation mode."""
    length, side = clip
    shape = (1, options.channels, length, side, side)
    training = module.training
    who = f"student {options.architecture!r} does not take clips [B, C, T, H, W] = {['B', *shape[1:]]}"
    try:
        with torch.no_grad(), third_party(who, UsageError):
            features: Any = module.eval()(torch.zeros(shape))
    finally:
        module.train(training)
    if not isinstance(features, Tensor) or features.ndim not in (2, 5) or len(features) != 1:
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(
            f"student {options.architecture!r} gives {found} for one clip, allowed: features [1, D] or [1, D, t, h, w]"
        )
    return int(features.shape[1])
