"""Run ablations: a grid of trainings and finetunings over one store, which is only read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..pipeline.ablation.ablate_options import AblateConfig
from ..pipeline.ablation.cost import show_cost
from ..pipeline.ablation.execution import CellSteps, Progress, derives_schedules, run_on_workers
from ..pipeline.ablation.plan import list_cells, read_plan
from ..pipeline.ablation.steps import Step, StepMaker, step_options
from ..pipeline.common.config import write_config
from ..pipeline.common.console import Console
from ..pipeline.common.errors import DistInitError, TrainingInterrupted, UsageError
from ..pipeline.common.locks import folder_lock
from ..pipeline.common.run_dir import CELLS, CONFIG, SECONDS, check_output_dir
from ..pipeline.common.urls import check_local
from ..pipeline.store.reader import TargetStore, check_video_roots
from ..pipeline.training.training_time import LONG_CLIPS
from .finetune import finetune
from .train_student import train_student

COMMANDS: dict[str, Callable[[Any, Console], dict[str, Any]]] = {
    "train-student": train_student,
    "finetune": finetune,
}


def ablate(config: AblateConfig, console: Console) -> dict[str, Any]:
    """Run the unfinished cells of a plan.

    Returns:
        The folder, and a record per cell.

    Raises:
        UsageError: The plan or a config is invalid.
        StoreError: The store is damaged.
        LabelsError: A data set cannot be used.
        DistInitError: A cell failed; raised after all other cells have run.
    """
    check_local(config.out)
    plan = read_plan(config.plan, config.base)
    datasets = config.datasets or plan.datasets
    if not datasets:
        raise UsageError("--dataset: required, since the plan has no data set")
    store = TargetStore.open(config.store)
    check_video_roots(store, config.video_roots)
    out = Path(os.path.abspath(config.out))
    derived = derives_schedules(out)
    roots = {name: os.path.abspath(folder) for name, folder in config.video_roots.items()}
    maker = StepMaker(store, roots, derive=derived)
    cell_steps = []
    for cell in list_cells(
        plan,
        datasets=datasets,
        seeds=config.seeds or plan.seeds,
        splits=config.splits or plan.splits,
    ):
        student = maker.student(cell) if cell.needs_student else None
        cell_steps.append(CellSteps(cell, student, maker.finetuning(cell, student)))
    check_output_dir(out, "ablate", (CELLS, SECONDS))
    progress = Progress(out, plan, cell_steps, derived=derived)
    steps = list(dict.fromkeys(step for each in cell_steps for step in each.steps))
    open_steps = [step for step in steps if step.result(out) is None]
    console.info(
        f"{plan.title}: {len(cell_steps)} cells of {len(steps)} runs, {len(steps) - len(open_steps)} of them finished"
    )
    num_clips = sum(step.clips for step in open_steps)
    is_long = num_clips >= LONG_CLIPS or config.max_hours is not None
    if config.dry_run or (open_steps and is_long):
        costs = show_cost(
            progress.records(),
            [each.steps for each in cell_steps],
            out,
            progress.seconds,
            config.max_hours,
            cells=config.dry_run,
        )
        if config.dry_run:
            return costs
    with folder_lock(out):
        write_config(out / CONFIG, "ablate", config)
        progress.write()
        if config.workers is not None or config.scheduler is not None:
            run_on_workers(config.workers, config.scheduler, open_steps, progress)
        else:
            _run_steps(open_steps, progress, console)
        progress.write()
    return _summary(progress, out, console)


def _run_steps(steps: list[Step], progress: Progress, console: Console) -> None:
    """Run the steps one after another in this process."""
    for number, step in enumerate(steps, 1):
        if step.student_key in progress.failed:
            progress.failed[step.key] = progress.failed[step.student_key]
            continue
        console.info(f"[{number}/{len(steps)}] {step.kind} {step.folder}")
        started = time.monotonic()
        try:
            COMMANDS[step.kind](step_options(step, progress.out), console)
        except TrainingInterrupted:
            raise
        # Whatever the error is, the other steps run.
        except Exception as error:
            progress.failed[step.key] = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
            console.warn(f"{step.folder} failed: {progress.failed[step.key]}")
        finally:
            progress.add_seconds(step, time.monotonic() - started)
            progress.write()


def _summary(progress: Progress, out: Path, console: Console) -> dict[str, Any]:
    records = progress.records()
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        first = failed[0]
        raise DistInitError(
            f"{len(failed)} of {len(records)} cells failed, all others are done; the same command retries them; the "
            f"first failure is {first['row']}, {first['dataset']}, seed {first['seed']}: {first['reason']}"
        )
    console.info(
        f"{len(records)} cells are done; `distinit report {out} --out report` shows their results"
    )
    return {"out": str(out), "cells": records}
