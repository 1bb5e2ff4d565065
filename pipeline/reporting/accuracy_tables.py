"""Tables of accuracies, paired differences, and notes on the uncertainty of a small test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.tables import Table, columns
from ..evaluation.listing import short_dataset
from ..evaluation.metrics import (
    MEASURES,
    Estimate,
    brackets,
    estimate_difference,
    signed,
    signed_brackets,
    video_values,
)
from ..evaluation.predictions import Predictions
from .runs import Run
from .teacher_baselines import TeacherProbe

DASH = "–"
BASELINES = "Baselines without a student: linear probe of a teacher’s cached targets"


@dataclass(frozen=True)
class Difference:
    """Top 1 of `run` minus that of `base` on the same videos, as a fraction."""

    run: Run
    base: Run
    videos: int
    estimate: Estimate

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.estimate.low > 0 or self.estimate.high < 0

    def sentence(self) -> str:
        """Describe the difference for a report."""
        estimate = self.estimate
        verdict = (
            "which does not contain 0: on these videos the order is clear, for two runs with one seed each"
            if self.excludes_zero
            else "which contains 0: these videos do not show which of the two is better"
        )
        return (
            f"{self.run.name} − {self.base.name}: {signed(estimate.value)} points of top 1 on the same {self.videos} "
            f"test videos, 95 % interval {signed_brackets(estimate.low, estimate.high)}, {verdict}."
        )


def percent(estimate: dict[str, float] | Estimate) -> str:
    """Format an estimate in per cent, `54.3 [37.1, 71.4]`."""
    if not isinstance(estimate, Estimate):
        estimate = Estimate(**estimate)
    return f"{100 * estimate.value:.1f} {brackets(estimate.low, estimate.high)}"


def accuracy_table(
    runs: Sequence[Run],
    students: Sequence[Run] = (),
    probes: Sequence[TeacherProbe] = (),
) -> Table:
    """Tabulate one row per finetuned run; runs without an evaluation are shown as missing.

    Args:
        runs: The finetuned runs.
        students: Students; the explained fraction of the one that a run starts from is shown.
        probes: Probes of teachers, one row per probe below the runs.
    """
    explained = {str(run.path): run for run in students if run.explained_fraction is not None}
    has_explained = any(str(run.config.get("init")) in explained for run in runs)
    titles = ["run", "init"] + [">init explained, %"] * has_explained
    titles += ["data set", ">split", ">test videos", *(f">{name}" for name in MEASURES.values())]
    table = Table("Accuracy, % [95 % interval]", columns(*titles))
    for run in runs:
        metrics, student = run.metrics, explained.get(str(run.config.get("init")))
        row = [run.name, run.init] + [explained_percent(student)] * has_explained
        row += [run.dataset, run.split]
        if metrics is None:
            table.add(*row, *["missing"] * (1 + len(MEASURES)))
            continue
        counts = ((run.num_unreadable, "unreadable"), (run.test_videos_seen, "seen"))
        count_text = ", ".join(f"{count} {word}" for count, word in counts if count)
        cells = [
            DASH if name == "top5" and _few_classes(run) else percent(metrics[name])
            for name in MEASURES
        ]
        table.add(*row, f"{metrics['videos']}{f' ({count_text})' if count_text else ''}", *cells)
    if probes:
        table.head(BASELINES)
    for probe in probes:
        cells = [percent(probe.accuracy) if name == "top1" else DASH for name in MEASURES]
        row = [probe.name, "linear probe"] + [DASH] * has_explained
        row += [short_dataset(probe.dataset), probe.split, str(probe.num_videos)]
        table.add(*row, *cells)
    table.notes = _table_notes(runs)
    if any(run.test_videos_seen for run in runs):
        table.notes.append(
            "seen: test videos that the student a run starts from was trained on, without their labels; its "
            "accuracies are not those of unseen videos."
        )
    if has_explained:
        table.notes.append("init explained: explained fraction of the student, see its table.")
    return table


def teacher_table(probes: Sequence[TeacherProbe]) -> Table | None:
    """Tabulate the probes of teachers, or return None without a probe."""
    if not probes:
        return None
    table = Table(
        "Linear probe of the teachers’ cached targets, % [95 % interval]",
        columns("teacher", "output", "data set", ">split", ">test videos", ">top 1"),
        notes=[
            "A logistic regression on each teacher’s targets averaged over a video, trained and tested "
            "on the videos of the split that are in the store. It measures the targets themselves, "
            "without any student (distinit targets probe)."
        ],
    )
    for probe in probes:
        table.add(
            probe.teacher,
            probe.output,
            short_dataset(probe.dataset),
            probe.split,
            str(probe.num_videos),
            percent(probe.accuracy),
        )
    return table


def explained_percent(student: Run | None) -> str:
    """Format the explained fraction of a student in per cent, a dash for none."""
    if student is None or student.explained_fraction is None:
        return DASH
    fraction = student.explained_fraction
    return f"{100 * fraction:.0f}" if fraction >= 0 else "below 0"


def screen_tables(runs: Sequence[Run]) -> list[Table]:
    """Tabulate accuracies for a terminal of 80 columns.

    Each set of test videos has its own table, and only top 1 has an interval.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        size = f", {run.metrics['videos']} test videos" if run.metrics else ""
        groups.setdefault(f"{run.dataset}, split {run.split}{size}", []).append(run)
    tables = []
    for title, group in groups.items():
        measures = (f">{MEASURES[name]}" for name in ("per_clip", "top5", "class_mean"))
        table = Table(title, columns("run", "init", ">top 1, % [95 %]", *measures))
        for run in group:
            metrics = run.metrics
            if metrics is None:
                table.add(run.name, run.init, *["missing"] * 4)
                continue
            top5 = DASH if _few_classes(run) else f"{100 * metrics['top5']['value']:.1f}"
            table.add(
                run.name,
                run.init,
                percent(metrics["top1"]),
                f"{100 * metrics['per_clip']['value']:.1f}",
                top5,
                f"{100 * metrics['class_mean']['value']:.1f}",
            )
        table.notes = _table_notes(group)
        for run in group:
            if run.num_unreadable:
                table.notes.append(f"{run.name}: {run.num_unreadable} unreadable test videos.")
            if num_seen := run.test_videos_seen:
                table.notes.append(
                    f"{run.name}: {num_seen} of its test videos were seen by the student that it starts from; its "
                    "accuracies are not those of unseen videos."
                )
        tables.append(table)
    return tables


def _few_classes(run: Run) -> bool:
    return run.predictions is not None and len(run.predictions.classes) <= 5


def _table_notes(runs: Sequence[Run]) -> list[str]:
    evaluated = [run for run in runs if run.metrics]
    notes = []
    if any(run.metrics is None for run in runs):
        notes.append("missing: the run is not finished, or was not evaluated.")
    if any(run.num_unreadable for run in evaluated):
        notes.append("unreadable: test videos that count as wrong in every number.")
    if any(_few_classes(run) for run in evaluated):
        notes.append(f"{DASH}: with five classes or fewer, top 5 is always correct.")
    if evaluated:
        chances = sorted({len(run.predictions.classes) for run in evaluated if run.predictions})
        guesses = ", ".join(f"{100 / k:.1f} % with {k} classes" for k in chances)
        notes.append(f"Guessing among equally frequent classes scores {guesses}.")
    return notes + _look_notes(evaluated)


def _look_notes(runs: Sequence[Run]) -> list[str]:
    """Return a note for each test split: how often these runs were tested on it."""
    notes = []
    for dataset, split in dict.fromkeys((run.dataset, run.split) for run in runs):
        tested = [run for run in runs if (run.dataset, run.split) == (dataset, split)]
        looks = sum(run.test_looks for run in tested)
        num_unvalidated = sum(not run.chosen_on_validation for run in tested)
        caveat = (
            f"; {num_unvalidated} of {len(tested)} runs have no validation side: an option that is chosen by "
            "comparing them is chosen on the test split"
            if num_unvalidated > 1
            else ""
        )
        times = "once" if looks == 1 else f"{looks} times"
        notes.append(f"The test split {split} of {dataset} was looked at {times}{caveat}.")
    return notes


def accuracy_numbers(runs: Sequence[Run]) -> Table:
    """Tabulate fractions for a CSV, with the ends of intervals; missing cells are empty."""
    titles = ["run", "path", "init", "dataset", "split", "classes", "test_videos"]
    titles += ["unreadable_videos"]
    titles += [name + end for name in MEASURES for end in ("", "_low", "_high")]
    table = Table("accuracy", columns(*titles))
    for run in runs:
        row = [run.name, str(run.path), run.init, str(run.config.get("dataset", "")), run.split]
        if run.metrics is None or run.predictions is None:
            table.add(*row, *[""] * (len(titles) - len(row)))
            continue
        row += [
            str(len(run.predictions.classes)),
            str(run.metrics["videos"]),
            str(run.num_unreadable),
        ]
        cells = [
            repr(run.metrics[name][end]) for name in MEASURES for end in ("value", "low", "high")
        ]
        table.add(*row, *cells)
    return table


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Compare each run with the base of its group, paired by video, see `comparable`."""
    return [
        Difference(run, base, len(predictions.videos), _difference(predictions, base_predictions))
        for base, group in comparable(runs)
        for run in group
        if run is not base
        and (predictions := run.predictions)
        and (base_predictions := base.predictions)
    ]


def comparable(runs: Sequence[Run]) -> list[tuple[Run, list[Run]]]:
    """Group evaluated runs by equal test videos and labels.

    Returns:
        (base, runs) per group; the base is the first run from scratch, else the first run.
    """
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if (predictions := run.predictions) is not None:
            names = [predictions.classes[k] for k in predictions.labels]
            labels = dict(zip(predictions.videos, names, strict=True))
            groups.setdefault(tuple(sorted(labels.items())), []).append(run)
    return [
        (next((run for run in group if run.init == "scratch"), group[0]), group)
        for group in groups.values()
    ]


def _difference(predictions: Predictions, base: Predictions) -> Estimate:
    """Return top 1 of `p` minus that of `base`, paired by video."""
    top1, base_top1 = (
        dict(zip(each.videos, video_values(each.clip_scores, each.labels)["top1"], strict=True))
        for each in (predictions, base)
    )
    videos = sorted(top1)
    values, base_values = (
        np.array([by_video[video] for video in videos]) for by_video in (top1, base_top1)
    )
    if predictions.groups is None:
        return estimate_difference(values, base_values)
    source = dict(zip(predictions.videos, predictions.sources, strict=True))
    groups = np.unique([source[video] for video in videos], return_inverse=True)[1]
    return estimate_difference(values, base_values, groups)


def difference_table(compared: Sequence[Difference]) -> Table:
    """Tabulate paired differences that are too many for a sentence each."""
    table = Table(
        "Paired differences in top 1, points [95 % interval]",
        columns("run", "compared with", ">test videos", ">difference", "these videos show"),
        notes=["An order shown here is that of two runs with one seed each."],
    )
    for difference in compared:
        estimate = difference.estimate
        verdict = (
            ("that it is better" if estimate.value > 0 else "that it is worse")
            if difference.excludes_zero
            else "no order"
        )
        interval = f"{signed(estimate.value)} {signed_brackets(estimate.low, estimate.high)}"
        table.add(
            difference.run.name, difference.base.name, str(difference.videos), interval, verdict
        )
    return table


def uncertainty_notes(runs: Sequence[Run], compared: Sequence[Difference]) -> list[str]:
    """Describe the differences, and the resolution of test sets of these sizes."""
    lines = [difference.sentence() for difference in compared]
    sizes = sorted({run.metrics["videos"] for run in runs if run.metrics})
    for num_videos in sizes:
        metrics = [
            run.metrics for run in runs if run.metrics and run.metrics["videos"] == num_videos
        ]
        widths = [_width(each["top1"]) for each in metrics]
        by_source = all(each["intervals"]["resampled"] == "sources" for each in metrics)
        caveat = (
            "training; clips of one recording are resampled together."
            if by_source
            else "training, and is too narrow if several videos show the same scene."
        )
        lines.append(
            f"With {num_videos} test videos one video is worth {100 / num_videos:.1f} points, and the 95 % interval "
            f"of top 1 is {100 * max(widths):.0f} points wide. It covers only the choice of test videos, not the "
            f"seed of the {caveat}"
        )
    return lines


def _width(estimate: dict[str, float]) -> float:
    return estimate["high"] - estimate["low"]
