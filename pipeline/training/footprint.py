"""Estimate memory and computation of a training step from shapes alone: nothing is allocated.

Shape letters: B clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Footprint:
    """Bytes and FLOPs of a step on one device.

    Attributes:
        weights: Bytes of parameters, their gradients, the state of the optimizer, and buffers.
        activations: Bytes that the forward pass keeps for the backward pass.
        flops: Forward and backward; a multiplication and an addition are two.
    """

    weights: int
    activations: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes of weights and activations, without workspaces of convolutions and slack."""
        return self.weights + self.activations


def footprint(
    model: nn.Module,
    shape: tuple[int, int, int, int, int],
    *,
    precision: str = "fp32",
    copies: int = 3,
) -> Footprint | None:
    """Return the footprint of a training step; None where a module cannot run without data.

    Args:
        model: The model; its weights are not changed.
        shape: Of the clips, [B, C, T, H, W].
        precision: In bf16 the activations are taken to be half as large, the weights are not.
        copies: Number of tensors of the size of the weights that training holds, see
            `LoopOptions.weight_copies`.
    """
    weights = sum(
        copies * p.numel() * p.element_size() if p.requires_grad else p.nbytes
        for p in model.parameters()
    )
    weights += sum(buffer.nbytes for buffer in model.buffers())
    # The tensors themselves: an address is unique while its tensor lives.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    try:
        shadow = copy.deepcopy(model).to("meta").train()
        own = {
            tensor.untyped_storage()._cdata for tensor in (*shadow.parameters(), *shadow.buffers())
        }
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                outputs: Any = shadow(torch.zeros(shape, device="meta"))
            torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    except Exception:  # a user's module may look at its data, and a shape has none
        return None
    activations = sum(
        tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own
    )
    return Footprint(
        weights, activations // 2 if precision == "bf16" else activations, counter.get_total_flops()
    )
