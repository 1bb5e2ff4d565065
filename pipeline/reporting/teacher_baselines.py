"""The teachers' own row beside the runs: a linear probe of their cached targets.

Where the labelled videos of a run are in the store that a student was trained from, the probe says
what the teachers' targets hold about its classes, without any student.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ..common.errors import DistInitError
from ..common.tables import Column, Table
from ..evaluation.listing import short_dataset
from ..evaluation.store_labels import match_labels
from ..evaluation.target_probe import probe_teacher
from ..store.reader import TargetStore
from .accuracy_tables import percent
from .runs import Run

MOST = 5000  # labelled videos; a report is no place for a longer computation


def teacher_table(runs: Sequence[Run], stores: Sequence[str]) -> Table | None:
    """Return the accuracy of a probe of each teacher; None where no labelled video is in a store.

    Args:
        runs: Finetuned runs, whose data sets and splits are probed.
        stores: Paths of those that may be read.
    """
    table = Table(
        "Linear probe of the teachers’ cached targets, % [95 % interval]",
        [
            Column("teacher"),
            Column("output"),
            Column("data set"),
            Column("split", True),
            Column("test videos", True),
            Column("top 1", True),
        ],
        notes=[
            "A logistic regression on each teacher’s targets averaged over a video, trained and tested "
            "on the videos of the split that are in the store: what the targets hold, without any "
            "student (distinit targets probe)."
        ],
    )
    for path in stores:
        for dataset, root, split in _splits(runs):
            _add_rows(table, path, dataset, root, split)
    return table if table.rows else None


def _splits(runs: Sequence[Run]) -> list[tuple[str, str | None, int]]:
    """Return (data set, root, split) of the runs, each once.

    A run may come from anybody: its labels are read only where they are one csv file.
    """
    found: dict[tuple[str, str | None, int], None] = {}
    for run in runs:
        dataset, split = str(run.config.get("dataset", "")), str(run.config.get("split") or 1)
        kind, _, file = dataset.partition(":")
        root = run.config.get("root")
        if kind == "csv" and os.path.isfile(file) and split.isdecimal():
            found[dataset, None if root is None else str(root), int(split)] = None
    return list(found)


def _add_rows(table: Table, path: str, dataset: str, root: str | None, split: int) -> None:
    try:
        store = TargetStore.open(path)
        labels = match_labels(store, dataset, root=root, split=split)
        for name in store.target_names():
            if store.teachers[name].grid and not store.teachers[name].plain_mean:
                continue
            has = np.isin(labels.videos, store.usable([name]))
            has &= np.cumsum(has) <= MOST
            (result,) = probe_teacher(store, name, labels.choose(has), (None,))
            table.add(
                name,
                result.output,
                short_dataset(dataset),
                str(split),
                str(len(result.correct)),
                percent(result.accuracy),
            )
    except (DistInitError, OSError, ValueError):
        # As a rule the labelled videos are not in the store: there is nothing to say then.
        return
