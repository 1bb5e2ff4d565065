"""Ablations: a grid of stages two and three over one store. No teacher is loaded, the store is only read."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat, TypeAdapter, model_validator

from ..pipeline.ablation.cost import show_cost
from ..pipeline.ablation.plan import Cell, Plan, cells, read_plan
from ..pipeline.ablation.steps import Step, StepMaker, run_step
from ..pipeline.common.config import require_own, write_config
from ..pipeline.common.console import Screen
from ..pipeline.common.documents import read_bytes
from ..pipeline.common.errors import DistInitError, SourceError, TrainingInterrupted, UsageError
from ..pipeline.common.locks import folder_lock
from ..pipeline.common.settings import Options
from ..pipeline.common.urls import StoreAddress, check_local
from ..pipeline.store.reader import TargetStore, check_moved
from ..pipeline.training.checkpoint import write_atomically

CELLS, SECONDS = "cells.json", "seconds.json"


class AblateConfig(Options):
    """Everything `distinit ablate` can be told; what is left open is the plan's."""

    plan: str = Field(description="a YAML file, or the name of a plan that ships with the package")
    store: StoreAddress = Field(description="the target store")
    out: str = Field(description="the folder of all runs")
    datasets: list[str] | None = Field(default=None, description="csv:FILE, folder:DIR, hmdb51=DIR, …")
    splits: list[int] | None = None
    seeds: list[int] | None = None
    moved: dict[str, str] = Field(default_factory=dict, description="corpus: folder where it lies now")
    base: dict[str, dict[str, Any]] = Field(default_factory=dict, description="sections laid over the plan's base")
    workers: int | None = Field(default=None, ge=1, description="runs side by side, each a dask worker's")
    scheduler: str | None = Field(default=None, description="address of an existing dask scheduler")
    dry_run: bool = False

    @model_validator(mode="after")
    def _one_cluster(self) -> AblateConfig:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError("give --workers (a local cluster) or --scheduler (an existing one), not both")
        return self


@dataclass(frozen=True)
class Work:
    """A cell and its steps; `student` is None where stage three begins otherwise."""

    cell: Cell
    student: Step | None
    finetuning: Step

    @property
    def steps(self) -> list[Step]:
        """In the order in which they are done."""
        return [step for step in (self.student, self.finetuning) if step is not None]


class Progress:
    """What became of the steps: results lie in their folders, reasons of failures and seconds are kept here."""

    def __init__(self, out: Path, plan: Plan, work: list[Work]) -> None:
        self.out, self.plan, self.work = out, plan, work
        self.failed: dict[str, str] = {}
        try:
            self.seconds = TypeAdapter(dict[str, FiniteFloat]).validate_json(read_bytes(out / SECONDS) or b"{}")
        except (SourceError, ValueError):
            self.seconds = {}

    def took(self, step: Step, seconds: float) -> None:
        """Add to a step's seconds: one that was interrupted has several parts."""
        self.seconds[step.key] = self.seconds.get(step.key, 0.0) + seconds
        write_atomically(self.out / SECONDS, json.dumps(self.seconds, indent=1).encode())

    def records(self) -> list[dict[str, Any]]:
        """A record a cell, as docs/ablate.md has it."""
        return [self._record(work) for work in self.work]

    def write(self) -> None:
        """OUT/cells.json, whole or not at all."""
        paper = self.plan.paper
        if paper is not None and paper.splits is None:  # cells may be of others
            paper = paper.model_copy(update={"splits": self.plan.splits})
        content = {
            "title": self.plan.title,
            "paper": paper.model_dump(exclude_none=True) if paper else None,
            "axes": list(self.plan.axes),
            "cells": self.records(),
        }
        write_atomically(self.out / CELLS, json.dumps(content, indent=1).encode())

    def _record(self, work: Work) -> dict[str, Any]:
        reason = next((self.failed[step.key] for step in work.steps if step.key in self.failed), None)
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


def ablate(config: AblateConfig, screen: Screen) -> dict[str, Any]:
    """Runs the cells of a plan that are not done, and says what became of each. What is done is left alone.

    Raises UsageError (the plan, a config that does not hold), StoreError, LabelsError; DistInitError at the end if a
    cell failed, after all others.
    """
    check_local(config.out)
    plan = read_plan(config.plan, config.base)
    datasets = config.datasets or plan.datasets
    if not datasets:
        raise UsageError("the plan names no data set: give --dataset")
    store = TargetStore.open(config.store)
    check_moved(store, config.moved)
    maker = StepMaker(store, {name: os.path.abspath(folder) for name, folder in config.moved.items()})
    work = []
    for cell in cells(plan, datasets=datasets, seeds=config.seeds or plan.seeds, splits=config.splits or plan.splits):
        student = maker.student(cell) if cell.needs_student else None
        work.append(Work(cell, student, maker.finetuning(cell, student)))
    out = Path(os.path.abspath(config.out))
    require_own(out, "ablate", (CELLS, SECONDS))
    progress = Progress(out, plan, work)
    steps = list(dict.fromkeys(step for each in work for step in each.steps))
    open_steps = [step for step in steps if step.result(out) is None]
    screen.say(
        f"{plan.title}: {len(work)} cells of {len(steps)} runs, {len(steps) - len(open_steps)} of these done already"
    )
    if config.dry_run:
        return show_cost(progress.records(), [each.steps for each in work], out, progress.seconds, screen)
    with folder_lock(out):
        write_config(out / "config.yaml", "ablate", config)
        progress.write()
        if config.workers is not None or config.scheduler is not None:
            from ..pipeline.ablation.execution import run_on_workers

            run_on_workers(config.workers, config.scheduler, open_steps, progress, screen)
        else:
            _run_here(open_steps, progress, screen)
        progress.write()
    return _summary(progress, out, screen)


def _run_here(steps: list[Step], progress: Progress, screen: Screen) -> None:
    """One step after the other in this process."""
    for number, step in enumerate(steps, 1):
        if step.needs in progress.failed:
            progress.failed[step.key] = progress.failed[step.needs]
            continue
        screen.say(f"[{number}/{len(steps)}] {step.kind} {step.folder}")
        began = time.monotonic()
        try:
            run_step(step, progress.out, screen)
        except TrainingInterrupted:
            raise
        except Exception as error:  # whatever a step meets, the others go on
            progress.failed[step.key] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            screen.warn(f"{step.folder} failed: {progress.failed[step.key]}")
        finally:
            progress.took(step, time.monotonic() - began)
            progress.write()


def _summary(progress: Progress, out: Path, screen: Screen) -> dict[str, Any]:
    records = progress.records()
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        first = failed[0]
        raise DistInitError(
            f"{len(failed)} of {len(records)} cells failed, all others are done; the same command tries them again; "
            f"the first, {first['row']}, {first['dataset']}, seed {first['seed']}: {first['reason']}"
        )
    screen.say(f"{len(records)} cells are done; `distinit report {out} --out report` makes tables of them")
    return {"out": str(out), "cells": records}
