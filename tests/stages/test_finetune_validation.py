"""A validation side of finetune: the best checkpoint, early stopping, and the search on it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, LabelsError, UsageError
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig, parse_search
from distinit.pipeline.evaluation.labelled_clips import LabelledClips
from distinit.pipeline.evaluation.labels import Labelled, Labels, hold_out, load_labels
from distinit.pipeline.evaluation.search import epochs_of_search, rungs
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.training import loop
from distinit.pipeline.training.preview import GAP, SIDE
from distinit.pipeline.video.encode import write_video
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.tests.tiny_finetuning import tiny_finetuning

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
SIDES = ("train", "train", "train", "val", "val", "test", "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven noisy clips of each of two classes, with a validation side in split 1 alone."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(4)
    rows = ["path,label,source,split1,split2"]
    for label, channel in (("red", 0), ("blue", 2)):
        for i, side in enumerate(SIDES):
            images = random.integers(0, 120, (6, 32, 40, 3)).astype(np.uint8)
            images[..., channel] += 40
            write_video(root / f"{label}{i}.mp4", images, fps=8)
            two = "train" if side == "val" else side
            rows.append(f"{label}{i}.mp4,{label},{label}{i},{side},{two}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def config(data: Path, out: Path, csv: str = "labels.csv", **changes: Any) -> FinetuneConfig:
    values = tiny_finetuning(f"csv:{data / csv}", out, dropout=0.1)
    for key, value in changes.items():
        values[key] = (
            {**values[key], **value} if key in values and isinstance(value, dict) else value
        )
    return FinetuneConfig.model_validate(values)


def interrupt(options: FinetuneConfig, patch: pytest.MonkeyPatch, *, step: int) -> None:
    """Run a finetuning that is interrupted before it takes a step, counted from 1."""
    steps = itertools.count(1)
    take_step = loop.take_step

    def interrupted(*args: Any) -> Any:
        if next(steps) == step:
            raise KeyboardInterrupt
        return take_step(*args)

    with patch.context() as patched:
        patched.setattr(loop, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(options, QUIET)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_student(run).state_dict()


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def epochs(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["kind"] == "epoch"]


@pytest.fixture(scope="module")
def validated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "validated"
    return out, finetune(config(data, out), QUIET)


def test_the_best_epoch_on_the_validation_side_is_exported(
    data: Path, validated: tuple[Path, dict[str, Any]]
) -> None:
    run, result = validated
    history = epochs(run)
    best = min(history, key=lambda each: each["held_out/loss"])
    assert result["validation"]["best_epoch"] == best["epoch"]
    assert result["validation"]["best"]["loss"] == best["held_out/loss"]
    assert result["exported"] == "best"
    assert result["validation"]["videos"] == 4
    saved = torch.load(run / "checkpoints/best.pt", weights_only=True)["model"]
    assert equal(weights(run), saved)


def test_validation_measures_what_the_test_measures(
    data: Path, validated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The validation side as the test side of other labels, from predictions.h5, in NumPy."""
    run, result = validated
    rows = (data / "labels.csv").read_text().replace(",test", ",").replace(",val,", ",test,")
    (data / "as_test.csv").write_text(rows)
    options = {"runs": [str(run)], "dataset": f"csv:{data / 'as_test.csv'}", "out": str(tmp_path)}
    test = {"clips": 3, "workers": 0}
    evaluate(EvaluateConfig.model_validate({**options, "split": 1, "test": test}), QUIET)
    with h5py.File(tmp_path / "predictions.h5") as file:
        scores, labels = file["video_scores"][:].astype(np.float64), file["labels"][:]
    loss = -np.log(scores[np.arange(len(labels)), labels]).mean()
    assert result["validation"]["best"]["loss"] == pytest.approx(loss, abs=1e-5)
    accuracy = (scores.argmax(axis=1) == labels).mean()
    assert result["validation"]["best"]["accuracy"] == pytest.approx(accuracy)


def test_a_side_without_validation_changes_nothing(data: Path, tmp_path: Path) -> None:
    """The last weights of a validated run are those of a run whose validation rows are empty."""
    (data / "none.csv").write_text((data / "labels.csv").read_text().replace(",val,", ",,"))
    validated = finetune(config(data, tmp_path / "a", export="last", dropout=0.0), QUIET)
    plain = finetune(config(data, tmp_path / "b", "none.csv", dropout=0.0), QUIET)
    assert plain["validation"] is None
    assert plain["exported"] == "last"
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert validated["loss"] == plain["loss"]


def test_an_interrupted_run_with_validation_resumes_bit_by_bit(
    data: Path,
    validated: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(config(data, tmp_path / "run"), monkeypatch, step=3)
    result = finetune(config(data, tmp_path / "run", resume=True), QUIET)
    assert result["resumed_from_step"] == 2
    assert equal(weights(tmp_path / "run"), weights(validated[0]))
    assert result["validation"] == validated[1]["validation"]


@pytest.fixture(scope="module")
def searched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "searched"
    search = parse_search(("lr=0.00001,0.02,1e30",))
    return out, finetune(config(data, out, search=search), QUIET)


def test_a_search_trains_the_chosen_options_on_both_sides(
    data: Path, searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Its weights are those of a plain run with these options, on split 2, whose train side has the
    videos of both."""
    run, result = searched
    search = result["search"]
    assert [each["options"] for each in search["candidates"]] == [
        {"loop.lr": lr} for lr in (1e-05, 0.02, 1e30)
    ]
    assert search["candidates"][2]["failed"], "a diverging rate loses"
    chosen = min(search["candidates"], key=lambda each: each["loss"] or np.inf)
    assert search["chosen"] == chosen["options"]
    assert search["epochs"] == chosen["best_epoch"]
    assert [each["epochs"] for each in search["candidates"]] == [2, 2, 1]
    assert result["train_videos"] == 10
    assert result["epochs"] == search["epochs"]
    assert not (run / "search").exists()
    assert result["test_looks"] == 1
    lr = search["chosen"]["loop.lr"]
    # The order of the videos decides the draws: train, then validation.
    lines = (data / "labels.csv").read_text().splitlines()
    ordered = [line for side in (",train,t", ",val,", ",test,") for line in lines if side in line]
    (data / "both.csv").write_text("\n".join([lines[0], *ordered]).replace(",val,", ",train,"))
    loop_options = {"lr": lr, "epochs": search["epochs"]}
    finetune(config(data, tmp_path / "plain", "both.csv", loop=loop_options), QUIET)
    assert equal(weights(run), weights(tmp_path / "plain"))


def test_the_search_makes_the_same_choice_with_shuffled_test_labels(
    data: Path, searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    swapped = {"red": "blue", "blue": "red"}
    lines = (data / "labels.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines]
    shuffled = [[a, swapped[b], *rest] if "test" in rest else [a, b, *rest] for a, b, *rest in rows]
    (data / "shuffled.csv").write_text("\n".join(map(",".join, shuffled)))
    search = parse_search(("lr=0.00001,0.02,1e30",))
    result = finetune(config(data, tmp_path / "run", "shuffled.csv", search=search), QUIET)
    assert result["search"] == searched[1]["search"]
    before, after = (each["metrics"]["top1"]["value"] for each in (searched[1], result))
    assert after == pytest.approx(1 - before), "the labels of the test were other ones"


def test_an_interrupted_search_resumes_to_the_same_choice_and_weights(
    data: Path,
    searched: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = parse_search(("lr=0.00001,0.02,1e30",))
    interrupt(config(data, tmp_path / "run", search=search), monkeypatch, step=4)
    with pytest.raises(UsageError, match="--resume"):
        finetune(config(data, tmp_path / "run", search=search), QUIET)
    other = parse_search(("lr=0.02,0.03",))
    with pytest.raises(CheckpointError, match="search"):
        finetune(config(data, tmp_path / "run", search=other, resume=True), QUIET)
    result = finetune(config(data, tmp_path / "run", search=search, resume=True), QUIET)
    assert result["search"] == searched[1]["search"]
    assert equal(weights(tmp_path / "run"), weights(searched[0]))


def test_evaluate_counts_another_look_at_the_test_split(
    searched: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(searched[0], tmp_path / "run")
    evaluate(EvaluateConfig(runs=[str(tmp_path / "run")]), QUIET)
    assert json.loads((tmp_path / "run/result.json").read_text())["test_looks"] == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"search": {"lr": [0.1]}, "csv": "none.csv"}, "--held-out"),
        ({"search": {"rate": [0.1]}}, "loop.lr"),
        ({"search": {"lr": [-1]}}, "lr=-1"),
        ({"search": {"workers": [1]}}, "workers"),
        ({"held_out": 0.5}, "--held-out 0.5"),
    ],
)
def test_what_cannot_be_chosen_by_is_an_error(
    data: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    (data / "none.csv").write_text((data / "labels.csv").read_text().replace(",val,", ",,"))
    with pytest.raises(UsageError, match=named):
        finetune(config(data, tmp_path / "run", **changes), QUIET)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_dry_run_shows_the_first_batch_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    """The picture has the frames of the first clips of the run, one row per clip."""
    result = finetune(config(data, tmp_path / "run", dry_run=True), QUIET)
    assert (result["steps"], result["clips"]) == (4, 16)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first-batch.png"]
    labels = load_labels(f"csv:{data / 'labels.csv'}")
    options = {"clip_frames": 4, "seed": 0, "epoch_clips": 8}
    clips = LabelledClips(labels, config(data, tmp_path).clips, **options)
    picture = np.asarray(Image.open(result["picture"]), dtype=float)
    for number in range(4):
        clip = clips[(0, number)]["clip"]
        top = GAP + number * (SIDE + GAP)
        colour = picture[top : top + SIDE, GAP : GAP + SIDE].mean(axis=(0, 1))
        assert colour == pytest.approx(clip[:, 0].float().mean(dim=(1, 2)).numpy(), abs=3)


def test_a_class_on_the_validation_side_alone_is_refused(data: Path, tmp_path: Path) -> None:
    rows = (data / "labels.csv").read_text().replace("red3.mp4,red,", "red3.mp4,green,")
    (data / "green.csv").write_text(rows)
    with pytest.raises(LabelsError, match="green"):
        load_labels(f"csv:{data / 'green.csv'}")


def test_a_folder_has_a_validation_side(data: Path, tmp_path: Path) -> None:
    for label in ("red", "blue"):
        for i, side in enumerate(SIDES):
            (tmp_path / side / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / side / label / f"{i}.mp4").write_bytes(
                (data / f"{label}{i}.mp4").read_bytes()
            )
    labels = load_labels(f"folder:{tmp_path}")
    assert [len(side) for side in (labels.train, labels.val, labels.test)] == [6, 4, 4]
    assert not labels.notes


def made_up(sizes: dict[str, int], per_source: int) -> Labels:
    """Labels of some classes whose recordings have so many videos each."""
    classes = tuple(sorted(sizes))
    train = tuple(
        Labelled(f"{name}/{i}.mp4", k, f"{name}{i // per_source}" if per_source > 1 else "")
        for k, name in enumerate(classes)
        for i in range(sizes[name])
    )
    return Labels("csv:x", 1, "/", classes, train, ())


@pytest.mark.parametrize("per_source", [1, 4])
def test_held_out_videos_are_stratified_and_whole_recordings(per_source: int) -> None:
    labels = made_up({"a": 100, "b": 40, "c": 8, "d": 8}, per_source)
    held = hold_out(labels, 0.2)
    assert sorted((*held.train, *held.val)) == sorted(labels.train)
    assert held.listed == labels.train
    if per_source > 1:
        assert not {v.source for v in held.val} & {v.source for v in held.train}
    counts = [sum(v.label == k for v in held.val) for k in range(4)]
    assert all(
        abs(n - 0.2 * size) <= per_source / 2 + 1
        for n, size in zip(counts, (100, 40, 8, 8), strict=True)
    )
    assert {v.label for v in held.train} == set(range(4))
    shuffled = Labels("csv:x", 1, "/", labels.classes, tuple(reversed(labels.train)), ())
    assert set(hold_out(shuffled, 0.2).val) == set(held.val), (
        "the order of the list decides nothing"
    )
    assert hold_out(labels, 0) is labels


def test_a_class_of_one_recording_is_not_held_out() -> None:
    with pytest.raises(UsageError, match="--held-out"):
        hold_out(made_up({"a": 4, "b": 4}, 4), 0.2)


def test_the_schedule_of_halving(data: Path, tmp_path: Path) -> None:
    assert rungs(1) == [(1.0, 1)]
    assert rungs(2) == [(1.0, 2)]
    assert rungs(6) == [(0.25, 6), (0.5, 3), (1.0, 2)]
    options = config(data, tmp_path, search={"lr": [1, 2, 3]}, loop={"epochs": 8})
    # Three for 4 epochs, two of them for 8, and the last training.
    assert epochs_of_search(options) == 3 * 4 + 2 * 4 + 8
