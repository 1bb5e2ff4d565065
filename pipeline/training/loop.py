"""The training loop of stages two and three, on one screen.

What is learned is the objective's business, what is read the data set's; the loop does steps, epochs,
the learning rate, checkpoints and the log.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..devices import resolve_device
from ..errors import TrainingError, TrainingInterrupted
from .checkpoint import Checkpoints
from .device import autocast, pick_workers, place, slow_precision, torch_threads
from .interrupts import Interrupts
from .loader import KeyedBatches, KeyedDataset, read_batches, to_device, worker_errors
from .meter import Meter
from .metrics import Metrics
from .options import LoopOptions
from .schedule import learning_rate
from .state import TrainState

__all__ = ["FitResult", "LoopOptions", "LossReport", "Objective", "fit"]


@dataclass(frozen=True)
class LossReport:
    """What an objective says of one batch.

    loss: scalar with a graph, already the mean over the clips that count (0 with a graph if none does).
    kept: clips that count, at most B.
    parts: scalars worth logging beside the loss: the loss of each teacher, the accuracy.
    """

    loss: Tensor
    kept: int | Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, dict[str, Any]], LossReport]
"""objective(model, batch): forward and loss of one batch, whose tensors lie on the device already. It runs
under autocast when precision is bf16; the loss itself is to be computed in float32."""


@dataclass(frozen=True)
class FitResult:
    """How a training ended. `train_loss`: mean over the clips of the last epoch. `best`: the lowest
    held-out loss, or training loss where nothing is held out. `broken`: videos that could not be read."""

    steps: int
    epochs: int
    train_loss: float
    best: float
    best_epoch: int
    validation: dict[str, float]
    broken: dict[str, str]
    resumed_from: int
    already_finished: bool
    seconds: float
    clips_per_second: float


def fit(
    *,
    model: nn.Module,
    dataset: KeyedDataset,
    objective: Objective,
    options: LoopOptions,
    run_dir: Path,
    identity: dict[str, Any],
    resume: bool = False,
    validate: Callable[[], dict[str, float]] | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[str, int, str], AbstractContextManager[Any]] | None = None,
) -> FitResult:
    """Trains `model` in place and leaves it with the last weights (in train mode, on the device).

    dataset[(epoch, sample)], sample < options.clips_per_epoch, is one example, a dict of tensors, numbers
    and dicts of them. Three keys mean something to the loop, all optional: "name" (str) is told when a
    loss is not finite; "rejected" (int) counts the draws that a filter turned down for this sample;
    "broken" (list of (name, reason)) the videos that could not be read.
    identity: JSON-able; a resume with another one is refused by the name of the key that differs.
    validate: called at the end of each epoch; its "loss", the lower the better, chooses the best checkpoint.
    progress: progress(description, total, unit) gives a bar with .advance(n, **fields), as Screen.progress.

    Raises UsageError (the folder holds a run and resume is off), CheckpointError or StoreMismatchError
    (resume of something else), TrainingError (a loss that is not finite, too many broken videos),
    TrainingInterrupted (SIGTERM; the checkpoint is written).
    """
    device = resolve_device(options.device)
    workers = pick_workers(options.workers, device)
    torch.manual_seed(options.seed)
    place(model, device).train()
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
    )
    checkpoints = Checkpoints(run_dir, identity | options.identity())
    state = checkpoints.start(model, optimizer, resume=resume, max_broken=options.max_broken)
    meter = Meter(options, state, device)
    if state.step >= options.total_steps:
        say(f"{run_dir} is finished: {state.step} of {options.total_steps} steps; nothing to do")
        return _result(state, options, meter, already_finished=True)
    if warning := slow_precision(device, options.precision):
        say(f"warning: {warning}")

    keys = KeyedBatches(
        batch_size=options.batch_size,
        steps_per_epoch=options.steps_per_epoch,
        epochs=options.epochs,
        start=state.step,
    )
    with ExitStack() as stack:
        stack.enter_context(torch_threads(options.threads, workers, device))
        interrupts = stack.enter_context(Interrupts())
        metrics = stack.enter_context(Metrics(run_dir, state.step))
        bar = stack.enter_context(progress("training", len(keys), "step")) if progress else None
        stack.enter_context(worker_errors())
        batches = stack.enter_context(closing(read_batches(dataset, keys, workers=workers, device=device)))
        for batch in meter.timed(interrupts.until(batches)):
            rate = learning_rate(state.step, options)
            report = _step(model, objective, optimizer, to_device(batch, device), rate, options, device)
            state.add(batch, report.loss, report.kept)
            meter.add(batch, report.loss, report.kept, report.parts)
            if bar is not None:
                bar.advance(1, loss=f"{state.last_loss:.3f}")
            if state.step % options.log_every == 0 or state.step == options.total_steps:
                record = meter.record(rate)
                metrics.write("train", state.step, record)
                say(meter.line(record))

            best = False
            epoch_over = state.step % options.steps_per_epoch == 0
            if epoch_over:
                validation = validate() if validate is not None else {}
                model.train()
                best = state.end_epoch(validation)
                metrics.write("epoch", state.step, state.epoch_record())
            # Best before last: killed between the two, the resume repeats the steps and writes both.
            if best:
                checkpoints.save("best", model, optimizer, state)
            if epoch_over or state.step % options.checkpoint_every == 0:
                checkpoints.save("last", model, optimizer, state)

        if state.step < options.total_steps:
            checkpoints.save("last", model, optimizer, state)
            raise TrainingInterrupted(
                f"interrupted at step {state.step} of {options.total_steps}; "
                f"the checkpoint is written, --resume continues from it"
            )
    return _result(state, options, meter, already_finished=False)


def _step(
    model: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    rate: float,
    options: LoopOptions,
    device: torch.device,
) -> LossReport:
    """One step of the optimizer; nothing is updated when the loss or the gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    with autocast(device, options.precision):
        report = objective(model, batch)
    report.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or float("inf"))
    if not bool(torch.isfinite(report.loss.detach() + norm)):
        names = ", ".join(batch.get("name", ["unknown"]))
        what = "loss" if not bool(torch.isfinite(report.loss.detach())) else "gradient"
        raise TrainingError(
            f"the {what} is not finite (loss {float(report.loss.detach())}) at learning rate {rate:g}; "
            f"videos of the batch: {names}; try a lower loop.lr, loop.clip_norm=5 or loop.precision=fp32"
        )
    optimizer.step()
    return report


def _result(state: TrainState, options: LoopOptions, meter: Meter, *, already_finished: bool) -> FitResult:
    return FitResult(
        steps=state.step,
        epochs=state.step // options.steps_per_epoch,
        train_loss=state.train_loss,
        best=state.best,
        best_epoch=state.best_epoch,
        validation=dict(state.validation),
        broken=dict(state.broken),
        resumed_from=meter.first_step,
        already_finished=already_finished,
        seconds=meter.seconds,
        clips_per_second=meter.clips_per_second,
    )
