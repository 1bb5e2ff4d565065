"""Third-party backbones: of torchvision, timm and transformers, and of any factory.

docs/students.md describes what a factory must return. Torchvision's video models are built without
their classifiers and for any clip size. timm's image models are applied to each frame, and their
features are averaged over time. For models of transformers see `transformers_video`.

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.video import S3D, MViT
from torchvision.models.video.mvit import MSBlockConfig

from ..common.errors import UsageError, third_party
from ..common.plugins import call_factory, import_extra
from .student_options import StudentOptions
from .transformers_video import transformers_backbone

# Default T and H = W of the clip that a backbone is tried on.
CLIP = (8, 112)
# Keys of the features, if a wrapper's `forward_features` returns a mapping.
_FEATURES = ("pooled_features", "features")
# Names of the classifiers of torchvision's models.
_CLASSIFIERS = ("fc", "head", "classifier")
# Settings of torchvision's `mvit_v1_b` and `mvit_v2_s`, whose builders only support clips of
# 16 × 224².
_HEADS = [1, 2, 2, *[4] * 11, 8, 8]
_STRIDES_KV = [8, 4, 4, *[2] * 11, 1, 1]
_WIDTHS = [96, 192, 192, *[384] * 11, 768, 768]
# Arguments of timm that read files, download weights, or change the output of the model.
_RESERVED = re.compile(
    r"pretrained.*|checkpoint_path|cache_dir|features_only|feature_cfg|out_indices|num_classes|"
    r"in_chans|model_cfg|scriptable|exportable|no_jit"
)


class WrappedBackbone(nn.Module):
    """A module that returns its features from `forward_features`, perhaps in a mapping."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, clip: Tensor) -> Any:
        """Return features [B, D] or [B, D, t, h, w] of clips [B, C, T, H, W]."""
        output: Any = self.wrapper.forward_features(clip)  # type: ignore[operator]
        if isinstance(output, Mapping):
            return next((output[key] for key in _FEATURES if key in output), output)
        return output


def external_backbone(options: StudentOptions, clip: tuple[int, int]) -> tuple[nn.Module, int]:
    """Build a backbone from clips [B, C, T, H, W] to features [B, D] or [B, D, t, h, w].

    The backbone has fresh weights and its original parameter names. It is run on one clip to
    measure D.

    Args:
        options: Options that name the model or the factory.
        clip: (T, H = W) of the clips.

    Returns:
        The module and D.

    Raises:
        UsageError: The builder or factory fails, or the module does not take such clips or does not
            return features.
    """
    module = _build(options, clip)
    return module, _feature_size(module, options, clip)


def library_shapes(options: StudentOptions, clip: tuple[int, int]) -> dict[str, torch.Size] | None:
    """Return the shapes of a library's backbone by name, without allocating its tensors.

    Return None for a factory, and for a model that cannot be built on the meta device.
    """
    if options.is_factory:
        return None
    try:
        with torch.device("meta"):
            return {name: value.shape for name, value in _build(options, clip).state_dict().items()}
    except UsageError:
        return None


def _build(options: StudentOptions, clip: tuple[int, int]) -> nn.Module:
    kind = options.architecture.partition(":")[0] if ":" in options.architecture else ""
    builders: dict[str, Callable[[StudentOptions, tuple[int, int]], nn.Module]] = {
        "": torchvision_backbone,
        "timm": timm_backbone,
        "hf": transformers_backbone,
    }
    return builders.get(kind, _from_factory)(options, clip)


def _from_factory(options: StudentOptions, clip: tuple[int, int]) -> nn.Module:
    label = f"student {options.architecture!r}"
    offered = {"channels": options.channels, "clip_frames": clip[0], "clip_size": clip[1]}
    # Options of the user take precedence.
    offered = {key: value for key, value in offered.items() if key not in options.options}
    module = call_factory(options.architecture, label, options.options, offered=offered)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{label}: the factory returned a {type(module).__name__}, allowed: torch.nn.Module"
        )
    # Both are required, since the `forward_features` of many modules does not return the features
    # of a clip.
    is_wrapper = callable(getattr(module, "forward_features", None)) and hasattr(
        module, "feature_dim"
    )
    return WrappedBackbone(module) if is_wrapper else module


def _feature_size(module: nn.Module, options: StudentOptions, clip: tuple[int, int]) -> int:
    """Return D, measured on a black clip in evaluation mode."""
    length, side = clip
    shape = (1, options.channels, length, side, side)
    training = module.training
    problem = f"student {options.architecture!r} does not take clips [B, C, T, H, W] = {['B', *shape[1:]]}"
    try:
        with torch.no_grad(), third_party(problem, UsageError):
            features: Any = module.eval()(torch.zeros(shape))
    finally:
        module.train(training)
    if not isinstance(features, Tensor) or features.ndim not in (2, 5) or len(features) != 1:
        output = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UsageError(
            f"student {options.architecture!r} gives {output} for one clip, allowed: features [1, D] or [1, D, t, h, w]"
        )
    size = int(features.shape[1])
    stated_size = getattr(getattr(module, "wrapper", None), "feature_dim", size)
    if stated_size != size:
        raise UsageError(
            f"student {options.architecture!r}: feature_dim is {stated_size}, its features have {size}"
        )
    return size


def torchvision_backbone(options: StudentOptions, clip: tuple[int, int]) -> nn.Module:
    """Build a torchvision video model with fresh weights and without its classifier.

    Args:
        options: Options with the name of the model, and in `options` the arguments of its builder.
        clip: (T, side) of the clips, for MViT's positional embeddings.

    Raises:
        UsageError: The builder fails, or the model cannot take the number of channels.
    """
    name = options.architecture
    if "weights" in options.options:
        raise UsageError(f"student.options.weights: {name} begins with fresh weights")
    build = {"mvit_v1_b": _mvit_v1_b, "mvit_v2_s": _mvit_v2_s}.get(name)
    # The builders check few of their arguments.
    with third_party(f"student {name!r}", UsageError):
        if build is not None:
            model: nn.Module = build(clip, options.options)
        else:
            model = get_model(name, weights=None, **options.options)
    classifier = next(part for part in _CLASSIFIERS if hasattr(model, part))
    setattr(model, classifier, nn.Identity())
    if isinstance(model, S3D):
        # Its pooling is fixed to 224 pixels; the student averages over time and space instead.
        model.avgpool = nn.Identity()
    if options.channels != 3:
        _take_channels(model, options)
    return model


def _mvit_v1_b(clip: tuple[int, int], arguments: dict[str, Any]) -> MViT:
    return _mvit(
        clip,
        inputs=_WIDTHS,
        outputs=[*_WIDTHS[1:], 768],
        kernels_q=[[3, 3, 3] if block in (1, 3, 14) else [] for block in range(16)],
        strides_q=[[1, 2, 2] if block in (1, 3, 14) else [] for block in range(16)],
        arguments={"residual_pool": False, "residual_with_cls_embed": False, **arguments},
    )


def _mvit_v2_s(clip: tuple[int, int], arguments: dict[str, Any]) -> MViT:
    defaults = {
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
        arguments={**defaults, **arguments},
    )


def _mvit(
    clip: tuple[int, int],
    *,
    inputs: list[int],
    outputs: list[int],
    kernels_q: list[list[int]],
    strides_q: list[list[int]],
    arguments: dict[str, Any],
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
        **{
            "rel_pos_embed": False,
            "proj_after_attn": False,
            "stochastic_depth_prob": 0.2,
            **arguments,
        },
    )


def _take_channels(model: nn.Module, options: StudentOptions) -> None:
    """Replace the first convolution by one with `options.channels` input channels.

    It keeps the kernels of the first channels.
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
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, first)
            return
    raise UsageError(
        f"student {options.architecture!r} has no first convolution that could take {options.channels} channels"
    )


class FrameBackbone(nn.Module):
    """An image backbone on every frame: clips [B, C, T, H, W] to features [B, D]."""

    def __init__(self, image_model: nn.Module) -> None:
        super().__init__()
        self.image_model = image_model

    def forward(self, clip: Tensor) -> Tensor:
        """Return the mean over time of the features of each frame."""
        batch, _, frames = clip.shape[:3]
        features: Tensor = self.image_model(clip.transpose(1, 2).flatten(0, 1))
        return features.unflatten(0, (batch, frames)).mean(1)


def timm_backbone(options: StudentOptions, clip: tuple[int, int]) -> nn.Module:
    """Build a timm image model with fresh weights and without its classifier.

    Args:
        options: Options with `timm:NAME`, and in `options` the arguments of timm's builder.
        clip: (T, side) of the clips; models with a fixed input size are built for that side.

    Raises:
        UsageError: timm is not installed or has no such model, or its builder fails.
    """
    label = f"student {options.architecture!r}"
    timm = import_extra("timm", "timm", label)
    name = options.architecture.removeprefix("timm:")
    # Other forms of names make timm read files or download them (`hf-hub:…`, `local-dir:…`).
    if ":" in name or "/" in name or not timm.is_model(name):
        similar = timm.list_models(f"*{re.sub('[^a-z0-9]+', '*', name.lower())[:12]}*")[:5]
        hint = f"near: {', '.join(similar)}" if similar else "timm.list_models() lists them"
        raise UsageError(f"{label}: timm has no such model; {hint}")
    reserved = next((key for key in options.options if _RESERVED.fullmatch(key)), None)
    if reserved is not None:
        raise UsageError(
            f"student.options.{reserved}: not allowed, {options.architecture} begins with fresh "
            "weights and gives its pooled features"
        )
    has_fixed_size = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    arguments = {"img_size": clip[1], **options.options} if has_fixed_size else options.options
    with third_party(label, UsageError):
        model = timm.create_model(
            name, pretrained=False, num_classes=0, in_chans=options.channels, **arguments
        )
    return FrameBackbone(model)
