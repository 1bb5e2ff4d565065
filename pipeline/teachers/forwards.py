"""Logits, features and the last feature map of one forward pass.

Shapes: B images, h w cells of a map, K classes, D features, G cells per side of a grid.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..store.encoding import shares
from .loaded_model import MAP, Forward

_POOLS = ("avgpool", "_avg_pooling")


def tapped(module: nn.Module, layer: str) -> Forward:
    """Return a forward pass whose features are the input [B, D] of `layer`, the classifier.

    The logits are the module's own output, whether features are asked for or not. The map is the
    input of the layer that pools it, where there is one.
    """
    # Of its own in each thread: several batches run through one module at once.
    seen = threading.local()

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.inputs = inputs[0]

    def remember_map(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.map = inputs[0]

    module.get_submodule(layer).register_forward_pre_hook(remember)
    if (pool := pooling_layer(module)) is not None:
        module.get_submodule(pool).register_forward_pre_hook(remember_map)

    def forward(images: Tensor, outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        logits = module(images)
        found = {"logits": logits, "features": seen.inputs}
        seen.inputs = None
        if MAP in outputs:
            found[MAP] = seen.map
        seen.map = None
        return found

    return forward


def pooling_layer(module: nn.Module) -> str | None:
    """Return the name of the layer that pools the last feature map, or None."""
    return next((name for name, _ in module.named_children() if name in _POOLS), None)


def grid_cells(maps: Tensor, grid: int) -> Tensor:
    """Average maps [B, D, h, w] over G × G cells of equal area, [B, G·G·D], the cells row by row.

    Where a cell ends inside one of the map, each takes its share of the area, so that the mean of
    all cells is that of the map.
    """
    down, across = (
        torch.stack(
            [torch.from_numpy(shares(i / grid, (i + 1) / grid, length)) for i in range(grid)]
        ).to(maps)
        for length in maps.shape[2:]
    )
    return torch.einsum("gh,bdhw,kw->bgkd", down, maps, across).flatten(1)


def last_linear(module: nn.Module) -> str | None:
    """Return the name of a module's last linear layer that it runs as a layer, None without one."""
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return names[-1] if names else None
