"""Torchvision's video models as backbones, without their classifiers and at any clip size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.video import S3D, MViT
from torchvision.models.video.mvit import MSBlockConfig

from ..common.errors import UsageError, third_party
from .student_options import StudentOptions

# What torchvision calls its classifiers.
_CLASSIFIERS = ("fc", "head", "classifier")
# The tables of torchvision's `mvit_v1_b` and `mvit_v2_s`, which are fixed to clips of 16 × 224².
_HEADS = [1, 2, 2, *[4] * 11, 8, 8]
_STRIDES_KV = [8, 4, 4, *[2] * 11, 1, 1]
_WIDTHS = [96, 192, 192, *[384] * 11, 768, 768]


def torchvision_backbone(options: StudentOptions, clip: tuple[int, int]) -> nn.Module:
    """Build a torchvision video model with fresh weights and no classifier.

    Args:
        options: names the model; their `options` are the arguments of its builder.
        clip: (T, side) of the clips, which MViT's positional embeddings are made for.

    Raises:
        UsageError: the builder fails, or nothing can take the number of channels.
    """
    name = options.architecture
    if "weights" in options.options:
        raise UsageError(f"student.options.weights: {name} begins with fresh weights")
    build = {"mvit_v1_b": _mvit_v1_b, "mvit_v2_s": _mvit_v2_s}.get(name)
    # The builders check little themselves.
    with third_party(f"student {name!r}", UsageError):
        if build is not None:
            model: nn.Module = build(clip, options.options)
        else:
            model = get_model(name, weights=None, **options.options)
    classifier = next(part for part in _CLASSIFIERS if hasattr(model, part))
    setattr(model, classifier, nn.Identity())
    if isinstance(model, S3D):
        # Made for 224 pixels; the mean over time and space follows anyway.
        model.avgpool = nn.Identity()
    if options.channels != 3:
        _take_channels(model, options)
    return model


def _mvit_v1_b(clip: tuple[int, int], given: dict[str, Any]) -> MViT:
    return _mvit(
        clip,
        inputs=_WIDTHS,
        outputs=[*_WIDTHS[1:], 768],
        kernels_q=[[3, 3, 3] if block in (1, 3, 14) else [] for block in range(16)],
        strides_q=[[1, 2, 2] if block in (1, 3, 14) else [] for block in range(16)],
        given={"residual_pool": False, "residual_with_cls_embed": False, **given},
    )


def _mvit_v2_s(clip: tuple[int, int], given: dict[str, Any]) -> MViT:
    fixed = {
        "residual_pool": True,
        "residual_with_cls_embed": False,
        "rel_pos_embed": True,
        "proj_after_attn": True,
    }
    return _mvit(
        clip,
        inputs=[96, *_WIDTHS[:-1]],
        outputs=[96, *_WIDTHS[1:]],
        kernels_q=[[3, 3, 3]] * 16,
        strides_q=[[1, 2, 2] if block in (1, 3, 14) else [1, 1, 1] for block in range(16)],
        given={**fixed, **given},
    )


def _mvit(
    clip: tuple[int, int],
    *,
    inputs: list[int],
    outputs: list[int],
    kernels_q: list[list[int]],
    strides_q: list[list[int]],
    given: dict[str, Any],
) -> MViT:
    frames, side = clip
    blocks = [
        MSBlockConfig(
            num_heads=_HEADS[block],
            input_channels=inputs[block],
            output_channels=outputs[block],
            kernel_q=kernels_q[block],
            kernel_kv=[3, 3, 3],
            stride_q=strides_q[block],
            stride_kv=[1, _STRIDES_KV[block], _STRIDES_KV[block]],
        )
        for block in range(16)
    ]
    return MViT(
        spatial_size=(side, side),
        temporal_size=frames,
        block_setting=blocks,
        **{"rel_pos_embed": False, "proj_after_attn": False, "stochastic_depth_prob": 0.2, **given},
    )


def _take_channels(model: nn.Module, options: StudentOptions) -> None:
    """Replace the first convolution by one of `options.channels` channels.

    It has the first slices of the replaced kernels.
    """
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
