"""Estimate the duration of a training from a few steps on a copy of the model.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..clips.transforms import normalize_clip
from ..common.devices import resolve_device
from ..common.distributed import Ranks
from ..common.documents import load_yaml, read_bytes
from ..common.errors import DistInitError
from ..common.run_dir import CONFIG
from ..common.settings import check_hours, describe_hours, limit_of
from .hardware import autocast, lay_out, pick_workers, torch_threads
from .loader import EpochBatchSampler, KeyedDataset, read_batches
from .loop_options import SCHEDULE, LoopOptions, Resume

log = logging.getLogger(__name__)

# The measurement would take a large part of a shorter training.
LONG_CLIPS = 4000
MEASURED_S, CLIPS = 2.0, 4
# A whole batch is measured if its step is not longer than this.
WHOLE_STEP_S = 4.0
# Share of --minutes for training; start, validation, checkpoints and test take the remainder.
TRAINING_SHARE = 0.8


@dataclass(frozen=True)
class Rate:
    """Seconds per clip that one process computes and that one process reads."""

    compute_s: float
    read_s: float

    def seconds(self, clips: int, workers: int) -> float:
        """Return the seconds of a training, in which loader processes read while it computes."""
        if workers == 0:
            return clips * (self.compute_s + self.read_s)
        return clips * max(self.compute_s, self.read_s / workers)


def measure_rate(model: nn.Module, dataset: KeyedDataset, options: LoopOptions) -> Rate:
    """Measure the first clips of a training, without changing weights or random states.

    Raises:
        DistInitError: The clips cannot be read, or do not fit into the memory of the device.
    """
    device = resolve_device(options.device)
    workers = pick_workers(options.workers, device)
    keys = EpochBatchSampler(batch_size=1, steps_per_epoch=CLIPS + 1, epochs=1)
    batches = read_batches(dataset, keys, workers=min(1, workers), device=device)
    clips, started = [], time.perf_counter()
    for number, batch in enumerate(islice(batches, CLIPS + 1)):
        # The time of the first batch includes the start of the loader process.
        if number == 0:
            started = time.perf_counter()
        clips.append(batch["clip"])
    read_s = (time.perf_counter() - started) / max(1, len(clips) - 1)
    whole_size = options.clips_at_once(options.gpus)
    size = min(whole_size, CLIPS) if device.type == "cpu" else whole_size
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch_threads(options.threads, workers, device):
        shadow = copy.deepcopy(model).train()
        lay_out(shadow, options, device)

        def step_s(size: int) -> float:
            repeated = torch.cat(clips)[torch.arange(size) % len(clips)]
            return step_seconds(shadow, repeated.to(device), options, device)

        seconds = step_s(size)
        # A narrow network needs less time per clip in a whole batch than in a small one.
        if size < whole_size and seconds * whole_size / size < WHOLE_STEP_S:
            size, seconds = whole_size, step_s(whole_size)
    return Rate(seconds / size, read_s)


def step_seconds(
    model: nn.Module, clips: torch.Tensor, options: LoopOptions, device: torch.device
) -> float:
    """Return the seconds of a forward and backward pass of `clips`, not yet normalised."""
    steps, started = 0, 0.0
    while steps < 2 or time.perf_counter() - started < MEASURED_S:
        with autocast(device, options.precision):
            outputs: Any = model(normalize_clip(clips, torch.float32))
        torch.stack(
            [output.float().square().mean() for output in outputs.values()]
        ).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first step is a warm-up.
        started = started or time.perf_counter()
        steps += 1
    return (time.perf_counter() - started) / (steps - 1)


def announce(
    model: nn.Module,
    dataset: KeyedDataset,
    options: LoopOptions,
    clips: int,
    ranks: Ranks,
    rate: Rate | None = None,
) -> None:
    """Log the estimated duration of a training before it starts, and warn of a long one.

    Args:
        model: The model to train.
        dataset: The training clips.
        options: Options of the loop, with `epoch_clips`.
        clips: Total number of clips to train on.
        ranks: The processes that train together.
        rate: The rate, if it was measured before.

    Raises:
        UsageError: The training takes more than `max_hours`.
    """

    def estimate() -> None:
        if clips < LONG_CLIPS and options.max_hours is None:
            return
        try:
            measured = rate or measure_rate(model, dataset, options)
        except DistInitError as error:
            # The training reports the error itself, and may recover from it.
            log.warning("no estimate of the time: %s", error)
            return
        workers = pick_workers(options.workers, resolve_device(options.device))
        hours = measured.seconds(clips, workers) / ranks.world / 3600
        log.info(
            f"estimated: {describe_hours(hours)} for {clips} clips, without validation and test"
        )
        limit = limit_of(options.max_hours)
        max_clips = max(1, int(clips * limit / hours))
        remedy = f"--budget {max_clips} or --minutes {limit * 60:g} fits it into {limit:g} hours"
        check_hours(hours, options.max_hours, "the training", remedy)

    ranks.on_main(estimate)


def clips_in(minutes: float, rate: Rate, options: LoopOptions, world: int) -> int:
    """Return the number of clips that a training of so many minutes has, test included."""
    workers = pick_workers(options.workers, resolve_device(options.device))
    seconds = 60 * minutes * TRAINING_SHARE * world
    return max(options.step_clips, int(seconds / rate.seconds(1, workers)))


def recorded_schedule(
    run_dir: Path, command: str, loop: LoopOptions, *, resume: Resume
) -> LoopOptions:
    """Return the options of a training, with the schedule of the run that it resumes.

    A resumed run keeps its schedule, also one of version 0.1, and a second budget is ignored with a
    warning. With `batch_size: auto` it keeps its batch size. Without a run the schedule is derived,
    see `with_derived_schedule`.
    """
    set_options = loop.model_fields_set
    if set_options.issuperset(SCHEDULE) and loop.batch_size != "auto":
        return loop
    text = read_bytes(run_dir / CONFIG, run_dir) if resume else b""
    content = load_yaml(text.decode("utf-8", "replace"))
    section = content.get(command) if isinstance(content, dict) else None
    stored = section.get("loop") if isinstance(section, dict) else None
    if isinstance(stored, dict):
        schedule = {
            key: stored[key] for key in SCHEDULE if key in stored and key not in set_options
        }
        if loop.batch_size == "auto" and isinstance(stored.get("batch_size"), int):
            schedule["batch_size"] = stored["batch_size"]
        values = {**loop.model_dump(exclude_unset=True), **schedule}
        for option, value in (("--budget", loop.budget), ("--minutes", loop.minutes)):
            if value is not None:
                # No error, because a job that is restarted repeats the options of its first start.
                log.warning(
                    f"{option} {value}: no effect on a run that is resumed, {run_dir} keeps its schedule; "
                    "--epochs changes its length, another --out starts a new run"
                )
        return type(loop).model_validate({**values, "budget": None, "minutes": None})
    return loop.with_derived_schedule()
