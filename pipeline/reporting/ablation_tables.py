"""Tables of an ablation: a row per variant, with the paper's number and the gain over the first."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..common.tables import Table, columns
from ..evaluation.labels import canonical
from ..evaluation.listing import short_dataset
from ..evaluation.metrics import MEASURES, signed, signed_brackets
from .ablation_results import Ablation, Entry
from .accuracy_tables import BASELINES, DASH
from .teacher_baselines import TeacherProbe

# The order of the paper; split 1 and the mean of splits as in its Table 6.
PAPER_ORDER = ("per_clip", "split1", "top1", "top5")
EXPLAINED = (
    "explained: how far a student’s loss fell from that of the best constant predictor (0) to the lower bound, the "
    "mean entropy of the targets (100); measured on held-out clips if a run has some. Below 5, a student has learned "
    "next to nothing, whatever its accuracy."
)
LEAST_EXPLAINED = 0.05
NOTES = (
    "mean ± standard deviation over the finished runs of a row (seeds and splits, n − 1); runs: finished of planned.",
    "difference: top 1 minus that of the first row, in points, paired by test video, with its 95 % bootstrap interval "
    "over test videos (over recordings if the data set names them); the value of a video is its mean over seeds. The "
    "interval covers the choice of test videos, the ± the seeds. p: two-sided, of no difference, not corrected for "
    "the number of rows.",
)


def ablation_tables(ablation: Ablation, probes: Sequence[TeacherProbe] = ()) -> list[Table]:
    """Tabulate an ablation, one table per data set with a row per variant.

    The paper's number is to the right of each measure. Teachers that were probed on every split and
    published results are below our rows.
    """
    return [_table(ablation, dataset, probes) for dataset in ablation.datasets]


def _table(ablation: Ablation, dataset: str, probes: Sequence[TeacherProbe]) -> Table:
    entries = [entry for entry in ablation.entries if entry.dataset == dataset]
    measures = [
        name
        for name in PAPER_ORDER
        if name != "split1" or (len(ablation.splits) > 1 and 1 in ablation.splits)
    ]
    published = ablation.published(dataset)
    matching = [
        (result, numbers) for result, numbers in published if numbers.keys() & set(measures)
    ]
    paper_measures = {
        name
        for numbers in (*(e.paper for e in entries), *(n for _, n in matching))
        for name in numbers
    }
    has_explained = any(len(entry.explained) for entry in entries)
    titles = ["row"]
    for name in measures:
        titles += [f">{_heading(name, ablation.splits)}, %"] + [">paper"] * (name in paper_measures)
    titles += [">explained, %"] * has_explained + [">runs", ">difference", ">p"]
    table = Table(f"{ablation.title}: {short_dataset(dataset)}", columns(*titles))
    for entry in entries:
        cells = [entry.row]
        for name in measures:
            cells += [spread(entry.values[name])] + [_percent(entry.paper.get(name))] * (
                name in paper_measures
            )
        cells += [spread(entry.explained) if len(entry.explained) else DASH] * has_explained
        table.add(
            *cells, _num_runs(entry), *_gain_cells(entry, is_first=entry.row == ablation.rows[0])
        )
    for i, (name, values) in enumerate(_baselines(ablation, dataset, probes).items()):
        if i == 0:
            table.head(BASELINES)
        cells = [name]
        for measure in measures:
            cells += [spread(values[measure]) if measure in values else DASH]
            cells += [""] * (measure in paper_measures)
        table.add(*cells, *[DASH] * has_explained, "", "", "")
    for heading, has_source in (
        ("Published results, as the paper lists them", False),
        ("Published results, from elsewhere", True),
    ):
        for i, (result, numbers) in enumerate(
            [each for each in matching if (each[0].source is not None) == has_source]
        ):
            if i == 0:
                table.head(heading)
            cells = [result.label]
            for name in measures:
                cells += [""] + [_percent(numbers.get(name))] * (name in paper_measures)
            table.add(*cells, *[""] * has_explained, "", "", "")
    table.notes = [EXPLAINED] * has_explained + _notes(
        ablation, dataset, paper_measures, len(published) - len(matching)
    )
    return table


def _baselines(
    ablation: Ablation, dataset: str, probes: Sequence[TeacherProbe]
) -> dict[str, dict[str, np.ndarray]]:
    """Return top 1 of each teacher that was probed on every split, and that of split 1, by name."""
    tops: dict[str, dict[int, float]] = {}
    for probe in probes:
        if canonical(probe.dataset) == canonical(dataset):
            tops.setdefault(probe.name, {})[int(probe.split)] = probe.accuracy.value
    return {
        name: {"top1": np.array([top[split] for split in ablation.splits])}
        | ({"split1": np.array([top[1]])} if 1 in top else {})
        for name, top in tops.items()
        if top.keys() >= set(ablation.splits)
    }


def _heading(measure: str, splits: Sequence[int]) -> str:
    if measure == "top1" and len(splits) > 1:
        first, last = splits[0], splits[-1]
        # The splits are ascending and distinct.
        consecutive = last - first == len(splits) - 1
        return f"top 1, splits {f'{first}–{last}' if consecutive else ', '.join(map(str, splits))}"
    return "top 1, split 1" if measure == "split1" else MEASURES[measure]


def _notes(
    ablation: Ablation, dataset: str, paper_measures: Collection[str], num_hidden: int
) -> list[str]:
    notes = [*NOTES]
    if paper_measures and ablation.paper is not None:
        notes.append(
            f"paper: %, as in its {_table_name(ablation.paper.table)}, for these splits; other data, machines "
            "and seeds."
        )
    if num_hidden:
        notes.append(f"{num_hidden} published results are of other splits and not shown.")
    return notes + problems(ablation, dataset)


def _table_name(table: str) -> str:
    """Return `Table 2` for `2`, and other names such as `section 4.3` unchanged."""
    return f"Table {table}" if table.isdecimal() else table


def screen_table(ablation: Ablation) -> Table:
    """Tabulate top 1, runs, paper and difference of all data sets, for a terminal of 80 columns."""
    entries = ablation.entries
    paper = any("top1" in entry.paper for entry in entries)
    titles = ["row"] + ["data set"] * (len(ablation.datasets) > 1)
    titles += [">top 1, %", ">runs"] + [">paper"] * paper + [">difference", ">p"]
    table = Table(ablation.title, columns(*titles))
    for entry in entries:
        cells = [entry.row] + [short_dataset(entry.dataset)] * (len(ablation.datasets) > 1)
        cells += [spread(entry.values["top1"]), _num_runs(entry)] + [
            _percent(entry.paper.get("top1"))
        ] * paper
        table.add(*cells, *_gain_cells(entry, is_first=entry.row == ablation.rows[0]))
    table.notes = [line for dataset in ablation.datasets for line in problems(ablation, dataset)]
    table.notes += _weak_students(entries)
    return table


def _weak_students(entries: Sequence[Entry]) -> list[str]:
    """Return a line for each row whose students have learned next to nothing."""
    fractions = {
        entry.row: entry.explained.mean()
        for entry in entries
        if len(entry.explained) and entry.explained.mean() < LEAST_EXPLAINED
    }
    return [
        f"{row}: its students have learned next to nothing ({100 * fraction:.0f} %)."
        for row, fraction in fractions.items()
    ]


def ablation_numbers(ablation: Ablation) -> Table:
    """Tabulate fractions for a CSV: a line per row and data set, then the published results.

    Missing cells are empty.
    """
    names = ("top1", "per_clip", "top5", "split1")
    statistics = [f"{name}_{statistic}" for name in names for statistic in ("mean", "deviation")]
    paper_columns = [f"paper_{name}" for name in names]
    gain_columns = ["difference", "difference_low", "difference_high", "p"]
    titles = ["row", "dataset", "source", "runs", "planned", "explained_fraction"]
    table = Table(
        ablation.title, columns(*titles, *statistics, *paper_columns, *gain_columns, "problems")
    )

    def paper(numbers: Mapping[str, float]) -> list[str]:
        return [repr(round(numbers[name] / 100, 6)) if name in numbers else "" for name in names]

    for entry in ablation.entries:
        means = []
        for name in names:
            values = entry.values[name]
            means.append(repr(float(values.mean())) if len(values) else "")
            means.append(repr(float(values.std(ddof=1))) if len(values) > 1 else "")
        gain = entry.gain
        gain_values = (
            [gain.estimate.value, gain.estimate.low, gain.estimate.high, gain.p] if gain else []
        )
        table.add(
            *(entry.row, entry.dataset, "ours", str(entry.num_done), str(len(entry.cells))),
            repr(float(entry.explained.mean())) if len(entry.explained) else "",
            *means,
            *paper(entry.paper),
            *([repr(value) for value in gain_values] or [""] * len(gain_columns)),
            "; ".join(cell.problem for cell in entry.cells if cell.problem),
        )
    for dataset in ablation.datasets:
        for result, numbers in ablation.published(dataset):
            table.add(
                *(result.label, dataset, "published", "", "", ""),
                *[""] * len(statistics),
                *paper(numbers),
                *[""] * (len(gain_columns) + 1),
            )
    return table


def cells_table(ablation: Ablation) -> Table:
    """Tabulate every cell: its top 1, or the reason why it has none."""
    table = Table("Every run", columns("run", ">top 1, %", ">hours", "folder", ""))
    for cell in ablation.cells:
        record, metrics = cell.record, cell.metrics
        top1 = f"{100 * metrics['top1']['value']:.1f}" if metrics else "missing"
        hours = DASH if record.seconds is None else f"{record.seconds / 3600:.3f}"
        table.add(record.label, top1, hours, record.finetune, cell.problem or "")
    return table


def problems(ablation: Ablation, dataset: str) -> list[str]:
    """List the splits and seeds of cells without a number, a line per row and reason."""
    missing: dict[tuple[str, str], list[str]] = {}
    for cell in ablation.cells:
        record = cell.record
        if cell.problem is not None and record.dataset == dataset:
            missing.setdefault((record.row, cell.problem), []).append(
                f"split {record.split} seed {record.seed}"
            )
    return [
        f"{row}, {short_dataset(dataset)}, {', '.join(cells)}: {reason}"
        for (row, reason), cells in missing.items()
    ]


def spread(values: np.ndarray) -> str:
    """Format values in per cent, `43.2 ± 0.8`; only the mean for one run, "missing" for none."""
    if len(values) == 0:
        return "missing"
    mean = f"{100 * values.mean():.1f}"
    return f"{mean} ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else mean


def _percent(number: float | None) -> str:
    return DASH if number is None else f"{number:.1f}"


def _num_runs(entry: Entry) -> str:
    return str(entry.num_done) + (
        f" of {len(entry.cells)}" if entry.num_done < len(entry.cells) else ""
    )


def _gain_cells(entry: Entry, *, is_first: bool) -> list[str]:
    """Format the columns difference and p."""
    if is_first or entry.gain is None:
        return ["first row" if is_first else DASH, DASH]
    difference = entry.gain.estimate
    interval = signed_brackets(difference.low, difference.high)
    return [f"{signed(difference.value)} {interval}", p_text(entry.gain.p)]


def p_text(p: float) -> str:
    """Format a p-value, `0.043`, or `< 0.001` below the resolution of the resamples."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
