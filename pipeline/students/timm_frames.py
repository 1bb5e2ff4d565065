"""timm's image backbones as students: applied to each frame, their features averaged over time.

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from ..common.errors import UsageError, third_party
from ..common.plugins import import_extra
from .student_options import StudentOptions

# Arguments of timm that read files, fetch weights, or change what the model returns.
_RESERVED = re.compile(
    r"pretrained.*|checkpoint_path|cache_dir|features_only|feature_cfg|out_indices|num_classes|"
    r"in_chans|model_cfg|scriptable|exportable|no_jit"
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
    """Build a timm image model without its classifier, with fresh weights.

    Args:
        options: `timm:NAME`, and the arguments of timm's builder.
        clip: (T, side) of the clips; models of a fixed input size are made for that side.

    Raises:
        UsageError: timm is not installed, has no such model, or its builder fails.
    """
    who = f"student {options.architecture!r}"
    timm = import_extra("timm", "timm", who)
    name = options.architecture.removeprefix("timm:")
    # Other names of timm lead to files and downloads (`hf-hub:…`, `local-dir:…`).
    if ":" in name or "/" in name or not timm.is_model(name):
        near = timm.list_models(f"*{re.sub('[^a-z0-9]+', '*', name.lower())[:12]}*")[:5]
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise UsageError(f"{who}: timm has no such model; {hint}")
    reserved = next((key for key in options.options if _RESERVED.fullmatch(key)), None)
    if reserved is not None:
        raise UsageError(
            f"student.options.{reserved}: not allowed, {options.architecture} begins with fresh "
            "weights and gives its pooled features"
        )
    sized = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    given = {"img_size": clip[1], **options.options} if sized else options.options
    with third_party(who, UsageError):
        model = timm.create_model(
            name, pretrained=False, num_classes=0, in_chans=options.channels, **given
        )
    return FrameBackbone(model)
