"""The optimizer of a run, its learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .loop_options import LoopOptions


def make_optimizer(model: nn.Module, options: LoopOptions) -> torch.optim.Optimizer:
    """Make the optimizer of the parameters that are trained.

    SGD decays all of them, as in the paper. AdamW does not decay norms and biases, which are the
    parameters with at most one dimension.
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
    undecayed = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=options.peak_lr, betas=options.betas
    )


class WeightAverage:
    """An exponential moving average of a model's weights and floating-point buffers.

    After step t (from 1) the average is d·average + (1 - d)·weights with d = min(decay, (1 + t) /
    (10 + t)). The first steps have a small weight, so that the average of a short run does not keep
    its random start. Integer buffers are copied from the model.
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
            KeyError: A tensor is missing.
            RuntimeError: A tensor has a different shape.
        """
        for name, value in self.tensors.items():
            value.copy_(state[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and then restore its weights."""
        original = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(original)


def learning_rate(step: int, options: LoopOptions) -> float:
    """Return the rate of step `step`, counted from 0.

    The warm-up grows with each step and reaches `peak_lr` in its last step. The schedule after it
    is counted from its end. `step`: with warmup_epochs = 10, step_epochs = 10 and lr = 0.01, epochs
    0-9 warm up, 10-19 run at 0.01, and the rate drops at 20, 30, 40. `cosine`: peak_lr · (1 +
    cos(π·p)) / 2, where p is the finished share of the steps after the warm-up.
    """
    warmup_steps = options.warmup_epochs * options.steps_per_epoch
    if step < warmup_steps:
        return options.peak_lr * (step + 1) / warmup_steps
    if options.schedule == "cosine":
        share = (step - warmup_steps) / (options.total_steps - warmup_steps)
        return options.peak_lr * (1 + math.cos(math.pi * share)) / 2
    if options.step_epochs is None:
        return options.peak_lr
    epoch = step // options.steps_per_epoch
    drops = (epoch - options.warmup_epochs) // options.step_epochs
    return float(options.peak_lr * options.gamma**drops)
