"""Lists and measures of the proofs: excluded videos, inner splits, pooled folds.

Shape letters: V videos, S seeds.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distinit.pipeline.evaluation.metrics import bootstrap_ratios, by_group
from distinit.pipeline.evaluation.predictions import Predictions

SPLITS = (1, 2, 3)
Row = dict[str, str]


def read_labels(folder: Path) -> list[Row]:
    """Read FOLDER/labels.csv: path, label, source, split1, split2, split3.

    Every video is tested in exactly one split.
    """
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if [row[f"split{k}"] for k in SPLITS].count("test") != 1:
            raise SystemExit(
                f"{folder}/labels.csv: {row['path']} is not a test video of exactly one split"
            )
    return rows


def write_excluded(out: Path, folders: Sequence[Path]) -> None:
    """Write OUT/testK.txt: the test videos of split K of all data sets, for `--exclude`."""
    for k in SPLITS:
        names = [
            f"{folder.name}/{row['path']}"
            for folder in folders
            for row in read_labels(folder)
            if _on(row, k, "test")
        ]
        (out / f"test{k}.txt").write_text("".join(f"{name}\n" for name in names))


def inner(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose split K divides the train side of split K by source, to choose a schedule.

    About a third of the sources of each class, those with the smallest hashes, are the test side.
    """
    copies = [dict(row) for row in rows]
    for k in SPLITS:
        sources: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            if _on(row, k, "train"):
                sources[row["label"]].add(row["source"])
        tested = {
            (label, name)
            for label, names in sources.items()
            for name in sorted(names, key=_hash)[: max(1, round(len(names) / 3))]
        }
        for row, copied in zip(rows, copies, strict=True):
            side = "test" if (row["label"], row["source"]) in tested else "train"
            copied[f"split{k}"] = side if _on(row, k, "train") else ""
    return copies


def few(rows: Sequence[Row], share: float) -> list[Row]:
    """Return rows with a share of the training videos of each class, those with smallest hashes.

    Test sides are unchanged.
    """
    copies = [dict(row) for row in rows]
    for k in SPLITS:
        of_class: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if _on(row, k, "train"):
                of_class[row["label"]].append(row["path"])
        chosen_paths = {
            name
            for names in of_class.values()
            for name in sorted(names, key=_hash)[: max(1, round(share * len(names)))]
        }
        for row, copied in zip(rows, copies, strict=True):
            if _on(row, k, "train") and row["path"] not in chosen_paths:
                copied[f"split{k}"] = ""
    return copies


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write a csv of labels for `--dataset csv:PATH`."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@dataclass(frozen=True)
class Pooled:
    """Predictions of all folds, in which every video is tested once per seed.

    `predicted` has names of classes [S, V], "" for an unreadable video; `labels` and `groups` (the
    sources) are [V].
    """

    predicted: np.ndarray
    labels: np.ndarray
    videos: list[str]
    groups: np.ndarray
    seeds: list[int]

    @property
    def right(self) -> np.ndarray:
        """1 for a correct prediction, else 0, [S, V]."""
        return (self.predicted == self.labels).astype(np.float64)

    @property
    def by_seed(self) -> np.ndarray:
        """Top-1 accuracy of the pooled folds [S]."""
        return np.asarray(self.right.mean(axis=1))


def pooled(runs: dict[tuple[int, int], Path], rows: Sequence[Row]) -> Pooled:
    """Pool the predictions of runs, given as (split, seed) → run folder.

    Raises:
        SystemExit: A fold or a video is missing.
    """
    seeds = sorted({seed for _, seed in runs})
    names = [row["path"] for row in rows]
    predicted = np.full((len(seeds), len(names)), None, dtype=object)
    positions = {name: i for i, name in enumerate(names)}
    for (_, seed), run in runs.items():
        predictions = Predictions.read(run / "predictions.h5")
        for video, value in zip(predictions.videos, top_classes(predictions), strict=True):
            position = positions[_relative(video, positions)]
            if predicted[seeds.index(seed), position] is not None:
                raise SystemExit(f"{run}: {video} was tested twice with seed {seed}")
            predicted[seeds.index(seed), position] = value
    missing = np.argwhere(predicted == None)  # noqa: E711
    if len(missing):
        raise SystemExit(
            f"{len(missing)} of {predicted.size} tests are missing, the first: {names[missing[0][1]]}"
        )
    labels, sources = (
        np.array([row[key] for row in rows], dtype=object) for key in ("label", "source")
    )
    return Pooled(predicted, labels, names, sources, seeds)


def top_classes(predictions: Predictions) -> list[str]:
    """Return the top class of each video [V], "" if it is unreadable."""
    top = predictions.video_scores.argmax(axis=1)  # arbitrary for NaN, and not used
    readable = np.isfinite(predictions.video_scores).all(axis=1)
    return [predictions.classes[k] if ok else "" for k, ok in zip(top, readable, strict=True)]


def write_predictions(path: Path, predictions_of: dict[str, Pooled]) -> None:
    """Write predictions to a csv: video, source, label, and a column `ROW | SEED` per run.

    All figures of the rows can be recomputed from it.
    """
    first = next(iter(predictions_of.values()))
    columns = {
        f"{row} | {seed}": p.predicted[i]
        for row, p in predictions_of.items()
        for i, seed in enumerate(p.seeds)
    }
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "source", "label", *columns])
        writer.writerows(
            zip(first.videos, first.groups, first.labels, *columns.values(), strict=True)
        )


def read_predictions(path: Path) -> dict[str, Pooled]:
    """Read a csv of `write_predictions`, by row."""
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    seeds: dict[str, list[int]] = defaultdict(list)
    for column in list(lines[0])[3:]:
        row, _, seed = column.rpartition(" | ")
        seeds[row].append(int(seed))
    videos = [line["video"] for line in lines]
    labels, sources = (
        np.array([line[key] for line in lines], dtype=object) for key in ("label", "source")
    )
    return {
        row: Pooled(
            np.array([[line[f"{row} | {seed}"] for line in lines] for seed in row_seeds], dtype=object),
            labels, videos, sources, row_seeds,
        )
        for row, row_seeds in seeds.items()
    }  # fmt: skip


def interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values [V], and the ends of its 95 % bootstrap interval over sources."""
    above, below = by_group(values[:, None], groups), by_group(np.ones((len(values), 1)), groups)
    low, high = np.quantile(bootstrap_ratios(above, below)[:, 0], (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def gain(pooled_runs: Pooled, reference: Pooled) -> tuple[float, float, float]:
    """Return the paired difference of the means over seeds, with its interval over sources."""
    return interval(
        pooled_runs.right.mean(axis=0) - reference.right.mean(axis=0), pooled_runs.groups
    )


def runs_of(
    out: Path, records: Iterable[dict[str, object]]
) -> dict[str, dict[tuple[int, int], Path]]:
    """Return row → (split, seed) → run folder for the finished cells of cells.json."""
    run_folders: dict[str, dict[tuple[int, int], Path]] = defaultdict(dict)
    for record in records:
        if record["status"] == "done":
            run_folders[str(record["row"])][int(str(record["split"])), int(str(record["seed"]))] = (
                out / str(record["finetune"])
            )
    return run_folders


def read_cells(path: Path) -> list[dict[str, object]]:
    """Read the records of a cells.json."""
    return list(json.loads(path.read_text())["cells"])


def _relative(video: str, positions: dict[str, int]) -> str:
    """Return the name in the labels for a path in predictions.h5."""
    if video in positions:
        return video
    return next(name for name in positions if video.endswith("/" + name))


def _on(row: Row, split: int, side: str) -> bool:
    return row[f"split{split}"] == side


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
