"""The optimizer of a run, and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .loop_options import LoopOptions


def make_optimizer(model: nn.Module, options: LoopOptions) -> torch.optim.Optimizer:
    """Make the optimizer of the parameters that are trained.

    SGD decays all of them, as the paper does. AdamW decays no norms and no biases: those are the
    parameters of at most one dimension.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=options.peak_lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.peak_lr, betas=options.betas
    )


class WeightAverage:
    """An exponential moving average of a model's weights and floating-point buffers.

    After step t (from 1) the average is d·average + (1 - d)·weights with
    d = min(decay, (1 + t) / (10 + t)): the first steps count little, so that a short run's average
    is not that of its random start. Buffers of integers are those of the model.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: value.clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after step `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.tensors[name].lerp_(value, 1 - decay)
            else:
                self.tensors[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged tensors under the model's names."""
        return dict(self.tensors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the average by a saved one.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: a tensor has another shape.
        """
        for name, value in self.tensors.items():
            value.copy_(state[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights, and its own again at the end."""
        own = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)
