"""The linear probe of cached targets: its means, its folds and its report."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from sklearn.linear_model import LogisticRegression

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.evaluation.evaluation_options import ProbeConfig
from distinit.pipeline.evaluation.store_labels import match_labels
from distinit.pipeline.evaluation.target_probe import fit_and_predict, mean_targets
from distinit.pipeline.reporting.accuracy_tables import teacher_table
from distinit.pipeline.reporting.runs import Run
from distinit.pipeline.reporting.teacher_baselines import probe_teachers
from distinit.pipeline.store.reader import TargetStore
from distinit.stages.targets_probe import targets_probe
from distinit.tests.store_recipe import Recipe

CLASSES = 3


@dataclass(frozen=True)
class Labelled(Recipe):
    """Videos of three classes; `good` predicts the class, `source` only the source."""

    def logits(self, video: int, teacher: str) -> np.ndarray:
        noise = super().logits(video, teacher)
        if teacher == "good":
            noise[:, video % CLASSES] += 12
        if teacher == "source":
            noise[:, self.source(video)] += 30
        return noise

    @staticmethod
    def source(video: int) -> int:
        return video // 4


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Labelled, Path, Path]:
    """Return the recipe, the store and a csv whose videos do not exist."""
    folder = tmp_path_factory.mktemp("probe")
    recipe = Labelled(videos=range(60), teachers={"good": 12, "noise": 10, "source": 16})
    store = recipe.make(folder / "s.zarr")
    labels = folder / "labels.csv"
    with labels.open("w", newline="", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "source", "split1"])
        for video in recipe.videos:
            path = recipe.path(video).replace("%FF", "\udcff")
            label, source = f"class {video % CLASSES}", f"source {recipe.source(video)}"
            rows.writerow([path, label, source, "test" if video >= 40 else "train"])
        rows.writerow(["nowhere.mp4", "class 0", "", "train"])
    return recipe, store, labels


def probe(store: Path, labels: Path, **options: object) -> dict[str, dict[object, dict]]:
    config = ProbeConfig(store=str(store), dataset=f"csv:{labels}", **options)
    result = targets_probe(config, Console(quiet=True))
    table: dict[str, dict[object, dict]] = {}
    for row in result["probes"]:
        table.setdefault(row["teacher"], {})[row["frames"]] = row
    return {"": result, **table}


@pytest.mark.slow
def test_a_teacher_with_the_classes_and_one_of_noise(
    labelled: tuple[Labelled, Path, Path],
) -> None:
    recipe, store, labels = labelled
    results = probe(store, labels, teachers=("good", "noise"), frames="2,all", folds=3)
    usable = [video for video in recipe.videos if recipe.rows(video)]
    assert results[""]["videos"] == len(usable)
    assert results[""]["groups"] == len({recipe.source(video) for video in usable})
    assert set(results["good"]) == {2, "all"}
    shares = np.bincount([video % CLASSES for video in usable]) / len(usable)
    for row in results["good"].values():
        assert row["accuracy"]["value"] > 0.9
        assert row["tells_apart"]
        assert row["most_frequent_class"] == pytest.approx(shares.max())
    assert results[""]["cannot_tell_apart"] == ["noise"]
    assert results["noise"]["all"]["accuracy"]["value"] < 0.6
    assert any("not in the store" in note for note in results[""]["notes"])


@pytest.mark.slow
def test_videos_of_a_source_are_never_on_both_sides(
    labelled: tuple[Labelled, Path, Path], tmp_path: Path
) -> None:
    """A random label per source can be predicted only for sources in the training side."""
    recipe, store, labels = labelled
    random = np.random.default_rng(0).integers(0, CLASSES, 16)
    lines = labels.read_text(errors="surrogateescape").splitlines()[1:-1]
    accuracy = {}
    for has_source in (True, False):
        file = tmp_path / f"{has_source}.csv"
        rows = ["path,label,source"]
        for video, line in zip(recipe.videos, lines, strict=True):
            source = recipe.source(video)
            rows.append(f"{line.split(',')[0]},{random[source]},{source if has_source else ''}")
        file.write_text("\n".join(rows), errors="surrogateescape")
        results = probe(store, file, teachers=("source",), frames="all", folds=3)
        accuracy[has_source] = results["source"]["all"]["accuracy"]["value"]
    assert accuracy[False] > 0.9
    assert accuracy[True] < 0.6


def test_the_sides_of_a_split_are_used(labelled: tuple[Labelled, Path, Path]) -> None:
    """The test side of the csv has videos 40 to 59, the train side the others."""
    _, path, labels = labelled
    matched = match_labels(TargetStore.open(path), f"csv:{labels}", split=1)
    assert matched.test is not None
    assert (matched.test == (matched.videos >= 40)).all()
    result = probe(path, labels, teachers=("good",), frames="all", split=1)[""]
    assert result["folds"] is None
    assert result["probes"][0]["accuracy"]["value"] > 0.9


def test_means_are_those_of_evenly_spread_frames(labelled: tuple[Labelled, Path, Path]) -> None:
    _, path, labels = labelled
    store = TargetStore.open(path)
    matched = match_labels(store, f"csv:{labels}")
    means = mean_targets(store, "good", matched.videos, (1, 4, None))
    stored = zarr.open_array(path / "teachers" / "good" / "logits", mode="r")
    for i, video in enumerate(matched.videos.tolist()):
        rows = stored[store.frames(video)[2]].astype(np.float64)
        count = len(rows)
        middles = [int((part + 0.5) * count / 4) for part in range(4)]
        for mean, expected in zip(means, (rows[[count // 2]], rows[middles], rows), strict=True):
            np.testing.assert_allclose(mean[i], expected.mean(axis=0), atol=1e-5)
    assert matched.label.tolist() == [video % CLASSES for video in matched.videos.tolist()]


def test_more_dimensions_than_videos() -> None:
    """The probe is fitted in the span of the videos, and equals one of all dimensions."""
    random = np.random.default_rng(1)
    label = np.arange(60) % CLASSES
    x = random.normal(0, 3, (60, 200)).astype(np.float32)
    x[np.arange(60), label] += 6
    new = random.normal(0, 3, (300, 200)).astype(np.float32)
    new[np.arange(300), np.arange(300) % CLASSES] += 6
    predicted = fit_and_predict(x, label, np.arange(60), new, seed=0)
    mean = x.mean(axis=0)
    scale = np.sqrt(np.square(x - mean).sum(axis=1).mean())
    agreement = [
        np.mean(
            LogisticRegression(C=c).fit((x - mean) / scale, label).predict((new - mean) / scale)
            == predicted
        )
        for c in (0.1, 1, 10, 100, 1000)
    ]
    assert max(agreement) > 0.99
    assert min(agreement) < 0.99 or np.mean(predicted == np.arange(300) % CLASSES) > 0.9


@pytest.mark.parametrize("frames", ["0", "1,two", "", "-1"])
def test_invalid_numbers_of_frames(frames: str) -> None:
    with pytest.raises(ValueError, match="frames"):
        ProbeConfig(store="s.zarr", dataset="csv:l.csv", frames=frames)


def test_labels_without_a_video_of_the_store(
    labelled: tuple[Labelled, Path, Path], tmp_path: Path
) -> None:
    _, store, _ = labelled
    file = tmp_path / "others.csv"
    file.write_text("path,label\na.mp4,x\nb.mp4,y\n")
    with pytest.raises(UsageError, match=r"none of its 2 videos"):
        match_labels(TargetStore.open(store), f"csv:{file}")


def test_rows_of_teachers_in_a_report(labelled: tuple[Labelled, Path, Path]) -> None:
    """A row has the probe on the split of the runs; other data sets and stores have no row."""
    _, store, labels = labelled
    expected = probe(store, labels, split=1, frames="all")
    dataset = f"csv:{labels}"
    runs = [
        Run("run", store.parent, "finetune", {"dataset": name, "split": 1}, {}, None, None, [])
        for name in (dataset, dataset, "csv:/nowhere/labels.csv", "folder:/")
    ]
    table = teacher_table(probe_teachers(runs, [str(store), "/nowhere/s.zarr"]))
    assert table is not None
    assert [row[0] for row in table.rows] == ["good", "noise", "source"]
    for name, *_, videos, accuracy in table.rows:
        accuracy_record = expected[name]["all"]["accuracy"]
        assert accuracy.startswith(f"{100 * accuracy_record['value']:.1f} [")
        assert int(videos) == sum(video >= 40 and video % 7 != 3 for video in range(60))
    assert teacher_table(probe_teachers(runs[2:], [str(store)])) is None
