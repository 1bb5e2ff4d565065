"""What is left of an ablation, in hours, from rates that were measured."""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..common.devices import resolve_device
from ..common.errors import TrainingError
from ..common.tables import Column, Table
from ..students.student import Student, build_student
from ..students.student_options import StudentOptions
from ..training.precision import out_of_memory_hint
from .steps import TRAIN, Step

log = logging.getLogger(__name__)

MEASURED_S = 2.0
CPU_CLIPS = 4  # on a CPU more clips at once take memory and time, and are hardly faster by the clip


def show_cost(
    records: list[dict[str, Any]],
    steps: list[list[Step]],
    out: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """A table of cells, which runs of each are done, and hours for the others; nothing is run or
    written.

    A run's hours are those of a run of the same kind and network that is done here, by the clip,
    testing included; where there is none, the network is timed on clips of noise: neither decoding
    nor testing is in the figure then.
    """
    rates = _known_rates(steps, out, seconds)
    titles = ("cell", "data set", "split", "seed", "student", "finetuning", "hours left")
    table = Table("Cells", [Column(title) for title in titles])
    counted: set[str] = set()
    total, guessed = 0.0, False
    for record, mine in zip(records, steps, strict=True):
        hours = 0.0
        for step in mine:
            if step.result(out) is not None or step.key in counted:
                continue
            counted.add(step.key)  # shared runs cost once
            name = _network(step)
            if name not in rates:
                rates[name] = measure(step.network)
                guessed = True
            hours += step.clips / rates[name] / 3600
        total += hours
        states = {step.kind: "done" if step.result(out) is not None else "to do" for step in mine}
        table.add(
            record["row"], record["dataset"], str(record["split"]), str(record["seed"]),
            states.get(TRAIN, "–"), states["finetune"], f"{hours:.2f}",
        )  # fmt: skip
        record["hours_left"] = round(hours, 6)
    log.info(table)
    how = (
        "; rates of clips of noise, without decoding and testing, where no such run is done yet"
        if guessed
        else ""
    )
    log.info(f"{total:.2f} hours left on one device{how}")
    return {"cells": records, "hours_left": round(total, 6), "measured_on_noise": guessed}


def _network(step: Step) -> str:
    return json.dumps([step.kind, step.network], sort_keys=True)


def _known_rates(steps: list[list[Step]], out: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Clips a second of what is done, by kind and network."""
    found: dict[str, list[float]] = {}
    for step in {step for mine in steps for step in mine}:
        if step.key in seconds and seconds[step.key] > 0 and step.result(out) is not None:
            found.setdefault(_network(step), []).append(step.clips / seconds[step.key])
    return {name: statistics.median(rates) for name, rates in found.items()}


def measure(network: dict[str, Any]) -> float:
    """Training clips a second of a network on its device, on as many clips of noise as it is to
    have at once, timed for some seconds. TrainingError where they do not fit into the GPU's
    memory."""
    device = resolve_device(network["device"])
    options = StudentOptions.model_validate(network["student"])
    student = build_student(options, {"head": 1000}).to(device).train()
    batch, size = network["clips_at_once"], network["size"]
    if device.type == "cpu":
        batch = min(batch, CPU_CLIPS)
    try:
        return _timed(student, batch, size, network, device)
    except torch.OutOfMemoryError as error:
        raise TrainingError(out_of_memory_hint(batch)) from error


def _timed(
    student: Student, batch: int, size: int, network: dict[str, Any], device: torch.device
) -> float:
    clips = torch.randn(
        batch, student.options.channels, network["length"], size, size, device=device
    )
    steps, began = 0, 0.0
    while steps < 2 or time.perf_counter() - began < MEASURED_S:
        with torch.autocast(
            device.type, dtype=torch.bfloat16, enabled=network["precision"] == "bf16"
        ):
            loss = student(clips)["head"].square().mean()
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not began:
            began = time.perf_counter()  # the first step warms up
        steps += 1
    return (steps - 1) * batch / (time.perf_counter() - began)
