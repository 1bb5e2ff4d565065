"""Which two runs the figures of a pair show (Figures 5 and 7): those that are named, else the
largest gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.errors import UsageError
from .ablation_results import Ablation
from .accuracy_tables import comparable
from .runs import Run

Pair = tuple[Run, Run]
NAMED = 20  # names that an error lists, at most


def largest_gain(runs: Sequence[Run], alike: Mapping[Path, str]) -> Pair | None:
    """The run that gains most over its base, and the base; None where no two runs can be compared.

    alike: what runs share, by folder, that differ in their seeds alone; by default it is their
        start.
    """

    def kind(run: Run) -> str:
        return alike.get(run.path, run.init)

    pairs = [
        (run.metrics["top1"]["value"] - base.metrics["top1"]["value"], run, base)
        for base, group in comparable(runs)
        for run in group
        if kind(run) != kind(base) and run.metrics and base.metrics
    ]
    best = max(pairs, key=lambda pair: pair[0], default=None)
    return best[1:] if best else None


def named_pair(names: tuple[str, str], runs: Sequence[Run], ablations: Sequence[Ablation]) -> Pair:
    """The runs of these names; a row of an ablation stands for its finished runs, of which the
    first two are taken that were tested on the same videos with the same labels, of equal seeds if
    there are such.

    Raises UsageError, one line: a name that is none, runs that cannot be compared.
    """
    first, second = (_of(name, runs, ablations) for name in names)
    groups = {
        run.path: number for number, (_, group) in enumerate(comparable(runs)) for run in group
    }
    pairs = [
        (a, b)
        for a in first
        for b in second
        if a.path != b.path and groups[a.path] == groups[b.path]
    ]
    found = min(pairs, key=lambda pair: _place(pair[0]) != _place(pair[1]), default=None)
    if found is None:
        a, b = (repr(name) for name in names)
        raise UsageError(
            f"--pair {a} {b}: no two runs of these names were tested on the same videos and labels"
        )
    return found


def _place(run: Run) -> tuple[str, str, object]:
    return run.dataset, run.split, (run.config.get("loop") or {}).get("seed")


def _of(name: str, runs: Sequence[Run], ablations: Sequence[Ablation]) -> list[Run]:
    """The tested runs that a name stands for."""
    tuned = [run for run in runs if run.kind == "finetune"]
    rows: dict[str, list[Run]] = {}
    for ablation in ablations:
        for cell in ablation.cells:
            rows.setdefault(cell.record.row, []).extend([cell.run] if cell.run is not None else [])
    named = [run for run in tuned if run.name == name] or rows.get(name)
    if named is None:
        known = list(dict.fromkeys([*rows, *(run.name for run in tuned)]))
        shown = "; ".join(known[:NAMED]) + (
            f"; and {len(known) - NAMED} more" if len(known) > NAMED else ""
        )
        raise UsageError(
            f"--pair {name!r}: no finetuned run and no row of that name; there are: {shown or 'none'}"
        )
    tested = [run for run in named if run.predictions is not None]
    if not tested:
        raise UsageError(f"--pair {name!r}: has no finished predictions")
    return tested
