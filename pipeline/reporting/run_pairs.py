"""Choose the two runs of Figures 5 and 7: the named ones, or those of the largest gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.errors import UsageError
from .ablation_results import Ablation
from .accuracy_tables import comparable
from .runs import Run

Pair = tuple[Run, Run]
# Names that an error lists.
MAX_NAMES = 20


def rows_of_runs(ablations: Sequence[Ablation]) -> dict[Path, str]:
    """Return the row of each run of a cell, by its folder."""
    cells = [cell for ablation in ablations for cell in ablation.cells]
    return {cell.run.path: cell.record.row for cell in cells if cell.run is not None}


def largest_gain(runs: Sequence[Run], rows: Mapping[Path, str]) -> Pair | None:
    """Return the run with the largest gain over its base, and the base.

    Args:
        runs: The runs.
        rows: Run folder → row of an ablation. Runs of one row, or of one initialisation without a
            row, differ only in their seeds and are not compared.

    Returns:
        None if no two runs can be compared.
    """

    def setting(run: Run) -> str:
        return rows.get(run.path, run.init)

    pairs = [
        (run.metrics["top1"]["value"] - base.metrics["top1"]["value"], run, base)
        for base, group in comparable(runs)
        for run in group
        if setting(run) != setting(base) and run.metrics and base.metrics
    ]
    best = max(pairs, key=lambda pair: pair[0], default=None)
    return best[1:] if best else None


def named_pair(names: tuple[str, str], runs: Sequence[Run], ablations: Sequence[Ablation]) -> Pair:
    """Return two runs by name.

    The name of an ablation's row means all of its finished runs. The first two runs that were
    tested on the same videos with the same labels are returned, if possible with equal seeds.

    Raises:
        UsageError: A name is unknown, or the runs cannot be compared.
    """
    first, second = (_runs_named(name, runs, ablations) for name in names)
    groups = {
        run.path: number for number, (_, group) in enumerate(comparable(runs)) for run in group
    }
    pairs = [
        (a, b)
        for a in first
        for b in second
        if a.path != b.path and groups[a.path] == groups[b.path]
    ]
    pair = min(pairs, key=lambda pair: _setting(pair[0]) != _setting(pair[1]), default=None)
    if pair is None:
        a, b = (repr(name) for name in names)
        raise UsageError(
            f"--pair {a} {b}: no two runs of these names were tested on the same videos and labels"
        )
    return pair


def _setting(run: Run) -> tuple[str, str, object]:
    return run.dataset, run.split, (run.config.get("loop") or {}).get("seed")


def _runs_named(name: str, runs: Sequence[Run], ablations: Sequence[Ablation]) -> list[Run]:
    """Return the tested runs with this name, or those of the row with this name."""
    finetuned = [run for run in runs if run.kind == "finetune"]
    rows: dict[str, list[Run]] = {}
    for ablation in ablations:
        for cell in ablation.cells:
            rows.setdefault(cell.record.row, []).extend([cell.run] if cell.run is not None else [])
    named = [run for run in finetuned if run.name == name] or rows.get(name)
    if named is None:
        names = list(dict.fromkeys([*rows, *(run.name for run in finetuned)]))
        listed = "; ".join(names[:MAX_NAMES]) + (
            f"; and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        )
        raise UsageError(
            f"--pair {name!r}: expected a finetuned run or a row: {listed or 'none exists'}"
        )
    tested = [run for run in named if run.predictions is not None]
    if not tested:
        raise UsageError(f"--pair {name!r}: has no finished predictions")
    return tested
