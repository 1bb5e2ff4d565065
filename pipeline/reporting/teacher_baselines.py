"""The teachers' own row next to the runs: a linear probe of their cached targets.

Where the labelled videos of a run are in the store that a student was trained from, the probe
measures what the teachers' targets hold about its classes, without any student.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..common.errors import DistInitError
from ..evaluation.metrics import Estimate
from ..evaluation.store_labels import match_labels
from ..evaluation.target_probe import probe_teacher
from ..store.reader import TargetStore
from .runs import Run

MOST = 5000  # labelled videos; a report is no place for a longer computation


@dataclass(frozen=True)
class TeacherProbe:
    """The probe of one teacher's targets on one split of a data set; `dataset` as in the runs."""

    dataset: str
    split: str
    teacher: str
    output: str
    num_videos: int
    accuracy: Estimate

    @property
    def name(self) -> str:
        """Name of the row."""
        return f"{self.teacher} ({self.output})"


def probe_teachers(runs: Sequence[Run], stores: Sequence[str]) -> list[TeacherProbe]:
    """Probe each teacher on the data sets and splits of finetuned runs.

    A data set is left out where none of its labelled videos is in a store.

    Args:
        runs: Finetuned runs.
        stores: Paths of those that may be read.
    """
    return [
        probe
        for path in stores
        for dataset, root, split in _splits(runs)
        for probe in _probes(path, dataset, root, split)
    ]


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


def _probes(path: str, dataset: str, root: str | None, split: int) -> list[TeacherProbe]:
    probes: list[TeacherProbe] = []
    try:
        store = TargetStore.open(path)
        labels = match_labels(store, dataset, root=root, split=split)
    except (DistInitError, OSError, ValueError):
        # As a rule the labelled videos are not in the store: there is nothing to report then.
        return probes
    for name in store.target_names():
        if store.teachers[name].grid and not store.teachers[name].plain_mean:
            continue
        has = np.isin(labels.videos, store.usable([name]))
        has &= np.cumsum(has) <= MOST
        # One that has rows of too few of the videos leaves the others their place.
        with suppress(DistInitError, OSError, ValueError):
            (result,) = probe_teacher(store, name, labels.choose(has), (None,))
            probes.append(
                TeacherProbe(
                    dataset, str(split), name, result.output, len(result.correct), result.accuracy
                )
            )
    return probes
