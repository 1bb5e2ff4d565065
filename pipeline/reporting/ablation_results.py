"""Read ablations for a report: the cells of cells.json, and their runs.

Numbers are recomputed from the predictions of the runs; cells.json describes the cells, and has the
reasons of failures.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from ..common.documents import Form, inner_path, read_json
from ..common.errors import SourceError
from ..common.run_dir import CELLS, RESULT
from ..evaluation.ensemble import Gain, p_value
from ..evaluation.listing import short_dataset
from ..evaluation.metrics import Estimate, bootstrap_ratios, by_group, interval, video_values
from ..evaluation.predictions import Predictions
from .published_results import PaperNumbers, Published
from .runs import Run

Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RunFolder = Annotated[str, AfterValidator(inner_path)]


class CellRecord(Form):
    """One cell: `student` and `finetune` are run folders relative to the ablation's."""

    row: str
    axes: dict[str, Any] = {}
    seed: Number
    dataset: str
    split: Number
    student: RunFolder | None = None
    finetune: RunFolder
    status: Literal["done", "failed", "missing"]
    reason: str | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        """Readable name, unique within an ablation."""
        return f"{self.row}, {short_dataset(self.dataset)}, split {self.split}, seed {self.seed}"


class _CellsFile(Form):
    """The content of cells.json."""

    noun = "the cells of an ablation"
    title: str
    paper: PaperNumbers | None = None
    axes: list[str] = []
    cells: list[CellRecord]


@dataclass(frozen=True)
class Cell:
    """A cell with its finetuned run and the run of its student, None if they do not exist."""

    record: CellRecord
    run: Run | None
    student: Run | None

    @property
    def predictions(self) -> Predictions | None:
        """Predictions of the finished run; None before it is finished."""
        return None if self.run is None else self.run.predictions

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Metrics of the finished run; None before it is finished."""
        return None if self.run is None else self.run.metrics

    @property
    def problem(self) -> str | None:
        """Reason why the cell has no number, None if it has one."""
        if self.predictions is not None:
            return None
        if self.record.status == "done":
            return "missing: no finished predictions in its folder"
        return self.record.status + (f": {self.record.reason}" if self.record.reason else "")


@dataclass(frozen=True)
class Entry:
    """The results of the cells of one row and data set.

    Attributes:
        row: Name of the row.
        dataset: The data set.
        cells: Its cells.
        values: Accuracy [n] of each finished cell as a fraction, by measure; split1 is top 1 of the
            cells of split 1.
        paper: Numbers of the paper in per cent, by measure.
        gain: Gain in top 1 over the first row.
    """

    row: str
    dataset: str
    cells: Sequence[Cell]
    values: dict[str, np.ndarray]
    paper: dict[str, float]
    gain: Gain | None

    @property
    def num_done(self) -> int:
        """Number of finished cells."""
        return len(self.values["top1"])

    @property
    def explained(self) -> np.ndarray:
        """Explained fraction of each of its students that has one."""
        students = {
            cell.student.path: cell.student for cell in self.cells if cell.student is not None
        }
        fractions = [run.explained_fraction for run in students.values()]
        return np.array([value for value in fractions if value is not None])


@dataclass(frozen=True)
class Ablation:
    """The content of one cells.json; rows and data sets keep its order."""

    title: str
    folder: Path
    paper: PaperNumbers | None
    cells: Sequence[Cell]

    @property
    def rows(self) -> list[str]:
        """Names of the rows."""
        return list(dict.fromkeys(cell.record.row for cell in self.cells))

    @property
    def datasets(self) -> list[str]:
        """The data sets."""
        return list(dict.fromkeys(cell.record.dataset for cell in self.cells))

    @property
    def splits(self) -> list[int]:
        """The splits, sorted."""
        return sorted({cell.record.split for cell in self.cells})

    def published(self, dataset: str) -> list[tuple[Published, dict[str, float]]]:
        """Return the published results for a data set, and their numbers in per cent by measure.

        Numbers of other splits are missing.
        """
        paper = self.paper
        if paper is None:
            return []
        return [
            (result, paper.for_splits(result.numbers[dataset], self.splits))
            for result in paper.published
            if dataset in result.numbers
        ]

    def cells_of(self, row: str, dataset: str) -> list[Cell]:
        """Return the cells of a row and data set."""
        return [
            cell for cell in self.cells if (cell.record.row, cell.record.dataset) == (row, dataset)
        ]

    @cached_property
    def entries(self) -> list[Entry]:
        """Results of every row and data set, row by row, computed on first use."""
        return [self._entry(row, dataset) for row in self.rows for dataset in self.datasets]

    def _entry(self, row: str, dataset: str) -> Entry:
        cells = self.cells_of(row, dataset)
        finished = [(cell.record.split, cell.metrics) for cell in cells if cell.metrics]
        values = {
            name: [metrics[name]["value"] for _, metrics in finished]
            for name in ("per_clip", "top1", "top5")
        }
        values["split1"] = [metrics["top1"]["value"] for split, metrics in finished if split == 1]
        paper = self.paper
        return Entry(
            row=row,
            dataset=dataset,
            cells=cells,
            values={name: np.array(fractions) for name, fractions in values.items()},
            paper=paper.for_splits(paper.rows.get(row, {}).get(dataset), self.splits)
            if paper
            else {},
            gain=gain_over(cells, self.cells_of(self.rows[0], dataset))
            if row != self.rows[0]
            else None,
        )


def gain_over(cells: Sequence[Cell], base: Sequence[Cell]) -> Gain | None:
    """Compute top 1 of `cells` minus that of `base`, paired by test video.

    The value of a video is its mean over the seeds of a row; videos (or the recordings they were
    cut from) are resampled. Only splits that both rows have with equal videos and labels count.

    Returns:
        None if there is no such split.
    """
    splits, base_splits = (_by_split(side) for side in (cells, base))
    differences, accuracies, groups = [], [], []
    for split in sorted(splits.keys() & base_splits.keys()):
        results, base_results = splits[split], base_splits[split]
        if results.keys() != base_results.keys():
            continue
        videos = sorted(results)
        pairs = np.array([[results[video][0], base_results[video][0]] for video in videos])
        accuracies.append(pairs)
        differences.append(pairs[:, 0] - pairs[:, 1])
        groups += [f"{split}\n{results[video][1]}" for video in videos]
    if not differences:
        return None
    difference = np.concatenate(differences)
    index = np.array(groups)
    resampled = bootstrap_ratios(
        by_group(difference[:, None], index), by_group(np.ones((len(difference), 1)), index)
    )[:, 0]
    means = np.concatenate(accuracies).mean(axis=0)
    units = len(set(groups))
    estimate = Estimate(float(difference.mean()), *interval(resampled, units, min_mean=-1))
    return Gain(float(means[0]), float(means[1]), estimate, p_value(resampled, units))


def _by_split(cells: Sequence[Cell]) -> dict[int, dict[tuple[str, str], tuple[float, str]]]:
    """Return split → (video, label) → (mean over seeds of whether it is correct, recording)."""
    correct: dict[int, dict[tuple[str, str], list[float]]] = {}
    recording: dict[tuple[str, str], str] = {}
    for cell in cells:
        if (predictions := cell.predictions) is None:
            continue
        right = video_values(predictions.clip_scores, predictions.labels)["top1"]
        labels = [predictions.classes[int(k)] for k in predictions.labels]
        keys = list(zip(predictions.videos, labels, strict=True))
        groups = keys if predictions.groups is None else predictions.groups
        for key, value, group in zip(keys, right.tolist(), groups, strict=True):
            correct.setdefault(cell.record.split, {}).setdefault(key, []).append(value)
            recording[key] = str(group)
    return {
        split: {key: (float(np.mean(values)), recording[key]) for key, values in videos.items()}
        for split, videos in correct.items()
    }


def ablation_folders(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Find the folders with a cells.json at or below these, outside of run folders and stores."""
    paths: dict[Path, None] = {}
    for root in folders:
        for folder, inner, files in os.walk(root):
            inner[:] = sorted(name for name in inner if not name.endswith(".zarr"))
            if CELLS in files:
                paths[Path(folder).resolve()] = None
            if RESULT in files:
                inner.clear()
    return list(paths)


def cell_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Name the runs of ablations after their cells.

    The name of a student includes its split if the row has several students with the same seed,
    which is the case if each split excludes different videos.

    Returns:
        Resolved run folder → name, in the order of the cells, a student before its finetuning.

    Raises:
        SourceError: A cells.json is damaged or has another form.
    """
    names: dict[Path, str] = {}
    for folder in folders:
        cells = _read(folder / CELLS).cells
        num_students = Counter(
            (row, seed) for row, seed, _ in {(cell.row, cell.seed, cell.student) for cell in cells}
        )
        for record in cells:
            if record.student is not None:
                split = (
                    f", split {record.split}" if num_students[record.row, record.seed] > 1 else ""
                )
                name = f"student of {record.row}{split}, seed {record.seed}"
                names.setdefault((folder / record.student).resolve(), name)
            names.setdefault((folder / record.finetune).resolve(), record.label)
    return names


def read_ablations(folders: Sequence[Path], runs: Sequence[Run]) -> list[Ablation]:
    """Read the ablations in these folders, and assign the runs to their cells.

    Raises:
        SourceError: A cells.json is damaged or has another form.
    """
    by_path = {run.path: run for run in runs}

    def cell(folder: Path, record: CellRecord) -> Cell:
        student = (
            by_path.get((folder / record.student).resolve()) if record.student is not None else None
        )
        return Cell(record, by_path.get((folder / record.finetune).resolve()), student)

    files = {folder: _read(folder / CELLS) for folder in folders}
    return [
        Ablation(file.title, folder, file.paper, [cell(folder, record) for record in file.cells])
        for folder, file in files.items()
    ]


def _read(path: Path) -> _CellsFile:
    content = read_json(path, _CellsFile, path.parent)
    if not content:
        raise SourceError(f"{path}: not the cells of an ablation (empty)")
    return _CellsFile.model_validate(content)
