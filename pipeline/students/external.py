"""Backbones that are not built here: torchvision's, timm's, transformers', and anybody's factory.

What a factory must return is described in docs/students.md.

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UsageError, third_party
from ..common.plugins import call_factory
from .student_options import StudentOptions
from .timm_frames import timm_backbone
from .torchvision_video import torchvision_backbone
from .transformers_video import transformers_backbone

CLIP = (8, 112)  # T and H = W that a backbone is tried on where nothing else is given
# Keys of what a wrapper's `forward_features` may return.
_FEATURES = ("pooled_features", "features")


class WrappedBackbone(nn.Module):
    """A module whose features come from its `forward_features`, maybe in a mapping."""

    def __init__(self, wrapper: nn.Module) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, clip: Tensor) -> Any:
        """Return features [B, D] or [B, D, t, h, w] of clips [B, C, T, H, W]."""
        found: Any = self.wrapper.forward_features(clip)  # type: ignore[operator]
        if isinstance(found, Mapping):
            return next((found[key] for key in _FEATURES if key in found), found)
        return found


def external_backbone(options: StudentOptions, clip: tuple[int, int]) -> tuple[nn.Module, int]:
    """Build a backbone from clips [B, C, T, H, W] to features [B, D] or [B, D, t, h, w].

    Its parameters are fresh and keep their own names. It is tried on one clip, which gives D.

    Args:
        options: names the model or the factory.
        clip: (T, H = W) of the clips that it is for.

    Returns:
        The module and D.

    Raises:
        UsageError: the builder or factory fails, or the module does not take such clips or gives no
            features.
    """
    module = _build(options, clip)
    return module, _features_of(module, options, clip)


def library_shapes(options: StudentOptions, clip: tuple[int, int]) -> dict[str, torch.Size] | None:
    """Return the shapes of a library's backbone by name, without memory for its values.

    None for a factory, and for a model that cannot be built without values.
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
    who = f"student {options.architecture!r}"
    offered = {"channels": options.channels, "clip_frames": clip[0], "clip_size": clip[1]}
    # What the user's options set is the user's.
    offered = {key: value for key, value in offered.items() if key not in options.options}
    made = call_factory(options.architecture, who, options.options, offered=offered)
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"{who}: the factory returned a {type(made).__name__}, allowed: torch.nn.Module"
        )
    # Both, since many modules have a `forward_features` that is not their feature for a clip.
    wrapper = callable(getattr(made, "forward_features", None)) and hasattr(made, "feature_dim")
    return WrappedBackbone(made) if wrapper else made


def _features_of(module: nn.Module, options: StudentOptions, clip: tuple[int, int]) -> int:
    """Return D, from a black clip in evaluation mode."""
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
    width = int(features.shape[1])
    stated = getattr(getattr(module, "wrapper", None), "feature_dim", width)
    if stated != width:
        raise UsageError(
            f"student {options.architecture!r}: feature_dim is {stated}, its features have {width}"
        )
    return width
