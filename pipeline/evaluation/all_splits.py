"""`--split all`: one run a split, in RUN/split1, RUN/split2, …, and their mean in
RUN/result.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.console import Console
from ..common.errors import UsageError
from ..common.run_dir import CONFIG, recorded_sections
from ..common.tables import Column, Table
from .metrics import MEASURES
from .protocol import write_result
from .splits import mean_over_splits

ALL = "all"


def split_folder(run: Path, split: int) -> Path:
    """Where the run of one split lies."""
    return run / f"split{split}"


def split_folders(run: Path) -> dict[int, Path]:
    """Return the runs of a folder that `finetune --split all` wrote, by split; empty for any other.

    Raises:
        UsageError: One of them is a link that leads out of the folder.
    """
    paths = {
        int(m[1]): path
        for path in run.glob("split*")
        if (m := re.fullmatch(r"split(\d+)", path.name))
    }
    found = {
        split: paths[split] for split in sorted(paths) if recorded_sections(paths[split] / CONFIG)
    }
    for path in found.values():
        if not path.resolve().is_relative_to(run.resolve()):
            raise UsageError(
                f"{path}: a link to {path.resolve()}, outside of {run}; expected the folder itself"
            )
    return found


def summarise_splits(
    out: Path, results: Mapping[int, dict[str, Any]], title: str, console: Console
) -> dict[str, Any]:
    """Writes the mean and deviation of the splits' metrics into `out`/result.json; shows and
    returns them."""
    means = mean_over_splits([result["metrics"] for result in results.values()])
    columns = [Column("accuracy, %"), *(Column(f"split {split}", True) for split in results)]
    table = Table(
        f"{title}, {len(results)} splits",
        [*columns, Column("mean", True), Column("deviation", True)],
    )
    for name, shown in MEASURES.items():
        if name not in means:
            continue
        each = [f"{100 * value:.1f}" for value in means[name]["splits"]]
        mean, deviation = means[name]["mean"], means[name]["std"]
        table.add(
            shown,
            *each,
            f"{100 * mean:.1f}",
            "–" if deviation is None else f"{100 * deviation:.1f}",
        )
    console.table(table.to_rich())
    summary = {
        "split": ALL,
        "mean": means,
        "splits": {str(split): result for split, result in results.items()},
    }
    write_result(out, {"run": str(out), **summary})
    return {"run": str(out), **summary}
