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
CPU_CLIPS = 4  # on a CPU larger batches take memory and time, and are hardly faster per clip


def show_cost(
    records: list[dict[str, Any]],
    steps: list[list[Step]],
    out: Path,
    seconds: dict[str, float],
    max_hours: float | None,
    cells: bool,
) -> dict[str, Any]:
    """Show the finished runs of each cell and the hours of the others, without running anything.

    The rate of a run, tests included, is that of finished runs of the same kind and network. If
    there are none, the network is timed on clips of noise, without decoding and tests.

    Args:
        records: A record per cell, see `Progress.records`.
        steps: The steps of each cell.
        out: The folder of the ablation.
        seconds: Duration of each finished step by key.
        max_hours: The most hours that may be left; None: a warning of many.
        cells: Whether to show each cell.

    Returns:
        `cells` with `hours_left` each, the total, and whether a rate was measured on noise.

    Raises:
        UsageError: More than `max_hours` are left.
    """
    rates = _known_rates(steps, out, seconds)
    titles = ("cell", "data set", "split", "seed", "student", "finetuning", "hours left")
    table = Table("Cells", [Column(title) for title in titles])
    # Runs that cells share are counted once.
    counted: set[str] = set()
    total, on_noise = 0.0, False
    for record, cell_steps in zip(records, steps, strict=True):
        hours = 0.0
        for step in cell_steps:
            if step.result(out) is not None or step.key in counted:
                continue
            counted.add(step.key)
            name = _network(step)
            if name not in rates:
                rates[name] = measure(step.network)
                on_noise = True
            hours += step.clips / rates[name] / 3600
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
        "; runs without a finished one of their kind were timed on noise, without decoding and tests"
        if on_noise
        else ""
    )
    log.info(f"estimated: {describe_hours(total)} left on one device{caveat}")
    check_hours(total, max_hours, "this ablation", SHORTER)
    return {"cells": records, "hours_left": round(total, 6), "measured_on_noise": on_noise}


def _hours(hours: float) -> str:
    return f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def _network(step: Step) -> str:
    return json.dumps([step.kind, step.network], sort_keys=True)


def _known_rates(steps: list[list[Step]], out: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Return clips per second of finished steps by kind and network."""
    rates: dict[str, list[float]] = {}
    for step in {step for cell_steps in steps for step in cell_steps}:
        if step.key in seconds and seconds[step.key] > 0 and step.result(out) is not None:
            rates.setdefault(_network(step), []).append(step.clips / seconds[step.key])
    return {name: statistics.median(each) for name, each in rates.items()}


def measure(network: dict[str, Any]) -> float:
    """Measure the training clips per second of a network on batches of noise, for some seconds.

    Raises:
        TrainingError: A batch does not fit into the memory of the GPU.
    """
    device = resolve_device(network["device"])
    options = StudentOptions.model_validate(network["student"])
    student = build_student(options, {"head": 1000}).train()
    loop = LoopOptions(precision=network["precision"], device=network["device"])
    batch, size = network["micro_batch_size"], network["size"]
    if device.type == "cpu":
        batch = min(batch, CPU_CLIPS)
    shape = (batch, options.channels, network["clip_frames"], size, size)
    clips = torch.randint(256, shape, dtype=torch.uint8)
    try:
        with torch_threads(None, pick_workers(None, device), device):
            lay_out(student, loop, device)
            return batch / step_seconds(student, clips.to(device), loop, device)
    except torch.OutOfMemoryError as error:
        raise TrainingError(out_of_memory_hint(batch)) from error
