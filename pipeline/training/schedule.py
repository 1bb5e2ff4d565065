"""The learning rate of a step: linear warm-up, then drops by a constant factor, or a cosine."""

from __future__ import annotations

import math

from .loop_options import LoopOptions


def learning_rate(step: int, options: LoopOptions) -> float:
    """Return the rate of step `step`, counted from 0.

    The warm-up grows per step and reaches `peak_lr` in its last step. What follows is counted from
    its end. `step`: with warmup_epochs = 10, step_epochs = 10 and lr = 0.01, epochs 0-9 warm up,
    10-19 run at 0.01, and the rate drops at 20, 30, 40. `cosine`: peak_lr · (1 + cos(π·p)) / 2, p
    being the share of the steps after the warm-up that are done.
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
