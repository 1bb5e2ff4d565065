"""The training loop of stages two and three, on one screen.

What is learned is the objective's business, what is read the data set's; the loop does steps,
epochs, the learning rate, checkpoints and the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.devices import resolve_device
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import TrainingInterrupted, UsageError
from .checkpoint import Checkpoints, random_states
from .interrupts import Interrupts
from .loader import EpochBatchSampler, KeyedDataset, SplitBatchSampler, read_batches
from .loop_options import LoopOptions, Resume
from .meter import Meter
from .metric_logger import Metrics
from .parallel import share_buffers, wrap
from .precision import pick_workers, slow_bf16_warning, torch_threads
from .schedule import learning_rate
from .step import LossReport, Objective, take_step
from .train_state import TrainState

__all__ = ["FitResult", "LoopOptions", "LossReport", "Objective", "fit"]


@dataclass(frozen=True)
class FitResult:
    """How a training ended. `train_loss`: mean over the clips of the last epoch. `best`: the lowest
    held-out loss, or training loss where nothing is held out. `broken`: videos that could not be
    read."""

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

    def unread(self) -> str:
        """The broken videos in a sentence: how many, and why the first three."""
        some = list(self.broken.items())[:3]
        named = "; ".join(f"{name}: {reason}" for name, reason in some)
        more = "; …" if len(self.broken) > len(some) else ""
        return f"videos that could not be read, others were drawn in their place: {len(self.broken)}: {named}{more}"


def fit(
    *,
    model: nn.Module,
    dataset: KeyedDataset,
    objective: Objective,
    options: LoopOptions,
    run_dir: Path,
    identity: dict[str, Any],
    resume: Resume = False,
    validate: Callable[[], dict[str, float]] | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[str, int, str], AbstractContextManager[Any]] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> FitResult:
    """Trains `model` in place and leaves it with the last weights (in train mode, on the device).

    dataset[(epoch, sample)], sample < options.clips_per_epoch, is one example, a dict of tensors,
    numbers and dicts of them. Three keys mean something to the loop, all optional: "name" (str) is
    told when a loss is not finite; "rejected" (int) counts the draws that a filter turned down for
    this sample; "broken" (list of (name, reason)) the videos that could not be read.
    identity: JSON-able; a resume with another one is refused by the name of the key that differs.
    validate: called at the end of each epoch; its "loss", the lower the better, chooses the best
        checkpoint.
    progress: progress(description, total, unit) gives a bar with .advance(n, **fields), as
        Console.progress.
    ranks: the processes that train together. All call `fit` alike and `validate` is called in all;
    rank 0 alone writes into run_dir, which all read on a resume.

    Raises UsageError (the folder holds a run and resume is off), CheckpointError or
    StoreMismatchError (resume of something else), TrainingError (a loss that is not finite, too
    many broken videos), TrainingInterrupted (SIGTERM; the checkpoint is written).
    """
    with ranks.same_error():
        device = resolve_device(options.device)
        workers = pick_workers(options.workers, device)
        if options.batch_size < ranks.world:
            raise UsageError(
                f"loop.batch_size={options.batch_size} is less than a clip for each of {ranks.world} GPUs"
            )
        trained = wrap(model, options, device, ranks).train()
        torch.manual_seed(options.seed + ranks.rank)
        optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=options.peak_lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
        )
        checkpoints = Checkpoints(run_dir, identity | options.identity())
        state = ranks.on_all_ranks(
            lambda: checkpoints.start(
                model, optimizer, resume=resume, max_broken=options.max_broken, ranks=ranks
            )
        )
        meter = Meter(options, state, device)
        if state.step >= options.total_steps:
            say(
                f"{run_dir} is finished: {state.step} of {options.total_steps} steps; nothing to do"
            )
            return _result(state, options, meter, already_finished=True)
        if warning := slow_bf16_warning(device, options.precision):
            say(f"warning: {warning}")

        def save(which: str) -> None:
            rng = ranks.gather(random_states())
            ranks.on_main(lambda: checkpoints.save(which, model, optimizer, state, rng))

        keys = EpochBatchSampler(
            batch_size=options.batch_size,
            steps_per_epoch=options.steps_per_epoch,
            epochs=options.epochs,
            start=state.step,
        )
        with ExitStack() as stack:
            stack.enter_context(torch_threads(options.threads, workers, device))
            interrupts = stack.enter_context(Interrupts())
            metrics = stack.enter_context(Metrics(run_dir, state.step)) if ranks.is_main else None
            bar = stack.enter_context(progress("training", len(keys), "step")) if progress else None
            share = SplitBatchSampler(keys, ranks)
            stop = interrupts.requested
            batches = read_batches(dataset, share, workers=workers, device=device, stop=stop)
            stack.enter_context(closing(batches))
            for batch in meter.timed(ranks.synchronized(batches, stop)):
                rate = learning_rate(state.step, options)
                report = take_step(
                    trained, objective, optimizer, batch, rate, options, device, ranks
                )
                state.add(report)
                meter.add(report)
                if bar is not None:
                    bar.advance(1, loss=f"{state.last_loss:.3f}")
                if state.step % options.log_every == 0 or state.step == options.total_steps:
                    record = meter.record(rate)
                    say(meter.line(record))
                    if metrics is not None:
                        metrics.write("train", state.step, record)

                best = False
                epoch_over = state.step % options.steps_per_epoch == 0
                if epoch_over:
                    share_buffers(model, ranks)
                    validation = validate() if validate is not None else {}
                    trained.train()
                    best = state.end_epoch(validation)
                    if validation:
                        say(
                            _held_out_line(
                                state.step // options.steps_per_epoch, options.epochs, validation
                            )
                        )
                    if metrics is not None:
                        metrics.write("epoch", state.step, state.epoch_record())
                # Best before last: killed between the two, the resume repeats the steps and writes
                # both.
                if best:
                    save("best")
                if epoch_over or state.step % options.checkpoint_every == 0:
                    save("last")

            if state.step < options.total_steps:
                save("last")
                raise TrainingInterrupted(
                    f"interrupted at step {state.step} of {options.total_steps}; "
                    f"the checkpoint is written, --resume continues from it"
                )
        return _result(state, options, meter, already_finished=False)


def _held_out_line(epoch: int, epochs: int, measures: Mapping[str, float]) -> str:
    """What `validate` measured after an epoch, for a person: the loss first, then what stands with
    it."""
    others = (
        f"{name.replace('/', ' ')} {value:.4g}"
        for name, value in measures.items()
        if name != "loss"
    )
    return f"epoch {epoch}/{epochs}  held out: " + ", ".join(
        [f"loss {measures['loss']:.4f}", *others]
    )


def _result(
    state: TrainState, options: LoopOptions, meter: Meter, *, already_finished: bool
) -> FitResult:
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
