"""What the runs cost, and what they did not: forward passes of teachers whose answers were read
from the store."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.tables import Column, Table
from ..targets.picks import PickRule
from .accuracy_tables import DASH
from .runs import Run


def cost_table(runs: Sequence[Run]) -> Table | None:
    """One row a run with a finished epoch, and the sums; None where there is none."""
    runs = [run for run in runs if run.clips]
    if not runs:
        return None
    columns = [Column("run"), Column("hours", True), Column("clips", True), Column("clips/s", True)]
    table = Table("Costs", [*columns, Column("teacher forwards saved", True)])
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
        "hours: of training, without the test after finetuning; of a resumed run its last part. teacher forwards "
        "saved: clips × picked frames × teachers, each an image that a teacher would have had to be run on and whose "
        "logits were read from the store; clips that the entropy filter drew and dropped are not counted."
    ]
    return table


def forwards_saved(run: Run) -> int:
    """Frames × teachers whose logits a student's training has read from the store; 0 of a finetuned
    run."""
    if run.kind != "student" or not run.heads:
        return 0
    rule = PickRule.parse(str((run.config.get("targets") or {}).get("picks", "random")))
    return run.clips * rule.n * len(run.heads)
