"""Tables of an ablation: a row a variant, the paper's number beside ours, and what differs from the first row."""

from __future__ import annotations

import numpy as np

from .ablation import Ablation, Entry
from .accuracy import DASH, MEASURES, signed
from .runs import short_dataset
from .tables import Column, Table

NOTES = (
    "top 1, %: mean ± standard deviation over the finished runs of a row (seeds and splits, n − 1); runs: finished of "
    "planned.",
    "difference: top 1 minus that of the first row, in points, paired by test video, with its 95 % bootstrap interval "
    "over test videos (over recordings where a data set names them); a video’s value is its mean over seeds. The "
    "interval is of the choice of test videos; the spread over seeds is the ±. p: two-sided, of no difference, not "
    "corrected for the number of rows.",
)


def ablation_table(ablation: Ablation) -> Table:
    """One row a variant; of a single data set also accuracy per clip and top 5."""
    datasets = ablation.datasets
    entries = {(entry.row, entry.dataset): entry for entry in ablation.entries}
    paper = any(entry.paper is not None for entry in entries.values())
    more = [name for name in ("per_clip", "top5") if len(datasets) == 1]
    columns = [Column("row")]
    for dataset in datasets:
        columns += [Column(f"{short_dataset(dataset)}: top 1, %", True), Column("runs", True)]
        columns += [Column("paper", True)] * paper
        columns += [Column("difference", True), Column("p", True)]
    table = Table(ablation.title, [*columns, *(Column(f"{MEASURES[name]}, %", True) for name in more)])
    for row in ablation.rows:
        cells = [row]
        for dataset in datasets:
            cells += _cells(entries[row, dataset], paper, first=row == ablation.rows[0])
        only = entries[row, datasets[0]]
        table.add(*cells, *(spread(only.values[name]) for name in more))
    table.notes = [*NOTES]
    if paper and ablation.paper is not None:
        table.notes.append(f"paper: top 1, %, of its Table {ablation.paper.table}; other data, machines and seeds.")
    table.notes += problems(ablation)
    return table


def screen_table(ablation: Ablation) -> Table:
    """The same for a terminal of 80 columns: top 1, runs, paper, difference; a table's data sets below each other."""
    entries = ablation.entries
    paper = any(entry.paper is not None for entry in entries)
    columns = [Column("row")] + [Column("data set")] * (len(ablation.datasets) > 1)
    columns += [Column("top 1, %", True), Column("runs", True)] + [Column("paper", True)] * paper
    table = Table(ablation.title, [*columns, Column("difference", True), Column("p", True)])
    for entry in entries:
        head = [entry.row] + [short_dataset(entry.dataset)] * (len(ablation.datasets) > 1)
        table.add(*head, *_cells(entry, paper, first=entry.row == ablation.rows[0]))
    table.notes = problems(ablation)
    return table


def ablation_numbers(ablation: Ablation) -> Table:
    """Plain numbers for a CSV, a row and data set a line: fractions, the paper's as well; empty where missing."""
    names = [f"{name}_{what}" for name in ("top1", "per_clip", "top5") for what in ("mean", "deviation")]
    ends = ["difference", "difference_low", "difference_high", "p"]
    columns = ["row", "dataset", "runs", "planned", *names, "paper_top1", *ends, "problems"]
    table = Table(ablation.title, [Column(name) for name in columns])
    for entry in ablation.entries:
        numbers = []
        for name in ("top1", "per_clip", "top5"):
            values = entry.values[name]
            numbers.append(repr(float(values.mean())) if len(values) else "")
            numbers.append(repr(float(values.std(ddof=1))) if len(values) > 1 else "")
        gain = entry.gain
        tail = [gain.estimate.value, gain.estimate.low, gain.estimate.high, gain.p] if gain else []
        table.add(
            entry.row,
            entry.dataset,
            str(entry.done),
            str(len(entry.cells)),
            *numbers,
            "" if entry.paper is None else repr(round(entry.paper / 100, 6)),
            *([repr(value) for value in tail] or [""] * len(ends)),
            "; ".join(cell.problem for cell in entry.cells if cell.problem),
        )
    return table


def cells_table(ablation: Ablation) -> Table:
    """Every cell: its own top 1, or why it has none."""
    columns = [Column("run"), Column("top 1, %", True), Column("hours", True), Column("folder"), Column("")]
    table = Table("Every run", columns)
    for cell in ablation.cells:
        record, metrics = cell.record, cell.run.metrics if cell.run is not None else None
        top1 = f"{100 * metrics['top1']['value']:.1f}" if cell.problem is None and metrics else "missing"
        hours = DASH if record.seconds is None else f"{record.seconds / 3600:.3f}"
        table.add(record.label, top1, hours, record.finetune, cell.problem or "")
    return table


def problems(ablation: Ablation) -> list[str]:
    """One line for each row, data set and reason for which cells have no number, with their splits and seeds."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for cell in ablation.cells:
        if cell.problem is not None:
            record = cell.record
            place = record.row, short_dataset(record.dataset), cell.problem
            found.setdefault(place, []).append(f"split {record.split} seed {record.seed}")
    return [f"{row}, {dataset}, {', '.join(cells)}: {why}" for (row, dataset, why), cells in found.items()]


def spread(values: np.ndarray) -> str:
    """`43.2 ± 0.8`, in per cent; the mean alone of one run; missing of none."""
    if len(values) == 0:
        return "missing"
    mean = f"{100 * values.mean():.1f}"
    return f"{mean} ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else mean


def _cells(entry: Entry, paper: bool, *, first: bool) -> list[str]:
    found = [spread(entry.values["top1"]), str(entry.done)]
    if entry.done < len(entry.cells):
        found[1] += f" of {len(entry.cells)}"
    if paper:
        found.append(DASH if entry.paper is None else f"{entry.paper:.1f}")
    if first or entry.gain is None:
        return [*found, "first row" if first else DASH, DASH]
    e = entry.gain.estimate
    return [*found, f"{signed(e.value)} [{signed(e.low)} to {signed(e.high)}]", p_text(entry.gain.p)]


def p_text(p: float) -> str:
    """`0.043`, and `< 0.001` below what the resamples can tell."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
