"""The state of the steps of an ablation, and how they run in parallel.

Dask schedules the steps, and each runs as a command in a process of its own. That process sees one
GPU, releases all memory (also that of the GPU) when it ends, and ends with its worker. A crash
fails only its step.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import FiniteFloat, TypeAdapter

from ..common.dask_workers import cluster, gpu_of_worker
from ..common.documents import read_bytes
from ..common.errors import DistInitError, SourceError
from ..common.files import write_whole
from ..common.processes import end_with_parent
from ..common.progress_bar import progress_bar
from ..common.run_dir import CELLS, SECONDS
from .plan import Cell, Plan
from .steps import Step, prepared_config

log = logging.getLogger(__name__)

LOGS = "logs"
DERIVED = "derived"


@dataclass(frozen=True)
class CellSteps:
    """A cell and its steps; `student` is None if the cell trains none."""

    cell: Cell
    student: Step | None
    finetuning: Step

    @property
    def steps(self) -> list[Step]:
        """The steps in the order in which they run."""
        return [step for step in (self.student, self.finetuning) if step is not None]


def derives_schedules(out: Path) -> bool:
    """Return whether schedules that a plan does not set are derived from the number of videos.

    A folder that version 0.1 wrote keeps the default schedules of its finished runs.
    """
    content = read_bytes(out / CELLS, out)
    try:
        return not content or json.loads(content).get("schedules") == DERIVED
    except (ValueError, AttributeError, RecursionError):
        return True


class Progress:
    """Durations and failures of steps; their results are in their folders.

    Args:
        out: The folder of the ablation.
        plan: Its plan.
        cells: Its cells and their steps.
        derived: Whether schedules that the plan does not set are derived, see `derives_schedules`.
    """

    def __init__(
        self, out: Path, plan: Plan, cells: list[CellSteps], *, derived: bool = True
    ) -> None:
        self.out, self.plan, self.cells, self.derived = out, plan, cells, derived
        self.failed: dict[str, str] = {}
        try:
            self.seconds = TypeAdapter(dict[str, FiniteFloat]).validate_json(
                read_bytes(out / SECONDS) or b"{}"
            )
        except (SourceError, ValueError):
            self.seconds = {}

    def add_seconds(self, step: Step, seconds: float) -> None:
        """Add to the duration of a step, which an interruption divides into several parts."""
        self.seconds[step.key] = self.seconds.get(step.key, 0.0) + seconds
        write_whole(self.out / SECONDS, json.dumps(self.seconds, indent=1).encode())

    def records(self) -> list[dict[str, Any]]:
        """Return a record per cell, as described in docs/ablate.md."""
        return [self._record(each) for each in self.cells]

    def write(self) -> None:
        """Write OUT/cells.json atomically."""
        paper = self.plan.paper
        # The cells may have other splits than the plan, for example those of --split.
        if paper is not None and paper.splits is None:
            paper = paper.model_copy(update={"splits": self.plan.splits})
        content = {
            "title": self.plan.title,
            "paper": paper.model_dump(exclude_none=True) if paper else None,
            "axes": list(self.plan.axes),
            "schedules": DERIVED if self.derived else "defaults",
            "cells": self.records(),
        }
        write_whole(self.out / CELLS, json.dumps(content, indent=1).encode())

    def _record(self, cell_steps: CellSteps) -> dict[str, Any]:
        cell, steps = cell_steps.cell, cell_steps.steps
        reason = next((self.failed[step.key] for step in steps if step.key in self.failed), None)
        finished = cell_steps.finetuning.result(self.out) is not None
        durations = [self.seconds[step.key] for step in steps if step.key in self.seconds]
        return {
            "row": cell.row,
            "axes": cell.axes,
            "seed": cell.seed,
            "dataset": cell.dataset.partition("=")[0],
            "split": cell.split,
            "student": cell_steps.student.folder if cell_steps.student else None,
            "finetune": cell_steps.finetuning.folder,
            "status": "done" if finished else "failed" if reason else "missing",
            "reason": None if finished else reason,
            "seconds": round(sum(durations), 1) if finished and durations else None,
        }


def run_on_workers(
    workers: int | None,
    scheduler: str | None,
    steps: list[Step],
    progress: Progress,
) -> None:
    """Run steps on a dask cluster, each after the training of its student, and record progress."""
    from distributed import as_completed

    if not steps:
        return
    with cluster(workers, scheduler) as client:
        futures: dict[str, Any] = {}
        # The step of a student is listed before the steps that start from it.
        for step in steps:
            futures[step.key] = client.submit(
                run_as_command,
                step,
                str(progress.out),
                futures.get(step.student_key or ""),
                key=step.key,
                retries=1,
            )
        by_key = {step.key: step for step in steps}
        with progress_bar("runs", len(steps), "run") as bar:
            for future in as_completed(list(futures.values())):
                step = by_key[future.key]
                if future.status == "finished":
                    progress.add_seconds(step, future.result())
                else:
                    progress.failed[step.key] = " ".join(str(future.exception()).split())[:300]
                    log.warning("%s failed: %s", step.folder, progress.failed[step.key])
                progress.write()
                bar.advance(1)


def run_as_command(step: Step, out: str, student_seconds: float | None) -> float:
    """Run one step as a command, in a worker.

    Args:
        step: The step.
        out: The folder of the ablation.
        student_seconds: Duration of the training of its student. It is not used: as an argument it
            makes dask wait for that training.

    Returns:
        The duration in seconds.

    Raises:
        DistInitError: The command failed; the message is the last line of its output.
    """
    folder = Path(out)
    if step.result(folder) is not None:
        return 0.0
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    log = folder / LOGS / f"{step.key}.log"
    started = time.monotonic()
    # Through a pipe: the URL of the store may have a password, which is never written to a file.
    config = yaml.safe_dump({step.kind: prepared_config(step, folder)}).encode()
    command = [sys.executable, "-m", "distinit", step.kind, "--config", "/dev/stdin"]
    with open(log, "ab") as output:
        code = subprocess.run(
            command,
            stdout=output,
            stderr=output,
            input=config,
            env=_environment(),
            # On SIGTERM the command writes a checkpoint, from which the next run continues.
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        ).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise DistInitError(f"{lines[-1] if lines else 'no output'} (status {code}; {log})")
    return time.monotonic() - started


def _environment() -> dict[str, str]:
    """Return the environment of a command, with the GPU of its worker if the worker has one."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or (gpu := gpu_of_worker()) is None:
        return dict(os.environ)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
