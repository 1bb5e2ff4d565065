"""The training loop of `train-student` and `finetune`.

The objective defines the loss, and the data set reads the clips. The loop is responsible for steps,
epochs, the learning rate, checkpoints and the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.devices import resolve_device
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import TrainingInterrupted, UsageError, WorkerDied
from ..common.progress_bar import progress_bar
from ..common.streams import counted
from .checkpoint import Checkpoints, random_states
from .hardware import pick_workers, share_buffers, slow_bf16_warning, torch_threads, wrap
from .interrupts import crashes_recorded, sigterm_noted
from .loader import EpochBatchSampler, KeyedDataset, SplitBatchSampler, read_batches
from .loop_options import LoopOptions, Resume
from .metric_logger import Metrics
from .optimizer import WeightAverage, learning_rate, make_optimizer
from .step import LossReport, Objective, take_step
from .train_state import Meter, TrainState

log = logging.getLogger(__name__)

__all__ = ["FitResult", "LoopOptions", "LossReport", "Objective", "fit"]

Validate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Stop:
    """Conditions to end a training before its last epoch; by default none.

    The learning rate follows the whole schedule, wherever the training ends.

    Args:
        epochs: Number of epochs to train.
        patience: Number of epochs without a better held-out loss.
    """

    epochs: int | None = None
    patience: int | None = None

    def reached(self, state: TrainState) -> bool:
        """Return whether the training ends after the epochs that are finished."""
        enough_epochs = self.epochs is not None and state.epochs >= self.epochs
        epochs_since_best = state.epochs - state.best_epoch
        out_of_patience = self.patience is not None and epochs_since_best >= self.patience
        return enough_epochs or out_of_patience


@dataclass(frozen=True)
class FitResult:
    """The result of a training.

    Args:
        steps: Number of all steps, including those before a resume.
        epochs: Number of finished epochs.
        train_loss: Mean over the clips of the last epoch.
        best: Lowest held-out loss of an epoch, or training loss if nothing is held out.
        best_epoch: Number of that epoch, counted from 1.
        validation: Measures of `validate` after the last epoch.
        best_validation: Measures of `validate` after the best epoch.
        unreadable: Name → reason of each unreadable video.
        resumed_from: First step of this process.
        already_finished: Whether no step was left to do.
        seconds: Duration of the training in this process.
        clips_per_second: Number of clips per second of that duration.
    """

    steps: int
    epochs: int
    train_loss: float
    best: float
    best_epoch: int
    validation: dict[str, float]
    best_validation: dict[str, float]
    unreadable: dict[str, str]
    resumed_from: int
    already_finished: bool
    seconds: float
    clips_per_second: float

    def describe_unreadable(self) -> str:
        """Return the number of unreadable videos and the reasons of the first three."""
        first = list(self.unreadable.items())[:3]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in first)
        ellipsis = "; …" if len(self.unreadable) > len(first) else ""
        count = counted(len(self.unreadable), "unreadable video")
        return f"{count}, replaced by other draws: {reasons}{ellipsis}"


def fit(
    *,
    model: nn.Module,
    dataset: KeyedDataset,
    objective: Objective,
    options: LoopOptions,
    run_dir: Path,
    identity: dict[str, Any],
    resume: Resume = False,
    validate: Validate | None = None,
    stop: Stop = Stop(),
    ranks: Ranks = SINGLE_PROCESS,
) -> FitResult:
    """Train `model` in place, and leave it on the device in train mode with its last weights.

    With `options.weights` "ema" it is left with their moving average.

    Args:
        model: The model to train.
        dataset: dataset[(epoch, sample)], sample < options.clips_per_epoch, is one example: a dict
            of tensors, numbers and dicts of them. The loop reads three optional keys: "name" (str)
            is named in the error of a loss that is not finite; "rejected" (int) counts the draws
            that a filter rejected for this sample; "unreadable" lists (name, reason) of each
            unreadable video.
        objective: Computes the loss.
        options: See `LoopOptions`; `epoch_clips` is set.
        run_dir: The folder of checkpoints and metrics. Only rank 0 writes; a resume reads on all
            ranks.
        identity: JSON-able. A resume with a different identity is refused, with an error that names
            the key that differs.
        resume: See `Resume`.
        validate: Called at the end of each epoch, on all ranks. The lowest "loss" decides on the
            best checkpoint.
        stop: When to end before the last epoch.
        ranks: The processes that train together. All call `fit` with the same arguments.

    Raises:
        UsageError: The folder holds a run and resume is off.
        CheckpointError: The folder holds another run (StoreMismatchError: of another store).
        TrainingError: The loss is not finite, or too many videos are unreadable.
        WorkerDied: A loader process died or hung; the checkpoint is written.
        TrainingInterrupted: SIGTERM arrived; the checkpoint is written.
    """
    with ranks.same_error():
        run = _begin(
            model, options, Checkpoints(run_dir, identity | options.identity()), resume, ranks, stop
        )
        state, already_finished = run.state, run.finished
        if already_finished:
            log.info(
                f"{run_dir} is finished: {state.step} of {options.total_steps} steps; nothing to do"
            )
        else:
            if state.step:
                epoch = state.step // options.steps_per_epoch + 1
                log.info(
                    f"resumed at epoch {epoch} of {options.epochs}, step {state.step} of {options.total_steps}"
                )
            _train(run, dataset, objective, validate)
        if options.weights == "ema" and run.average is not None:
            model.load_state_dict(run.average.state_dict())
            share_buffers(model, ranks)
        return FitResult(
            steps=state.step,
            epochs=state.step // options.steps_per_epoch,
            train_loss=state.train_loss,
            best=state.best,
            best_epoch=state.best_epoch,
            validation=dict(state.validation),
            best_validation=dict(state.best_validation),
            unreadable=dict(state.unreadable),
            resumed_from=run.meter.first_step,
            already_finished=already_finished,
            seconds=run.meter.seconds,
            clips_per_second=run.meter.clips_per_second,
        )


@dataclass(frozen=True)
class _Run:
    """The parts of a training. `trained` is `model` as `wrap` returned it."""

    model: nn.Module
    trained: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    checkpoints: Checkpoints
    state: TrainState
    meter: Meter
    options: LoopOptions
    device: torch.device
    ranks: Ranks
    stop: Stop

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.state.step >= self.options.total_steps or self.stop.reached(self.state)

    def save(self, which: str) -> None:
        """Write the `last` or `best` checkpoint; all ranks call it."""
        rng = self.ranks.gather(random_states())
        self.ranks.on_main(
            lambda: self.checkpoints.save(
                which, self.model, self.optimizer, self.state, rng, average=self.average
            )
        )

    def validate(self, measure: Validate | None) -> dict[str, float]:
        """Validate the weights that `options.weights` names, with the same buffers on all ranks."""
        share_buffers(self.model, self.ranks)
        use_average = self.average is not None and self.options.weights == "ema"
        with self.average.applied(self.model) if use_average else nullcontext():  # type: ignore[union-attr]
            if use_average:
                share_buffers(self.model, self.ranks)
            measures = measure() if measure is not None else {}
        self.trained.train()
        return measures


def _begin(
    model: nn.Module,
    options: LoopOptions,
    checkpoints: Checkpoints,
    resume: Resume,
    ranks: Ranks,
    stop: Stop,
) -> _Run:
    """Move the model to its device, make the optimizer, and load the checkpoint of a resume."""
    device = resolve_device(options.device)
    if options.step_clips < ranks.world:
        raise UsageError(
            f"loop.batch_size={options.step_clips} is less than one clip for each of {ranks.world} GPUs"
        )
    trained = wrap(model, options, device, ranks).train()
    torch.manual_seed(options.seed + ranks.rank)
    optimizer = make_optimizer(model, options)
    average = WeightAverage(model, options.ema) if options.ema is not None else None
    state = ranks.on_all_ranks(
        lambda: checkpoints.start(
            model,
            optimizer,
            average=average,
            resume=resume,
            max_unreadable=options.max_unreadable,
            ranks=ranks,
        )
    )
    meter = Meter(options, state, device)
    return _Run(
        model, trained, optimizer, average, checkpoints, state, meter, options, device, ranks, stop
    )


def _train(
    run: _Run,
    dataset: KeyedDataset,
    objective: Objective,
    validate: Validate | None,
) -> None:
    """Train for the remaining steps.

    Raises:
        TrainingInterrupted: SIGTERM arrived; the checkpoint is written.
    """
    options, state, meter, ranks = run.options, run.state, run.meter, run.ranks
    workers = pick_workers(options.workers, run.device)
    if warning := slow_bf16_warning(run.device, options.precision):
        log.warning(warning)
    keys = EpochBatchSampler(
        batch_size=options.step_clips,
        steps_per_epoch=options.steps_per_epoch,
        epochs=min(options.epochs, run.stop.epochs or options.epochs),
        start=state.step,
    )
    with ExitStack() as stack:
        stack.enter_context(torch_threads(options.threads, workers, run.device))
        stop = stack.enter_context(sigterm_noted())
        run_dir = run.checkpoints.folder.parent
        metrics = None
        if ranks.is_main:
            metrics = stack.enter_context(Metrics(run_dir, state.step, options.loggers))
        bar = stack.enter_context(progress_bar("training", len(keys), "steps"))
        share = SplitBatchSampler(keys, ranks)
        stack.enter_context(crashes_recorded(run_dir, is_main=ranks.is_main))
        batches = read_batches(dataset, share, workers=workers, device=run.device, stop=stop)
        stack.enter_context(closing(batches))
        for batch in meter.timed(_with_checkpoint(run, ranks.synchronized(batches, stop))):
            rate = learning_rate(state.step, options)
            report = take_step(
                run.trained, objective, run.optimizer, batch, rate, options, run.device, ranks
            )
            state.add(report)
            meter.add(report)
            if run.average is not None:
                run.average.update(run.model, state.step)
            bar.advance(1, loss=f"{state.last_loss:.3f}")
            if state.step % options.log_every == 0 or state.step == options.total_steps:
                record = meter.record(rate)
                for line in meter.lines(record):
                    log.info(line)
                if metrics is not None:
                    metrics.write("train", state.step, record)
            epoch_ended = state.step % options.steps_per_epoch == 0
            if epoch_ended:
                _end_epoch(run, validate, metrics)
            if epoch_ended or state.step % options.checkpoint_every == 0:
                run.save("last")
            if epoch_ended and run.finished:
                break

        if not run.finished:
            run.save("last")
            raise TrainingInterrupted(
                f"interrupted at step {state.step} of {options.total_steps}; "
                f"the checkpoint is written, --resume continues from it"
            )


def _with_checkpoint(run: _Run, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the batches; write a checkpoint before a dead loader process ends the training."""
    try:
        yield from batches
    except WorkerDied:
        run.save("last")
        raise


def _end_epoch(
    run: _Run,
    validate: Validate | None,
    metrics: Metrics | None,
) -> None:
    """Validate, log the epoch, and write the best checkpoint if it is the best so far."""
    state = run.state
    is_best = state.end_epoch(run.validate(validate))
    if state.validation:
        for line in _held_out_lines(state.epochs, run.options.epochs, state.validation):
            log.info(line)
    if metrics is not None:
        metrics.write("epoch", state.step, state.epoch_record())
    # The best checkpoint precedes the last one. If the run is killed between the two, the resume
    # repeats the steps and writes both.
    if is_best:
        run.save("best")


def _held_out_lines(epoch: int, epochs: int, measures: Mapping[str, float]) -> list[str]:
    """Return the measures after an epoch as log lines: the loss first, then a line per head."""
    overall = [f"loss {measures['loss']:.4f}"]
    by_head: dict[str, list[str]] = {}
    for name, value in measures.items():
        measure, _, head = name.partition("/")
        if head:
            by_head.setdefault(head, []).append(f"{measure} {value:.4g}")
        elif name != "loss":
            overall.append(f"{name} {value:.4g}")
    lines = [f"    {head}: {', '.join(words)}" for head, words in by_head.items()]
    return [f"epoch {epoch}/{epochs}  held out: {', '.join(overall)}", *lines]
