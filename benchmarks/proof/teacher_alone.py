"""Measure how well the teacher's targets alone predict the labels.

    python benchmarks/proof/teacher_alone.py STORE FOLDER...

Logistic regression on each video's mean logits in the store, trained on the training side of every
fold of FOLDER/labels.csv and tested on its test side, the three folds pooled; the interval is over
sources. For comparison, the same with random folds, in which clips of one source are on both sides.
If the targets fail, a student that learns from them alone cannot be expected to succeed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from folds import SPLITS, interval, read_labels
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distinit.pipeline.store.reader import TargetStore


def main() -> None:
    store = TargetStore.open(sys.argv[1])
    teacher = next(iter(store.teachers))
    videos = {"/".join(store.place(video)): video for video in store.usable([teacher])}
    for folder in map(Path, sys.argv[2:]):
        rows = [row for row in read_labels(folder) if f"{folder.name}/{row['path']}" in videos]
        means = np.stack(
            [_mean(store, teacher, int(videos[f"{folder.name}/{row['path']}"])) for row in rows]
        )
        labels = np.array([row["label"] for row in rows])
        groups = np.unique([row["source"] for row in rows], return_inverse=True)[1]
        by_source = np.zeros(len(rows))
        for k in SPLITS:
            test = np.array([row[f"split{k}"] == "test" for row in rows])
            by_source[test] = (
                _fitted(means[~test], labels[~test]).predict(means[test]) == labels[test]
            )
        at_random = np.zeros(len(rows))
        for train, test in StratifiedKFold(3, shuffle=True, random_state=0).split(means, labels):
            at_random[test] = (
                _fitted(means[train], labels[train]).predict(means[test]) == labels[test]
            )
        for name, right in (("folds by source", by_source), ("folds at random", at_random)):
            mean, low, high = (100 * value for value in interval(right, groups))
            print(
                f"{folder.name}, {name}: {mean:.1f} [{low:.1f}, {high:.1f}] % of {len(rows)} videos"
            )


def _mean(store: TargetStore, teacher: str, video: int) -> np.ndarray:
    """Return the mean logits [K] of the cached frames of a video."""
    rows = store.frames(video)[2]
    return np.asarray(store.logits(teacher, rows), np.float32).mean(axis=0)


def _fitted(means: np.ndarray, labels: np.ndarray) -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, C=0.01)).fit(
        means, labels
    )


if __name__ == "__main__":
    main()
