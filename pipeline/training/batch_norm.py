"""A faster backward pass for the batch norm of 3D students, with several threads on a CPU.

In channels-last memory PyTorch's backward pass keeps the sums of each thread next to each other. If
the channels do not fill whole cache lines of 16 numbers, as with the 18 or 29 channels of narrow
R(2+1)D students, threads seem to wait for each other: two are half as fast as one, and half of a
training step is spent in batch norm (docs/benchmarks.md).

Shapes: B clips, C channels, T frames, H W pixels; N = B·T·H·W.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Number of float32 values in a cache line.
LINE = 16


class _FoldedBackward(torch.autograd.Function):
    """PyTorch's forward pass, and a backward pass over rows of `fold` pixels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, inverse = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With x̂ = (x - mean) / σ: dx = weight / σ · (g - mean(g) - x̂ · mean(g · x̂))."""
        x, weight, mean, inverse = ctx.saved_tensors
        shape, channels = x.shape, len(mean)
        count, fold = x.numel() // channels, _fold(x)

        def rows(tensor: Tensor) -> Tensor:
            """[B, C, T, H, W] → [N / fold, fold · C]."""
            return tensor.permute(0, 2, 3, 4, 1).reshape(-1, fold * channels)

        def total(tensor: Tensor) -> Tensor:
            """[N / fold, fold · C] → [C]."""
            return tensor.sum(0).view(fold, channels).sum(0)

        g, centered = rows(grad), rows(x) - mean.repeat(fold)
        grad_bias = total(g)
        grad_weight = total(g * centered) * inverse
        scale = weight * inverse
        offset, slope = -scale * grad_bias / count, -scale * inverse * grad_weight / count
        grad_x = torch.addcmul(offset.repeat(fold), g, scale.repeat(fold))
        grad_x.addcmul_(centered, slope.repeat(fold))
        b, c, t, h, w = shape
        return (
            grad_x.view(b, t, h, w, c).permute(0, 4, 1, 2, 3),
            grad_weight,
            grad_bias,
            None,
            None,
            None,
        )


class ChannelsLastBatchNorm3d(nn.BatchNorm3d):
    """nn.BatchNorm3d with the same outputs and statistics; gradients differ only by rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [B, C, T, H, W]."""
        if not self.training or self.momentum is None or not self._can_fold(x):
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var)
        result: Tensor = _FoldedBackward.apply(
            x, self.weight, self.bias, running, self.momentum, self.eps
        )
        return result

    def _can_fold(self, x: Tensor) -> bool:
        return (
            self.affine
            and torch.get_num_threads() > 1
            and x.dtype == torch.float32
            and x.device.type == "cpu"
            and x.shape[1] % LINE != 0
            and x.is_contiguous(memory_format=torch.channels_last_3d)
            and _fold(x) > 1
        )


def _fold(x: Tensor) -> int:
    """Return the number of pixels of [B, C, T, H, W] per row: a divisor of N, at most LINE."""
    return math.gcd(x.numel() // x.shape[1], LINE)


def use_folded_backward(model: nn.Module) -> None:
    """Give the model's 3D batch norms the faster backward pass, with the same parameter names."""
    for module in model.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = ChannelsLastBatchNorm3d
