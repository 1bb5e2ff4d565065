"""Tables of an ablation: a row per variant, the paper's number next to ours, and the difference
to the first row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..common.tables import Column, Table
from ..evaluation.listing import short_dataset
from ..evaluation.metrics import MEASURES, signed
from .ablation_results import Ablation, Entry
from .accuracy_tables import DASH

# The order of the paper; split 1 and the mean of splits as in its Table 6.
PAPER_ORDER = ("per_clip", "split1", "top1", "top5")
EXPLAINED = (
    "explained: how far a student’s loss came from that of the best constant predictor (0) to the lower bound, the "
    "mean entropy of the targets (100); on held-out clips if a run has some. Below 5 a student has learned next to "
    "nothing, whatever its accuracy."
)
LEAST_EXPLAINED = 0.05
NOTES = (
    "mean ± standard deviation over the finished runs of a row (seeds and splits, n − 1); runs: finished of planned.",
    "difference: top 1 minus that of the first row, in points, paired by test video, with its 95 % bootstrap interval "
    "over test videos (over recordings where a data set names them); a video’s value is its mean over seeds. The "
    "interval is of the choice of test videos; the spread over seeds is the ±. p: two-sided, of no difference, not "
    "corrected for the number of rows.",
)


def ablation_tables(ablation: Ablation) -> list[Table]:
    """One a data set: a row a variant, each measure with the paper's number to its right, and below
    our rows the results that the paper lists as published."""
    return [_table(ablation, dataset) for dataset in ablation.datasets]


def _table(ablation: Ablation, dataset: str) -> Table:
    entries = [entry for entry in ablation.entries if entry.dataset == dataset]
    shown = [
        name
        for name in PAPER_ORDER
        if name != "split1" or (len(ablation.splits) > 1 and 1 in ablation.splits)
    ]
    listed = ablation.published(dataset)
    published = [(label, numbers) for label, numbers in listed if numbers.keys() & set(shown)]
    known = {
        name
        for numbers in (*(e.paper for e in entries), *(n for _, n in published))
        for name in numbers
    }
    columns = [Column("row")]
    for name in shown:
        columns += [Column(f"{_heading(name, ablation.splits)}, %", True)]
        columns += [Column("paper", True)] * (name in known)
    explained = any(len(entry.explained) for entry in entries)
    columns += [Column("explained, %", True)] * explained
    columns += [Column("runs", True), Column("difference", True), Column("p", True)]
    table = Table(f"{ablation.title}: {short_dataset(dataset)}", columns)
    for entry in entries:
        cells = [entry.row]
        for name in shown:
            cells += [spread(entry.values[name])] + [_percent(entry.paper.get(name))] * (
                name in known
            )
        cells += [spread(entry.explained) if len(entry.explained) else DASH] * explained
        table.add(*cells, _runs(entry), *_gain(entry, first=entry.row == ablation.rows[0]))
    if published:
        table.head("Published results, as the paper lists them")
    for label, numbers in published:
        cells = [label]
        for name in shown:
            cells += [""] + [_percent(numbers.get(name))] * (name in known)
        table.add(*cells, *[""] * explained, "", "", "")
    table.notes = [EXPLAINED] * explained + _notes(
        ablation, dataset, known, len(listed) - len(published)
    )
    return table


def _heading(measure: str, splits: Sequence[int]) -> str:
    if measure == "top1" and len(splits) > 1:
        first, last = splits[0], splits[-1]
        whole = last - first == len(splits) - 1  # they are ascending, each once
        return f"top 1, splits {f'{first}–{last}' if whole else ', '.join(map(str, splits))}"
    return "top 1, split 1" if measure == "split1" else MEASURES[measure]


def _notes(ablation: Ablation, dataset: str, known: Collection[str], left_out: int) -> list[str]:
    notes = [*NOTES]
    if known and ablation.paper is not None:
        notes.append(
            f"paper: %, as in its {_named(ablation.paper.table)}, for these splits; other data, machines and seeds."
        )
    if left_out:
        notes.append(f"{left_out} results that the paper lists are of other splits and not shown.")
    return notes + problems(ablation, dataset)


def _named(table: str) -> str:
    """`2` → `Table 2`; `section 4.3` as it is."""
    return f"Table {table}" if table.isdecimal() else table


def screen_table(ablation: Ablation) -> Table:
    """The same for a terminal of 80 columns: top 1, runs, paper, difference; a table's data sets
    below each other."""
    entries = ablation.entries
    paper = any("top1" in entry.paper for entry in entries)
    columns = [Column("row")] + [Column("data set")] * (len(ablation.datasets) > 1)
    columns += [Column("top 1, %", True), Column("runs", True)] + [Column("paper", True)] * paper
    table = Table(ablation.title, [*columns, Column("difference", True), Column("p", True)])
    for entry in entries:
        cells = [entry.row] + [short_dataset(entry.dataset)] * (len(ablation.datasets) > 1)
        cells += [spread(entry.values["top1"]), _runs(entry)] + [
            _percent(entry.paper.get("top1"))
        ] * paper
        table.add(*cells, *_gain(entry, first=entry.row == ablation.rows[0]))
    table.notes = [line for dataset in ablation.datasets for line in problems(ablation, dataset)]
    table.notes += _weak_students(entries)
    return table


def _weak_students(entries: Sequence[Entry]) -> list[str]:
    """Return a line for each row whose students have learned next to nothing."""
    low = {
        e.row: e.explained.mean()
        for e in entries
        if len(e.explained) and e.explained.mean() < LEAST_EXPLAINED
    }
    return [
        f"{row}: its students have learned next to nothing ({100 * mean:.0f} %)."
        for row, mean in low.items()
    ]


def ablation_numbers(ablation: Ablation) -> Table:
    """Plain numbers for a CSV, a row and data set a line, then the published results: fractions,
    the paper's as well; empty where missing."""
    names = ("top1", "per_clip", "top5", "split1")
    ours = [f"{name}_{what}" for name in names for what in ("mean", "deviation")]
    theirs = [f"paper_{name}" for name in names]
    ends = ["difference", "difference_low", "difference_high", "p"]
    columns = [
        "row",
        "dataset",
        "source",
        "runs",
        "planned",
        "explained_fraction",
        *ours,
        *theirs,
        *ends,
        "problems",
    ]
    table = Table(ablation.title, [Column(name) for name in columns])

    def paper(numbers: Mapping[str, float]) -> list[str]:
        return [repr(round(numbers[name] / 100, 6)) if name in numbers else "" for name in names]

    for entry in ablation.entries:
        means = []
        for name in names:
            values = entry.values[name]
            means.append(repr(float(values.mean())) if len(values) else "")
            means.append(repr(float(values.std(ddof=1))) if len(values) > 1 else "")
        gain = entry.gain
        tail = [gain.estimate.value, gain.estimate.low, gain.estimate.high, gain.p] if gain else []
        table.add(
            *(entry.row, entry.dataset, "ours", str(entry.done), str(len(entry.cells))),
            repr(float(entry.explained.mean())) if len(entry.explained) else "",
            *means,
            *paper(entry.paper),
            *([repr(value) for value in tail] or [""] * len(ends)),
            "; ".join(cell.problem for cell in entry.cells if cell.problem),
        )
    for dataset in ablation.datasets:
        for label, numbers in ablation.published(dataset):
            table.add(
                *(label, dataset, "published", "", "", ""),
                *[""] * len(ours),
                *paper(numbers),
                *[""] * (len(ends) + 1),
            )
    return table


def cells_table(ablation: Ablation) -> Table:
    """Every cell: its own top 1, or why it has none."""
    columns = [
        Column("run"),
        Column("top 1, %", True),
        Column("hours", True),
        Column("folder"),
        Column(""),
    ]
    table = Table("Every run", columns)
    for cell in ablation.cells:
        record, metrics = cell.record, cell.run.metrics if cell.run is not None else None
        top1 = (
            f"{100 * metrics['top1']['value']:.1f}"
            if cell.problem is None and metrics
            else "missing"
        )
        hours = DASH if record.seconds is None else f"{record.seconds / 3600:.3f}"
        table.add(record.label, top1, hours, record.finetune, cell.problem or "")
    return table


def problems(ablation: Ablation, dataset: str) -> list[str]:
    """One line for each row and reason for which cells of a data set have no number, with their
    splits and seeds."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in ablation.cells:
        record = cell.record
        if cell.problem is not None and record.dataset == dataset:
            found.setdefault((record.row, cell.problem), []).append(
                f"split {record.split} seed {record.seed}"
            )
    return [
        f"{row}, {short_dataset(dataset)}, {', '.join(cells)}: {why}"
        for (row, why), cells in found.items()
    ]


def spread(values: np.ndarray) -> str:
    """`43.2 ± 0.8`, in per cent; the mean alone of one run; missing of none."""
    if len(values) == 0:
        return "missing"
    mean = f"{100 * values.mean():.1f}"
    return f"{mean} ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else mean


def _percent(number: float | None) -> str:
    return DASH if number is None else f"{number:.1f}"


def _runs(entry: Entry) -> str:
    return str(entry.done) + (f" of {len(entry.cells)}" if entry.done < len(entry.cells) else "")


def _gain(entry: Entry, *, first: bool) -> list[str]:
    """The columns difference and p."""
    if first or entry.gain is None:
        return ["first row" if first else DASH, DASH]
    e = entry.gain.estimate
    return [f"{signed(e.value)} [{signed(e.low)} to {signed(e.high)}]", p_text(entry.gain.p)]


def p_text(p: float) -> str:
    """`0.043`, and `< 0.001` below what the resamples can tell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
