"""Baselines of the teachers, shown with the runs: linear probes of their cached targets.

If the labelled videos of a run are in a store that a student was trained from, the probe measures
how well the teachers' targets predict the classes of the run, without any student.
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

# Labelled videos per probe, so that a report takes little time.
MAX_VIDEOS = 5000


@dataclass(frozen=True)
class TeacherProbe:
    """A probe of one teacher's targets on one split; `dataset` is named as in the runs."""

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

    A data set is left out if none of its labelled videos is in a store.

    Args:
        runs: Finetuned runs.
        stores: Paths of the stores to read.
    """
    return [
        probe
        for path in stores
        for dataset, root, split in _splits(runs)
        for probe in _probes(path, dataset, root, split)
    ]


def _splits(runs: Sequence[Run]) -> list[tuple[str, str | None, int]]:
    """Return the distinct (data set, root, split) of the runs whose labels are one csv file.

    A run may come from another person, so that no other kind of data set is opened.
    """
    splits: dict[tuple[str, str | None, int], None] = {}
    for run in runs:
        dataset, split = str(run.config.get("dataset", "")), str(run.config.get("split") or 1)
        kind, _, file = dataset.partition(":")
        root = run.config.get("root")
        if kind == "csv" and os.path.isfile(file) and split.isdecimal():
            splits[dataset, None if root is None else str(root), int(split)] = None
    return list(splits)


def _probes(path: str, dataset: str, root: str | None, split: int) -> list[TeacherProbe]:
    probes: list[TeacherProbe] = []
    try:
        store = TargetStore.open(path)
        labels = match_labels(store, dataset, root=root, split=split)
    except (DistInitError, OSError, ValueError):
        # Usually the labelled videos are not in the store, and there is nothing to report.
        return probes
    for name in store.target_names():
        if store.teachers[name].grid and not store.teachers[name].plain_mean:
            continue
        has_targets = np.isin(labels.videos, store.usable([name]))
        has_targets &= np.cumsum(has_targets) <= MAX_VIDEOS
        # A teacher with rows of too few videos is skipped; the other teachers are still probed.
        with suppress(DistInitError, OSError, ValueError):
            (result,) = probe_teacher(store, name, labels.choose(has_targets), (None,))
            probes.append(
                TeacherProbe(
                    dataset, str(split), name, result.output, len(result.correct), result.accuracy
                )
            )
    return probes
