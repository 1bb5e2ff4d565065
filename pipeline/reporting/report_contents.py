"""The content of a report: numbers, tables and figures, computed once for all output formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.tables import Table, columns
from ..targets.picks import PickRule
from .ablation_results import Ablation
from .ablation_tables import EXPLAINED
from .accuracy_tables import (
    DASH,
    Difference,
    accuracy_table,
    difference_table,
    differences,
    explained_percent,
    teacher_table,
    uncertainty_notes,
)
from .example_videos import MAX_VIDEOS, ExampleVideos, Strip
from .figures.accuracy_figures import CLASS_GAINS
from .figures.all_figures import draw_figures
from .figures.canvas import Figure
from .figures.entropy import read_stores
from .figures.features import FEATURES, MIN_VIDEOS
from .mistakes import ClassChanges, Mistakes, find_changes, find_mistakes
from .run_pairs import Pair, largest_gain, named_pair, rows_of_runs
from .runs import Run
from .teacher_baselines import TeacherProbe, probe_teachers

# Up to so many differences are described by a sentence each, more by a table.
SENTENCES = 6


@dataclass(frozen=True)
class Report:
    """The content of a report.

    Attributes:
        runs: All runs.
        accuracy: Table of the finetuned runs that belong to no ablation.
        differences: Paired differences of these runs.
        findings: Sentences about these differences and about the size of the test sets.
        students: Table of the students, None without one.
        teachers: Table of linear probes of the targets that students were trained on, None without
            a probe.
        costs: Table of costs, None before a run has finished an epoch.
        probes: Probes of teachers on the data sets of the runs.
        ablations: The ablations.
        mistakes: Wrong test videos of each evaluated run.
        changes: The classes that differ between a run and its base.
        strips: Pictures of the videos in `mistakes` and `changes`.
        figures: The figures.
        stores: Identity of each store that a student was trained from, by path.
        notes: Contents that could not be shown, with the reasons.
    """

    runs: Sequence[Run]
    accuracy: Table
    differences: Sequence[Difference]
    findings: Sequence[str]
    teachers: Table | None
    students: Table | None
    costs: Table | None
    probes: Sequence[TeacherProbe]
    ablations: Sequence[Ablation]
    mistakes: Sequence[Mistakes]
    changes: Sequence[ClassChanges]
    strips: Sequence[Strip]
    figures: Sequence[Figure]
    stores: Mapping[str, dict[str, Any]]
    notes: Sequence[str]

    @property
    def comparisons(self) -> Table | None:
        """Table of the differences, None if they are at most SENTENCES."""
        many = len(self.differences) > SENTENCES
        return difference_table(self.differences) if many else None

    @property
    def sentences(self) -> Sequence[str]:
        """The findings that are not in `comparisons`."""
        return self.findings[len(self.differences) * (self.comparisons is not None) :]

    @property
    def finetuned(self) -> list[Run]:
        """The finetuned runs that belong to no ablation."""
        return outside_ablations(self.runs, self.ablations)


def outside_ablations(runs: Sequence[Run], ablations: Sequence[Ablation]) -> list[Run]:
    """Return the finetuned runs that belong to no ablation."""
    folders = {
        (ablation.folder / cell.record.finetune).resolve()
        for ablation in ablations
        for cell in ablation.cells
    }
    return [run for run in runs if run.kind == "finetune" and run.path not in folders]


def make_report(
    runs: Sequence[Run],
    ablations: Sequence[Ablation] = (),
    *,
    kinetics: str | None = None,
    pair: tuple[str, str] | None = None,
    open_urls: bool = False,
    examples: int = 8,
    root: str | None = None,
    features: Sequence[str] = (),
) -> Report:
    """Recompute every number from the predictions of the runs, and draw the figures.

    Args:
        runs: All runs.
        ablations: The ablations.
        kinetics: A file of R(2+1)D weights to compare with the filters of a student.
        pair: Names of the runs or rows of Figures 5 and 7, by default those of the largest gain.
        open_urls: Whether to read stores at URLs that are recorded in runs.
        examples: Number of wrong test videos to show per run; with 0 no video is opened.
        root: Folder of the test videos now, by default the one in which they were tested.
        features: Files of features of training videos, for Figure 5.

    Raises:
        WeightsError: `kinetics` cannot be read.
        SourceError: A file of features cannot be read.
        UsageError: `kinetics` has other weights, `pair` names no runs, or `features` are not of
            training videos.
    """
    chosen_pair = named_pair(pair, runs, ablations) if pair is not None else None
    finetuned = outside_ablations(runs, ablations)
    students = [run for run in runs if run.kind == "student"]
    compared = differences(finetuned)
    stores = read_stores(runs, open_urls=open_urls)
    probes = probe_teachers(
        [run for run in runs if run.kind == "finetune"],
        [path for path, store in stores.items() if store.teachers is not None],
    )
    figures = draw_figures(
        runs, ablations, finetuned, compared, stores, kinetics, chosen_pair, features
    )
    videos = ExampleVideos(root, MAX_VIDEOS if examples else 0)
    changes = find_changes(_pairs(runs, ablations, compared, chosen_pair), videos)
    mistakes = find_mistakes(runs, videos, examples)
    notes = [f"store {path}: {store.problem}" for path, store in stores.items() if store.problem]
    return Report(
        runs=runs,
        accuracy=accuracy_table(finetuned, students, _probes_of(finetuned, probes)),
        differences=compared,
        findings=uncertainty_notes(finetuned, compared),
        teachers=teacher_table(probes),
        students=student_table(runs),
        costs=cost_table(runs),
        probes=probes,
        ablations=ablations,
        mistakes=mistakes,
        changes=changes,
        strips=videos.strips,
        figures=figures,
        stores={
            path: store.identity for path, store in stores.items() if store.teachers is not None
        },
        notes=notes + (_not_drawn(chosen_pair, figures) if chosen_pair is not None else []),
    )


def _probes_of(runs: Sequence[Run], probes: Sequence[TeacherProbe]) -> list[TeacherProbe]:
    """Return the probes on the data sets and splits of these runs."""
    splits = {(str(run.config.get("dataset")), run.split) for run in runs}
    return [probe for probe in probes if (probe.dataset, probe.split) in splits]


def _pairs(
    runs: Sequence[Run],
    ablations: Sequence[Ablation],
    compared: Sequence[Difference],
    chosen_pair: Pair | None,
) -> list[Pair]:
    """Return the pairs whose classes are compared: that of Figure 7 first, then all differences."""
    first = chosen_pair or largest_gain(runs, rows_of_runs(ablations))
    pairs = ([] if first is None else [first]) + [
        (difference.run, difference.base) for difference in compared
    ]
    return list({(run.path, base.path): (run, base) for run, base in pairs}.values())


def _not_drawn(pair: Pair, figures: Sequence[Figure]) -> list[str]:
    """Return a note for each figure of a pair that could not be drawn."""
    drawn = {figure.name for figure in figures}
    names = " and ".join(run.name for run in pair)
    reasons = {
        FEATURES: f"Figure 5 of {names}: fewer than {MIN_VIDEOS} test videos with features in both",
        CLASS_GAINS: f"Figure 7 of {names}: no class differs",
    }
    return [reason for name, reason in reasons.items() if name not in drawn]


def student_table(runs: Sequence[Run]) -> Table | None:
    """Tabulate the students, one row each, or return None without a student."""
    students = [run for run in runs if run.kind == "student"]
    if not students:
        return None
    titles = ["run", "student", "teachers", ">steps", ">loss of last epoch", ">explained, %"]
    titles += ["measured on", ">clips/s"]
    table = Table("Distillation from cached targets", columns(*titles))
    for run in students:
        if not run.finished:
            table.add(run.name, _architecture(run), *["missing"] * 6)
            continue
        epoch, rates = run.last("epoch"), run.curve("clips_per_s").y
        table.add(
            run.name,
            _architecture(run),
            ", ".join(run.heads),
            str(epoch.get("step", DASH)),
            f"{epoch['loss']:.3f}" if epoch.get("loss") is not None else DASH,
            explained_percent(run),
            _explained_on(run),
            f"{np.median(rates):.1f}" if len(rates) else DASH,
        )
    table.notes = [EXPLAINED]
    return table


def _explained_on(run: Run) -> str:
    """Return the clips that the explained fraction is measured on."""
    if run.explained_fraction is None:
        return DASH
    return "held-out clips" if run.result.get("explained_by") == "held-out" else "training clips"


def _architecture(run: Run) -> str:
    student = run.config.get("student") or {}
    words = [str(student.get("architecture", "–"))]
    if student.get("variant") == "vmz":
        words.append("vmz")
    if student.get("width", 1.0) != 1.0:
        words.append(f"width {student['width']}")
    return ", ".join(words)


def cost_table(runs: Sequence[Run]) -> Table | None:
    """Tabulate the costs of runs with a finished epoch, or return None without one."""
    runs = [run for run in runs if run.clips]
    if not runs:
        return None
    titles = ("run", ">hours", ">clips", ">clips/s", ">teacher forwards saved")
    table = Table("Costs", columns(*titles))
    for run in runs:
        speed = run.result.get("clips_per_second")
        saved = forwards_saved(run)
        table.add(
            run.name,
            DASH if run.hours is None else f"{run.hours:.3f}",
            f"{run.clips:,}",
            f"{speed:.1f}" if isinstance(speed, int | float) else DASH,
            f"{saved:,}" if saved else DASH,
        )
    hours = sum(run.hours or 0 for run in runs)
    saved = sum(map(forwards_saved, runs))
    table.add("all", f"{hours:.3f}", f"{sum(run.clips for run in runs):,}", DASH, f"{saved:,}")
    table.notes = [
        "hours: duration of the training, without the test after finetuning; for a resumed run, that of its last part. "
        "teacher forwards saved: clips × picked frames × teachers. Their logits were read from the store instead of "
        "being computed; clips that the entropy filter rejected are not counted."
    ]
    return table


def forwards_saved(run: Run) -> int:
    """Return the frames × teachers whose logits a student's training read from the store."""
    if run.kind != "student" or not run.heads:
        return 0
    rule = PickRule.parse(str((run.config.get("targets") or {}).get("picks", "random")))
    return run.clips * rule.n * len(run.heads)
