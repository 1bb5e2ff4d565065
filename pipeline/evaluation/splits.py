"""`--split all`: one run per split in RUN/split1, RUN/split2, …, the mean in RUN/result.json."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UsageError
from ..common.run_dir import CONFIG, recorded_sections
from ..common.tables import Table, columns
from .labels import ALL
from .metrics import MEASURES
from .protocol import write_result

log = logging.getLogger(__name__)


def split_folder(run: Path, split: int) -> Path:
    """Return the folder of the run of one split."""
    return run / f"split{split}"


def split_folders(run: Path) -> dict[int, Path]:
    """Return the run of each split in a folder of `finetune --split all`; {} for other folders.

    Raises:
        UsageError: One of them is a link to a place outside of the folder.
    """
    paths = {
        int(match[1]): path
        for path in run.glob("split*")
        if (match := re.fullmatch(r"split(\d+)", path.name))
    }
    folders = {
        split: paths[split] for split in sorted(paths) if recorded_sections(paths[split] / CONFIG)
    }
    for path in folders.values():
        if not path.resolve().is_relative_to(run.resolve()):
            raise UsageError(
                f"{path}: a link to {path.resolve()}, outside of {run}; expected the folder itself"
            )
    return folders


def summarise_splits(
    out: Path, results: Mapping[int, dict[str, Any]], title: str
) -> dict[str, Any]:
    """Write the mean and deviation of the metrics over splits to OUT/result.json, and show them.

    Args:
        out: The folder to write.
        results: Result of each split.
        title: Title of the table.

    Returns:
        The content of result.json.
    """
    means = mean_over_splits([result["metrics"] for result in results.values()])
    splits = (f">split {split}" for split in results)
    table = Table(
        f"{title}, {len(results)} splits", columns("accuracy, %", *splits, ">mean", ">deviation")
    )
    for name, label in MEASURES.items():
        if name not in means:
            continue
        cells = [f"{100 * value:.1f}" for value in means[name]["splits"]]
        mean, deviation = means[name]["mean"], means[name]["std"]
        table.add(
            label,
            *cells,
            f"{100 * mean:.1f}",
            "–" if deviation is None else f"{100 * deviation:.1f}",
        )
    log.info(table)
    summary = {
        "split": ALL,
        "mean": means,
        "splits": {str(split): result for split, result in results.items()},
    }
    write_result(out, {"run": str(out), **summary})
    return {"run": str(out), **summary}


def mean_over_splits(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Average the metrics of splits, see `metrics_from_file`.

    Every split counts the same, whatever its number of videos, as in published three-split means.

    Returns:
        `mean`, `std` (over n − 1; None for one split) and the values of all `splits`, as fractions,
        for each accuracy that every split has.
    """
    means: dict[str, dict[str, Any]] = {}
    for name in MEASURES:
        # Fused scores have no accuracy per clip.
        if not all(name in each for each in metrics):
            continue
        values = np.array([each[name]["value"] for each in metrics])
        means[name] = {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            "splits": values.tolist(),
        }
    return means
