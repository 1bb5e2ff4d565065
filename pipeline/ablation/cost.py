"""Estimate the remaining hours of an ablation from measured rates."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path
from typing import Any

import torch

from ..common.devices import resolve_device
from ..common.errors import TrainingError
from ..common.settings import check_hours, describe_hours
from ..common.tables import Column, Table
from ..students.student import build_student
from ..students.student_options import StudentOptions
from ..training.hardware import lay_out, out_of_memory_hint, pick_workers, torch_threads
from ..training.loop_options import LoopOptions
from ..training.training_time import step_seconds
from .steps import TRAIN, Step

log = logging.getLogger(__name__)

# Options that make an ablation shorter; every plan accepts them.
SHORTER = (
    "--set base.train-student.preset=small --set base.finetune.preset=small selects a narrow student and "
    "a schedule that follows the number of videos, --set base.train-student.loop.budget=CLIPS a shorter one"
)
# On a CPU, larger batches take more memory and time, and are hardly faster per clip.
MAX_CPU_CLIPS = 4


def show_cost(
    records: list[dict[str, Any]],
    steps: list[list[Step]],
    out: Path,
    seconds: dict[str, float],
    max_hours: float | None,
    cells: bool,
) -> dict[str, Any]:
    """Show the finished runs of each cell and the estimated hours of the others, and run nothing.

    The rate of a run is measured on finished runs of the same kind and network, tests included. If
    there are none, the network is timed on clips of noise, without decoding and tests.

    Args:
        records: A record per cell, see `Progress.records`.
        steps: The steps of each cell.
        out: The folder of the ablation.
        seconds: Duration of each finished step by key.
        max_hours: Maximum number of hours that may be left; None only warns of many.
        cells: Whether to show each cell.

    Returns:
        `cells`, each with `hours_left`, the total, and whether a rate was measured on noise.

    Raises:
        UsageError: More than `max_hours` are left.
    """
    rates = _measured_rates(steps, out, seconds)
    titles = ("cell", "data set", "split", "seed", "student", "finetuning", "hours left")
    table = Table("Cells", [Column(title) for title in titles])
    # Runs that cells share are counted once.
    counted_keys: set[str] = set()
    total, on_noise = 0.0, False
    for record, cell_steps in zip(records, steps, strict=True):
        hours = 0.0
        for step in cell_steps:
            if step.result(out) is not None or step.key in counted_keys:
                continue
            counted_keys.add(step.key)
            network = _network_key(step)
            if network not in rates:
                rates[network] = measure_rate(step.network)
                on_noise = True
            hours += step.clips / rates[network] / 3600
        total += hours
        states = {
            step.kind: "done" if step.result(out) is not None else "to do" for step in cell_steps
        }
        table.add(
            record["row"], record["dataset"], str(record["split"]), str(record["seed"]),
            states.get(TRAIN, "–"), states["finetune"], _hours(hours),
        )  # fmt: skip
        record["hours_left"] = round(hours, 6)
    if cells:
        log.info(table)
    caveat = (
        "; kinds of runs of which none is finished were timed on noise, without decoding and tests"
        if on_noise
        else ""
    )
    log.info(f"estimated: {describe_hours(total)} left on one device{caveat}")
    check_hours(total, max_hours, "this ablation", SHORTER)
    return {"cells": records, "hours_left": round(total, 6), "measured_on_noise": on_noise}


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def _network_key(step: Step) -> str:
    """Return the kind and network of a step as text; steps with equal texts have equal rates."""
    return json.dumps([step.kind, step.network], sort_keys=True)


def _measured_rates(
    steps: list[list[Step]], out: Path, seconds: dict[str, float]
) -> dict[str, float]:
    """Return the median clips per second of finished steps, by kind and network."""
    rates: dict[str, list[float]] = {}
    for step in {step for cell_steps in steps for step in cell_steps}:
        if step.key in seconds and seconds[step.key] > 0 and step.result(out) is not None:
            rates.setdefault(_network_key(step), []).append(step.clips / seconds[step.key])
    return {network: statistics.median(values) for network, values in rates.items()}


def measure_rate(network: dict[str, Any]) -> float:
    """Measure the clips per second of a training step on batches of noise, for some seconds.

    Raises:
        TrainingError: A batch does not fit into the memory of the GPU.
    """
    device = resolve_device(network["device"])
    options = StudentOptions.model_validate(network["student"])
    student = build_student(options, {"head": 1000}).train()
    loop = LoopOptions(precision=network["precision"], device=network["device"])
    batch, size = network["micro_batch_size"], network["size"]
    if device.type == "cpu":
        batch = min(batch, MAX_CPU_CLIPS)
    shape = (batch, options.channels, network["clip_frames"], size, size)
    clips = torch.randint(256, shape, dtype=torch.uint8)
    try:
        with torch_threads(None, pick_workers(None, device), device):
            lay_out(student, loop, device)
            return batch / step_seconds(student, clips.to(device), loop, device)
    except torch.OutOfMemoryError as error:
        raise TrainingError(out_of_memory_hint(batch)) from error
