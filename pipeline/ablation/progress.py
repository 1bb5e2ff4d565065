"""The state of the steps of an ablation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from ..common.documents import read_bytes
from ..common.errors import SourceError
from ..common.files import write_whole
from ..common.run_dir import CELLS, SECONDS
from .plan import Cell, Plan
from .steps import Step

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
