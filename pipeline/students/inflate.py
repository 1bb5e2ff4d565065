"""Initialise a video student from a 2D ResNet, by repeating every 2D kernel over time.

R3D-18 is ResNet-18 with 3D kernels, so that the 100 tensors before the classifier (and BatchNorm's
20 batch counters) are renamed: conv1 → stem.0, bn1 → stem.1, layerX.Y.convN → layerX.Y.convN.0,
layerX.Y.bnN → layerX.Y.convN.1; layerX.Y.downsample keeps its name. A kernel is repeated over the t
frames that it now spans. `scaled` also divides it by t, as open-mmlab/mmaction2 does
(mmaction/models/backbones/resnet3d.py), so that on a clip without motion each convolution gives the
same output as on the image. `replicated` does not divide, since the paper only mentions
"replicate". For optical flow conv1 is averaged over RGB and repeated for the two channels.
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
    """Return the options of the student that a 2D ResNet can be inflated to.

    Args:
        state: State of the 2D ResNet.
        wanted: Options that it sets explicitly are kept.
        label: Origin of the state, for messages.

    Raises:
        CheckpointError: The state is not of a ResNet with basic blocks, or does not fit `wanted`;
            the error names the options that fit.
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
    set_options, architecture = fitting_student(depth, wanted, label)
    width = stem.shape[0] / 64
    if set_options.get("width", width) != width:
        raise CheckpointError(
            f"{label}: its width is {width:g}, {set_options['width']:g} was asked for; what fits: --width {width:g}"
        )
    return StudentOptions.model_validate(
        {**set_options, "architecture": architecture, "width": width}
    )


def fitting_student(
    depth: int, wanted: StudentOptions | None, label: str
) -> tuple[dict[str, Any], str]:
    """Return the options that `wanted` sets explicitly, and the architecture to inflate to.

    Raises:
        CheckpointError: A ResNet of this depth does not inflate to `wanted`; the error names the
            architectures that fit.
    """
    fitting = _FITTING[depth]
    set_options = wanted.model_dump(include=wanted.model_fields_set) if wanted is not None else {}
    architecture = set_options.get("architecture", fitting[0])
    if architecture not in fitting or set_options.get("variant", "torchvision") != "torchvision":
        reason = (
            "its factorised convolutions have middle widths that a 2D ResNet has no tensors for"
            if architecture.startswith("r2plus1d")
            else "the depth differs"
            if architecture not in fitting
            else "variant 'vmz' is a rule of R(2+1)D"
        )
        raise CheckpointError(
            f"{label}: a ResNet-{depth} does not inflate to {architecture}: {reason}; what fits: --student "
            f"{' or '.join(fitting)}"
        )
    return set_options, architecture


def inflate(
    state: Mapping[str, Tensor], backbone: Backbone, inflation: Inflation
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state in the backbone's names, and name → origin of each tensor.

    Tensors that are not part of a backbone (the classifier) keep their names. Shapes are not
    checked here; the loader refuses those that do not fit.
    """
    targets = backbone.state_dict()
    inflated, origins = {}, {}
    for name, tensor in state.items():
        new_name = video_name(name)
        if new_name not in targets:
            inflated[name] = tensor
            continue
        origin = name
        if tensor.ndim == 4 and targets[new_name].ndim == 5:
            channels, frames = targets[new_name].shape[1:3]
            if name == "conv1.weight" and channels != tensor.shape[1]:
                tensor = tensor.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)
                origin += f", averaged over RGB for {channels} channels"
            tensor = tensor.unsqueeze(2).repeat(1, 1, frames, 1, 1)
            if frames > 1:
                origin += f", repeated over {frames} frames"
            if inflation == "scaled" and frames > 1:
                tensor = tensor / frames
                origin += f" and divided by {frames}"
        inflated[new_name], origins[new_name] = tensor, origin
    return inflated, origins


def video_name(name: str) -> str:
    """Return the name of a ResNet's tensor in its video student.

    Example:
        >>> video_name("layer2.1.bn2.running_mean")
        'layer2.1.conv2.1.running_mean'
    """
    name = re.sub(r"^conv1\.", "stem.0.", name)
    name = re.sub(r"^bn1\.", "stem.1.", name)
    name = re.sub(r"^(layer\d\.\d+)\.conv(\d)\.", r"\1.conv\2.0.", name)
    return re.sub(r"^(layer\d\.\d+)\.bn(\d)\.", r"\1.conv\2.1.", name)
