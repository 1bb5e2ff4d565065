"""Logits and features of one forward pass.

Shapes: B images, h w pixels, K classes, D features.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..store.store_options import Output
from .loaded_model import Forward


def tapped(module: nn.Module, layer: str) -> Forward:
    """Return a forward pass whose features are the input [B, D] of `layer`, the classifier.

    The logits are the module's own output, whether features are asked for or not.
    """
    # Of its own in each thread: several batches run through one module at once.
    seen = threading.local()

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.inputs = inputs[0]

    module.get_submodule(layer).register_forward_pre_hook(remember)

    def forward(images: Tensor, outputs: tuple[Output, ...]) -> Mapping[Output, Tensor]:
        logits = module(images)
        features = seen.inputs
        seen.inputs = None
        return {"logits": logits, "features": features}

    return forward


def last_linear(module: nn.Module) -> str | None:
    """Return the name of a module's last linear layer that it runs as a layer, None without one."""
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return names[-1] if names else None
