"""A video student from a 2D ResNet: every 2D kernel repeated over time.

Res3D-18 is ResNet-18 with cubes for squares, so that inflating is a rename of the 100 tensors
before the classifier (and of BatchNorm's 20 batch counters): conv1 → stem.0, bn1 → stem.1,
layerX.Y.convN → layerX.Y.convN.0, layerX.Y.bnN → layerX.Y.convN.1, layerX.Y.downsample unchanged. A
kernel is repeated over the t frames it now spans and, `scaled`, divided by t (as in
open-mmlab/mmaction2 mmaction/models/backbones/resnet3d.py): on a clip that stands still each
convolution then answers as it did to the image. `replicated` does not divide: the paper says no
more than "replicate". For optical flow conv1 is averaged over RGB and repeated for the two
channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..common.errors import CheckpointError
from .student import Backbone
from .student_options import Inflation, StudentOptions

_BLOCKS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
_FITTING = {18: ("r3d_18", "mc3_18"), 34: ("r3d_34",)}


def inflatable(
    state: Mapping[str, Tensor], wanted: StudentOptions | None, label: str
) -> StudentOptions:
    """Return the student that a 2D ResNet's state can be inflated to.

    Args:
        state: of the 2D ResNet.
        wanted: what it sets expressly is kept, if it fits.
        label: where the state is from, for messages.

    Raises:
        CheckpointError: no ResNet of basic blocks, or one that the wanted student is not made of:
            by name, with what would fit.
    """
    stem = state.get("conv1.weight")
    if stem is None or stem.ndim != 4 or stem.shape[1] != 3 or "layer4.0.conv2.weight" not in state:
        raise CheckpointError(
            f"{label}: no 2D ResNet of RGB images in torchvision's names: nothing to inflate"
        )
    if "layer1.0.conv3.weight" in state:
        raise CheckpointError(
            f"{label}: a ResNet of bottleneck blocks (50 layers or more); students are inflated from ResNet-18 or -34"
        )
    blocks = tuple(
        1 + max(int(m[1]) for name in state if (m := re.match(rf"layer{stage}\.(\d+)\.", name)))
        for stage in (1, 2, 3, 4)
    )
    depth = _BLOCKS.get((blocks[0], blocks[1], blocks[2], blocks[3]))
    if depth is None:
        raise CheckpointError(
            f"{label}: a ResNet with {blocks} blocks; ResNet-18 has (2, 2, 2, 2), -34 (3, 4, 6, 3)"
        )
    given, architecture = fitting_student(depth, wanted, label)
    width = stem.shape[0] / 64
    if given.get("width", width) != width:
        raise CheckpointError(
            f"{label}: its width is {width:g}, {given['width']:g} was asked for; what fits: --width {width:g}"
        )
    return StudentOptions.model_validate({**given, "architecture": architecture, "width": width})


def fitting_student(
    depth: int, wanted: StudentOptions | None, label: str
) -> tuple[dict[str, Any], str]:
    """Return what `wanted` sets expressly, and what a ResNet of this depth inflates to.

    Raises:
        CheckpointError: the wanted one is not made of it; names what would fit.
    """
    fitting = _FITTING[depth]
    given = wanted.model_dump(include=wanted.model_fields_set) if wanted is not None else {}
    architecture = given.get("architecture", fitting[0])
    if architecture not in fitting or given.get("variant", "torchvision") != "torchvision":
        why = (
            "its factorised convolutions have middle widths that a 2D ResNet has no tensors for"
            if architecture.startswith("r2plus1d")
            else "the depth differs"
            if architecture not in fitting
            else "variant 'vmz' is a rule of R(2+1)D"
        )
        raise CheckpointError(
            f"{label}: a ResNet-{depth} does not inflate to {architecture}: {why}; what fits: --student "
            f"{' or '.join(fitting)}"
        )
    return given, architecture


def inflate(
    state: Mapping[str, Tensor], backbone: Backbone, inflation: Inflation
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state in the backbone's names, and name → what each tensor was made of.

    What is not part of a backbone (the classifier) keeps its name. Shapes that do not fit are left
    for the loader to refuse.
    """
    own = backbone.state_dict()
    inflated, origin = {}, {}
    for name, tensor in state.items():
        new = video_name(name)
        if new not in own:
            inflated[name] = tensor
            continue
        what = name
        if tensor.ndim == 4 and own[new].ndim == 5:
            channels, frames = own[new].shape[1], own[new].shape[2]
            if name == "conv1.weight" and channels != tensor.shape[1]:
                tensor = tensor.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)
                what += f", averaged over RGB for {channels} channels"
            tensor = tensor.unsqueeze(2).repeat(1, 1, frames, 1, 1)
            if frames > 1:
                what += f", repeated over {frames} frames"
            if inflation == "scaled" and frames > 1:
                tensor = tensor / frames
                what += f" and divided by {frames}"
        inflated[new], origin[new] = tensor, what
    return inflated, origin


def video_name(name: str) -> str:
    """Return the name that a ResNet's tensor has in its video student.

    Example:
        >>> video_name("layer2.1.bn2.running_mean")
        'layer2.1.conv2.1.running_mean'
    """
    name = re.sub(r"^conv1\.", "stem.0.", name)
    name = re.sub(r"^bn1\.", "stem.1.", name)
    name = re.sub(r"^(layer\d\.\d+)\.conv(\d)\.", r"\1.conv\2.0.", name)
    return re.sub(r"^(layer\d\.\d+)\.bn(\d)\.", r"\1.conv\2.1.", name)
