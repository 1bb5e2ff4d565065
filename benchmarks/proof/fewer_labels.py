"""Measure whether DistInit's gain grows with fewer labels, from saved predictions.

    python benchmarks/proof/fewer_labels.py SHARE=FILE.csv[,FILE.csv] ...

A measure (all labels, a tenth of them, …) is a csv of predictions/ with rows DistInit and scratch,
or two csvs with one of them each; seeds that both have are compared. The tables show accuracies,
gains in points and as ratios, and how the gain of each measure differs from that of the first one.
Intervals are 95 %, from one bootstrap over sources, so that measures on the same videos stay
paired.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import folds
import numpy as np
import tables
from measuring import table
from real_videos import DISTINIT, SCRATCH

from distinit.pipeline.evaluation.metrics import bootstrap_ratios, by_group


def main() -> None:
    measures = {
        name: files.split(",") for name, _, files in (word.partition("=") for word in sys.argv[1:])
    }
    if not measures or not all(all(files) for files in measures.values()):
        raise SystemExit("each argument is SHARE=FILE.csv or SHARE=FILE.csv,FILE.csv")
    print(compare({name: pair([Path(file) for file in files]) for name, files in measures.items()}))


def pair(files: list[Path]) -> tuple[folds.Pooled, folds.Pooled]:
    """Return the rows of DistInit and scratch with the seeds that both have."""
    files_rows = [folds.read_predictions(file) for file in files]
    each = [
        next((rows[name] for rows in files_rows if name in rows), None)
        for name in (DISTINIT, SCRATCH)
    ]
    if each[0] is None or each[1] is None:
        raise SystemExit(f"{', '.join(map(str, files))}: no rows {DISTINIT} and {SCRATCH}")
    seeds = [seed for seed in each[0].seeds if seed in each[1].seeds]
    distinit_row, scratch_row = (of_seeds(row, seeds) for row in each if row is not None)
    return distinit_row, scratch_row


def of_seeds(row: folds.Pooled, seeds: Sequence[int]) -> folds.Pooled:
    """Select the runs of some seeds."""
    predicted = row.predicted[[row.seeds.index(seed) for seed in seeds]]
    return folds.Pooled(predicted, row.labels, row.videos, row.groups, list(seeds))


def compare(measures: dict[str, tuple[folds.Pooled, folds.Pooled]]) -> str:
    """Tabulate the measures, and the differences of their gains from the first one."""
    first = next(iter(measures.values()))[0]
    for name, each in measures.items():
        if any(p.videos != first.videos for p in each):
            raise SystemExit(f"{name}: its videos are not those of {next(iter(measures))}")
    right = np.stack([p.right.mean(axis=0) for each in measures.values() for p in each], axis=1)
    # Sources are resampled; each measure has two columns, DistInit and scratch.
    above, below = by_group(right, first.groups), by_group(np.ones_like(right), first.groups)
    resampled = bootstrap_ratios(above, below)
    # The first row is not resampled.
    values = np.concatenate([right.mean(axis=0)[None], resampled])
    distinit_values, scratch_values = values[:, ::2], values[:, 1::2]
    gains, times = distinit_values - scratch_values, distinit_values / scratch_values
    lines, changes = [], []
    for k, (name, each) in enumerate(measures.items()):
        cells = [
            _percent(distinit_values[:, k]),
            _percent(scratch_values[:, k]),
            _percent(gains[:, k], sign=True),
            _ratio(times[:, k]),
        ]
        lines.append([name, *cells, ", ".join(map(str, each[0].seeds))])
        if k:
            change = _percent(gains[:, k] - gains[:, 0], sign=True)
            changes.append([name, change, _ratio(times[:, k] / times[:, 0])])
    text = table(["measure", DISTINIT, SCRATCH, "gain", "times", "seeds"], lines)
    head = ["measure", f"its gain less that of {next(iter(measures))}", "its times by that"]
    return text + (f"\n\n{table(head, changes)}" if changes else "")


def _percent(values: np.ndarray, *, sign: bool = False) -> str:
    return tables.percent((values[0], *np.quantile(values[1:], (0.025, 0.975))), sign=sign)


def _ratio(values: np.ndarray) -> str:
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    main()
