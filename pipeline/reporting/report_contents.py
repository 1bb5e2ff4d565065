"""What a report holds, before it becomes a page: numbers, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.tables import Column, Table
from .ablation_results import Ablation
from .ablation_tables import EXPLAINED
from .accuracy_tables import DASH, Difference, accuracy_table, differences, uncertainty_notes
from .costs import cost_table
from .figures.accuracy_figures import CLASS_GAINS
from .figures.all_figures import draw_figures
from .figures.canvas import Figure
from .figures.entropy import read_stores
from .figures.features import FEATURES, LEAST
from .run_pairs import Pair, named_pair
from .runs import Run
from .teacher_baselines import teacher_table


@dataclass(frozen=True)
class Report:
    """Everything that is shown, computed once for all forms.

    teachers: a linear probe of the targets that students learned from, where it can be made.
    stores: identity of each store that a student was trained from, by its path.
    notes: what could not be shown, and why.
    """

    runs: Sequence[Run]
    accuracy: Table
    differences: Sequence[Difference]
    findings: Sequence[str]
    teachers: Table | None
    students: Table | None
    costs: Table | None
    ablations: Sequence[Ablation]
    figures: Sequence[Figure]
    stores: Mapping[str, dict[str, Any]]
    notes: Sequence[str]

    @property
    def finetuned(self) -> list[Run]:
        """The finetuned runs that stand alone; those of an ablation's cells are in its table."""
        return alone(self.runs, self.ablations)


def alone(runs: Sequence[Run], ablations: Sequence[Ablation]) -> list[Run]:
    """The finetuned runs that belong to no ablation."""
    taken = {
        (ablation.folder / cell.record.finetune).resolve()
        for ablation in ablations
        for cell in ablation.cells
    }
    return [run for run in runs if run.kind == "finetune" and run.path not in taken]


def make_report(
    runs: Sequence[Run],
    ablations: Sequence[Ablation] = (),
    *,
    kinetics: str | None = None,
    pair: tuple[str, str] | None = None,
    open_urls: bool = False,
) -> Report:
    """Recomputes every number from the runs' predictions, and draws what there is to draw.

    kinetics: a file of R(2+1)D weights to set beside a student's filters. pair: names of the runs
    or rows that Figures 5 and 7 show, by default those of the largest gain. open_urls: read stores
    that a run says are behind URLs. Raises WeightsError, UsageError.
    """
    chosen = named_pair(pair, runs, ablations) if pair is not None else None
    finetuned = alone(runs, ablations)
    found = differences(finetuned)
    stores = read_stores(runs, open_urls=open_urls)
    figures = draw_figures(runs, ablations, finetuned, found, stores, kinetics, chosen)
    notes = [f"store {path}: {store.problem}" for path, store in stores.items() if store.problem]
    return Report(
        runs=runs,
        accuracy=accuracy_table(finetuned),
        differences=found,
        findings=uncertainty_notes(finetuned, found),
        teachers=teacher_table(
            finetuned, [path for path, store in stores.items() if store.surveys is not None]
        ),
        students=student_table(runs),
        costs=cost_table(runs),
        ablations=ablations,
        figures=figures,
        stores={
            path: store.identity for path, store in stores.items() if store.surveys is not None
        },
        notes=notes + (_not_drawn(chosen, figures) if chosen is not None else []),
    )


def _not_drawn(pair: Pair, figures: Sequence[Figure]) -> list[str]:
    """Why a figure of the chosen pair is not there."""
    drawn = {figure.name for figure in figures}
    names = " and ".join(run.name for run in pair)
    reasons = {
        FEATURES: f"Figure 5 of {names}: fewer than {LEAST} test videos with features in both",
        CLASS_GAINS: f"Figure 7 of {names}: no class differs",
    }
    return [reason for name, reason in reasons.items() if name not in drawn]


def student_table(runs: Sequence[Run]) -> Table | None:
    """One row a student run; None where there is none."""
    students = [run for run in runs if run.kind == "student"]
    if not students:
        return None
    columns = [Column("run"), Column("student"), Column("teachers"), Column("steps", True)]
    table = Table(
        "Distillation from cached targets",
        [
            *columns,
            Column("loss of last epoch", True),
            Column("explained, %", True),
            Column("clips/s", True),
        ],
    )
    for run in students:
        if not run.finished:
            table.add(run.name, _architecture(run), *["missing"] * 5)
            continue
        epoch, rates = run.last("epoch"), run.curve("clips_per_s").y
        table.add(
            run.name,
            _architecture(run),
            ", ".join(run.heads),
            str(epoch.get("step", DASH)),
            f"{epoch['loss']:.3f}" if epoch.get("loss") is not None else DASH,
            DASH
            if run.explained_fraction is None
            else f"{100 * run.explained_fraction:.0f}"
            if run.explained_fraction >= 0
            else "below 0",
            f"{np.median(rates):.1f}" if len(rates) else DASH,
        )
    table.notes = [EXPLAINED, *(line for run in students if (line := of_training(run)))]
    return table


def of_training(run: Run) -> str:
    """A line where a student's number is of the clips that it was trained on."""
    held_out = run.result.get("explained_by") == "held-out"
    return (
        ""
        if run.explained_fraction is None or held_out
        else f"{run.name}: explained is measured on its training clips."
    )


def _architecture(run: Run) -> str:
    student = run.config.get("student") or {}
    words = [str(student.get("architecture", "–"))]
    if student.get("variant") == "vmz":
        words.append("vmz")
    if student.get("width", 1.0) != 1.0:
        words.append(f"width {student['width']}")
    return ", ".join(words)
