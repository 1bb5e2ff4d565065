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
    def decided(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.estimate.low > 0 or self.estimate.high < 0

    def sentence(self) -> str:
        """Describe the difference for a report."""
        e = self.estimate
        verdict = (
            "which does not contain 0: on these videos the order is clear, for two runs with one seed each"
            if self.decided
            else "which contains 0: these videos do not show which of the two is better"
        )
        return (
            f"{self.run.name} − {self.base.name}: {signed(e.value)} points of top 1 on the same {self.videos} test "
            f"videos, 95 % interval {signed_brackets(e.low, e.high)}, {verdict}."
        )


def percent(estimate: dict[str, float] | Estimate) -> str:
    """Format an estimate in per cent, `54.3 [37.1, 71.4]`."""
    e = estimate if isinstance(estimate, Estimate) else Estimate(**estimate)
    return f"{100 * e.value:.1f} {brackets(e.low, e.high)}"


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
        m, student = run.metrics, explained.get(str(run.config.get("init")))
        head = [run.name, run.init] + [explained_percent(student)] * has_explained
        head += [run.dataset, run.split]
        if m is None:
            table.add(*head, *["missing"] * (1 + len(MEASURES)))
            continue
        counts = ((run.num_unreadable, "unreadable"), (run.test_videos_seen, "seen"))
        asides = ", ".join(f"{count} {word}" for count, word in counts if count)
        cells = [
            DASH if name == "top5" and _few_classes(run) else percent(m[name]) for name in MEASURES
        ]
        table.add(*head, f"{m['videos']}{f' ({asides})' if asides else ''}", *cells)
    if probes:
        table.head(BASELINES)
    for probe in probes:
        cells = [percent(probe.accuracy) if name == "top1" else DASH for name in MEASURES]
        head = [probe.name, "linear probe"] + [DASH] * has_explained
        head += [short_dataset(probe.dataset), probe.split, str(probe.num_videos)]
        table.add(*head, *cells)
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
    """Tabulate probes of teachers with what they are; None without one."""
    if not probes:
        return None
    table = Table(
        "Linear probe of the teachers’ cached targets, % [95 % interval]",
        columns("teacher", "output", "data set", ">split", ">test videos", ">top 1"),
        notes=[
            "A logistic regression on each teacher’s targets averaged over a video, trained and tested "
            "on the videos of the split that are in the store: what the targets hold, without any "
            "student (distinit targets probe)."
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
    """Tabulate the same for a terminal of 80 columns.

    There is a table for each set of test videos, and only top 1 has its interval.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        size = f", {run.metrics['videos']} test videos" if run.metrics else ""
        groups.setdefault(f"{run.dataset}, split {run.split}{size}", []).append(run)
    tables = []
    for title, group in groups.items():
        others = (f">{MEASURES[name]}" for name in ("per_clip", "top5", "class_mean"))
        table = Table(title, columns("run", "init", ">top 1, % [95 %]", *others))
        for run in group:
            m = run.metrics
            if m is None:
                table.add(run.name, run.init, *["missing"] * 4)
                continue
            top5 = DASH if _few_classes(run) else f"{100 * m['top5']['value']:.1f}"
            rest = [
                f"{100 * m['per_clip']['value']:.1f}",
                top5,
                f"{100 * m['class_mean']['value']:.1f}",
            ]
            table.add(run.name, run.init, percent(m["top1"]), *rest)
        table.notes = _table_notes(group)
        for run in group:
            if run.num_unreadable:
                table.notes.append(f"{run.name}: {run.num_unreadable} unreadable test videos.")
            if seen := run.test_videos_seen:
                table.notes.append(
                    f"{run.name}: {seen} of its test videos were seen by the student that it starts from; its "
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
    return notes + _choice_notes(evaluated)


def _choice_notes(runs: Sequence[Run]) -> list[str]:
    """Return how often each test split was looked at by these runs."""
    notes = []
    for dataset, split in dict.fromkeys((run.dataset, run.split) for run in runs):
        tested = [run for run in runs if (run.dataset, run.split) == (dataset, split)]
        looks = sum(run.test_looks for run in tested)
        blind = sum(not run.chosen_on_validation for run in tested)
        by = (
            f"; {blind} of {len(tested)} runs have no validation side: an option that is chosen by "
            "comparing them is chosen on the test split"
            if blind > 1
            else ""
        )
        times = "once" if looks == 1 else f"{looks} times"
        notes.append(f"The test split {split} of {dataset} was looked at {times}{by}.")
    return notes


def accuracy_numbers(runs: Sequence[Run]) -> Table:
    """Tabulate fractions for a CSV, with the ends of intervals; missing cells are empty."""
    titles = ["run", "path", "init", "dataset", "split", "classes", "test_videos"]
    titles += ["unreadable_videos"]
    titles += [name + end for name in MEASURES for end in ("", "_low", "_high")]
    table = Table("accuracy", columns(*titles))
    for run in runs:
        head = [run.name, str(run.path), run.init, str(run.config.get("dataset", "")), run.split]
        if run.metrics is None or run.predictions is None:
            table.add(*head, *[""] * (len(titles) - len(head)))
            continue
        head += [
            str(len(run.predictions.classes)),
            str(run.metrics["videos"]),
            str(run.num_unreadable),
        ]
        cells = [
            repr(run.metrics[name][end]) for name in MEASURES for end in ("value", "low", "high")
        ]
        table.add(*head, *cells)
    return table


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Compare each run with the base of its group, paired by video, see `comparable`."""
    return [
        Difference(run, base, len(p.videos), _difference(p, base_p))
        for base, group in comparable(runs)
        for run in group
        if run is not base and (p := run.predictions) and (base_p := base.predictions)
    ]


def comparable(runs: Sequence[Run]) -> list[tuple[Run, list[Run]]]:
    """Group evaluated runs by equal test videos and labels.

    Returns:
        (base, runs) per group; the base is the first run from scratch, else the first run.
    """
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if (p := run.predictions) is not None:
            labels = {video: p.classes[k] for video, k in zip(p.videos, p.labels, strict=True)}
            groups.setdefault(tuple(sorted(labels.items())), []).append(run)
    return [
        (next((run for run in group if run.init == "scratch"), group[0]), group)
        for group in groups.values()
    ]


def _difference(p: Predictions, base: Predictions) -> Estimate:
    """Return top 1 of `p` minus that of `base`, paired by video."""
    top1, base_top1 = (
        dict(zip(each.videos, video_values(each.clip_scores, each.labels)["top1"], strict=True))
        for each in (p, base)
    )
    videos = sorted(top1)
    a, b = (np.array([values[video] for video in videos]) for values in (top1, base_top1))
    if p.groups is None:
        return estimate_difference(a, b)
    source = dict(zip(p.videos, p.sources, strict=True))
    groups = np.unique([source[video] for video in videos], return_inverse=True)[1]
    return estimate_difference(a, b, groups)


def difference_table(found: Sequence[Difference]) -> Table:
    """Tabulate paired differences, of which there are too many for sentences."""
    table = Table(
        "Paired differences in top 1, points [95 % interval]",
        columns("run", "compared with", ">test videos", ">difference", "these videos show"),
        notes=["An order that they show is that of two runs with one seed each."],
    )
    for each in found:
        e = each.estimate
        shown = (
            ("that it is better" if e.value > 0 else "that it is worse")
            if each.decided
            else "no order"
        )
        interval = f"{signed(e.value)} {signed_brackets(e.low, e.high)}"
        table.add(each.run.name, each.base.name, str(each.videos), interval, shown)
    return table


def uncertainty_notes(runs: Sequence[Run], differences: Sequence[Difference]) -> list[str]:
    """Describe what test sets of these sizes can show and what they cannot."""
    lines = [difference.sentence() for difference in differences]
    sizes = sorted({run.metrics["videos"] for run in runs if run.metrics})
    for n in sizes:
        tested = [run.metrics for run in runs if run.metrics and run.metrics["videos"] == n]
        widths = [_width(metrics["top1"]) for metrics in tested]
        by_source = all(metrics["intervals"]["resampled"] == "sources" for metrics in tested)
        caveat = (
            "training; clips of one recording are resampled together."
            if by_source
            else "training, and is too narrow if several videos show the same scene."
        )
        lines.append(
            f"With {n} test videos one video is worth {100 / n:.1f} points, and the 95 % interval of top 1 is "
            f"{100 * max(widths):.0f} points wide. It covers only the choice of test videos, not the seed of the "
            f"{caveat}"
        )
    return lines


def _width(estimate: dict[str, float]) -> float:
    return estimate["high"] - estimate["low"]
