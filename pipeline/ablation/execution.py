"""The state of the steps of an ablation, and how they run in parallel.

Dask schedules them, each is a separate command. A process per step releases its memory, that of a
GPU in particular, sees one GPU, and a crash fails only that step. It ends with its worker.
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
class Work:
    """A cell and its steps; `student` is None if the cell trains none."""

    cell: Cell
    student: Step | None
    finetuning: Step

    @property
    def steps(self) -> list[Step]:
        """The steps in the order in which they run."""
        return [step for step in (self.student, self.finetuning) if step is not None]


def derives_schedules(out: Path) -> bool:
    """Return whether schedules that plans leave open follow the number of videos in a folder.

    A folder of version 0.1 keeps the defaults that its finished runs have.
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
        work: Its cells and their steps.
        derived: Whether open schedules follow the number of videos, see `derives_schedules`.
    """

    def __init__(self, out: Path, plan: Plan, work: list[Work], *, derived: bool = True) -> None:
        self.out, self.plan, self.work, self.derived = out, plan, work, derived
        self.failed: dict[str, str] = {}
        try:
            self.seconds = TypeAdapter(dict[str, FiniteFloat]).validate_json(
                read_bytes(out / SECONDS) or b"{}"
            )
        except (SourceError, ValueError):
            self.seconds = {}

    def add_seconds(self, step: Step, seconds: float) -> None:
        """Add to the duration of a step; one that was interrupted has several parts."""
        self.seconds[step.key] = self.seconds.get(step.key, 0.0) + seconds
        write_whole(self.out / SECONDS, json.dumps(self.seconds, indent=1).encode())

    def records(self) -> list[dict[str, Any]]:
        """Return a record per cell, as described in docs/ablate.md."""
        return [self._record(work) for work in self.work]

    def write(self) -> None:
        """Write OUT/cells.json atomically."""
        paper = self.plan.paper
        # Cells may be of other splits than the plan.
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

    def _record(self, work: Work) -> dict[str, Any]:
        reason = next(
            (self.failed[step.key] for step in work.steps if step.key in self.failed), None
        )
        done = work.finetuning.result(self.out) is not None
        known = [self.seconds[step.key] for step in work.steps if step.key in self.seconds]
        return {
            "row": work.cell.row,
            "axes": work.cell.axes,
            "seed": work.cell.seed,
            "dataset": work.cell.dataset.partition("=")[0],
            "split": work.cell.split,
            "student": work.student.folder if work.student else None,
            "finetune": work.finetuning.folder,
            "status": "done" if done else "failed" if reason else "missing",
            "reason": None if done else reason,
            "seconds": round(sum(known), 1) if done and known else None,
        }


def run_on_workers(
    workers: int | None,
    scheduler: str | None,
    steps: list[Step],
    progress: Progress,
) -> None:
    """Run steps on a dask cluster, each after the student it needs, and record their progress."""
    from distributed import as_completed

    if not steps:
        return
    with cluster(workers, scheduler) as client:
        futures: dict[str, Any] = {}
        # Students are listed before the steps that need them.
        for step in steps:
            futures[step.key] = client.submit(
                run_as_command,
                step,
                str(progress.out),
                futures.get(step.needs or ""),
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


def run_as_command(step: Step, out: str, after: float | None) -> float:
    """Run one step as a command, in a worker.

    Args:
        step: The step.
        out: The folder of the ablation.
        after: Result of the student that the step needs, for which dask waits.

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
    """Return the environment with a GPU per worker of this machine, by the number in its name."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or (gpu := gpu_of_worker()) is None:
        return dict(os.environ)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
