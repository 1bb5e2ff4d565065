"""The learning rate of a step: linear warm-up, then drops by a constant factor."""

from __future__ import annotations

from .loop_options import LoopOptions


def learning_rate(step: int, options: LoopOptions) -> float:
    """Rate of step `step` (from 0).

    Warm-up grows per iteration and reaches `peak_lr` in its last step. Drops are counted from the
    end of the warm-up: with warmup_epochs = 10, step_epochs = 10 and lr = 0.01, epochs 0-9 warm up,
    10-19 run at 0.01, and the rate drops at 20, 30, 40.
    """
    warmup_steps = options.warmup_epochs * options.steps_per_epoch
    if step < warmup_steps:
        return options.peak_lr * (step + 1) / warmup_steps
    if options.step_epochs is None:
        return options.peak_lr
    epoch = step // options.steps_per_epoch
    drops = (epoch - options.warmup_epochs) // options.step_epochs
    return float(options.peak_lr * options.gamma**drops)
