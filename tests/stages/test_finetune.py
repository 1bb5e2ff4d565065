"""Stage three end to end on small real clips: train, test, count a broken video as wrong, resume,
report."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, UsageError
from distinit.pipeline.common.files import write_whole
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.labelled_clips import EvaluationClips, LabelledClips, clip_starts
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.evaluation.predictions import Predictions, metrics_from_file
from distinit.pipeline.evaluation.predictor import predict
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.stages.options import ReportConfig
from distinit.stages.report import report
from distinit.tests.tiny_finetuning import tiny_finetuning

pytestmark = pytest.mark.slow

LENGTHS = {
    "red": (3, 9, 30, 17, 12),
    "blue": (24, 5, 11, 40, 14),
}  # frames of the clips of each class


class StopsAt(Console):
    """A console whose user presses Ctrl-C in a certain step."""

    def __init__(self, step: int) -> None:
        super().__init__(quiet=True)
        self.steps_left = step

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> Iterator[Any]:
        yield self

    def advance(self, n: float = 1, **fields: object) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten readable clips of two classes, a broken test video, and a broken training video."""
    root = tmp_path_factory.mktemp("labelled")
    rows = ["path,label,split1,split2"]
    rng = np.random.default_rng(0)
    for label, lengths in LENGTHS.items():
        for i, frames in enumerate(lengths):
            images = rng.integers(0, 60, size=(frames, 48, 64, 3), dtype=np.uint8)
            images[..., 0 if label == "red" else 2] += 150
            write_video(root / f"{label} {i}.mp4", images, fps=8)
            rows.append(
                f"{label} {i}.mp4,{label},{'train' if i < 3 else 'test'},{'test' if i < 2 else 'train'}"
            )
    (root / "broken.mp4").write_bytes(b"this is no video")
    (root / "broken too.mp4").write_bytes(b"nor is this")
    rows += ["broken.mp4,red,test,", "broken too.mp4,blue,train,"]
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return f"csv:{root / 'labels.csv'}"


def config(dataset: str, out: Path, **changes: Any) -> FinetuneConfig:
    values = tiny_finetuning(dataset, out, test={"batch_size": 7, "workers": 0})
    values["loop"] |= {"epochs": 3, "epoch_clips": 16, "checkpoint_every": 3, "log_every": 1}
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return FinetuneConfig.model_validate(values)


@pytest.fixture(scope="module")
def finished(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "scratch"
    return out, finetune(config(dataset, out), Console(quiet=True))


def test_a_run_leaves_everything_behind(
    dataset: str, finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = finished
    assert result["metrics"] == metrics_from_file(out / "predictions.h5")
    assert json.loads((out / "result.json").read_text())["metrics"] == result["metrics"]
    assert result["metrics"]["videos"] == 5, "the broken one included"
    assert [f["video"] for f in result["metrics"]["failed"]] == ["broken.mp4"]
    assert result["metrics"]["top5"]["value"] == pytest.approx(4 / 5), (
        "unread is wrong even with two classes"
    )
    assert list(result["unreadable"]) == ["broken too.mp4"]
    used = yaml.safe_load((out / "config.yaml").read_text())["finetune"]
    assert FinetuneConfig.model_validate(used).clips.clip_frames == 4
    assert load_student(out).meta.classes == {"label": ["blue", "red"]}
    assert not (out / "predictions.partial.h5").exists()


def test_training_learned_the_colours(finished: tuple[Path, dict[str, Any]]) -> None:
    """Two classes told apart by their colour: every readable test video is right after three short
    epochs."""
    assert finished[1]["metrics"]["top1"]["value"] == pytest.approx(4 / 5)


def test_clips_are_the_frames_of_the_formula(dataset: str) -> None:
    """Each test clip, pixel by pixel, against frames read one by one; short videos repeat their
    last frame."""
    labels = load_labels(dataset)
    view = ClipView(size=32)
    clips = EvaluationClips(labels, labels.test, view, clip_frames=16, clips=10)
    for i, video in enumerate(labels.test[:4]):
        row = clips[(0, i)]
        n = row["frames"]
        label, number = video.path.removesuffix(".mp4").split()
        assert n == LENGTHS[label][int(number)]
        assert row["starts"].tolist() == clip_starts(n, 16).tolist()
        assert tuple(row["clips"].shape) == (10, 3, 16, 32, 32)
        for c in (0, 4, 9):
            for t in (0, 7, 15):
                index = min(int(row["starts"][c]) + t, n - 1)
                image = read_frames(
                    labels.absolute(video), np.array([index]), view.frame_view()
                ).images[0]
                top, left = (image.shape[0] - 32) // 2, (image.shape[1] - 32) // 2
                expected = torch.from_numpy(image[top : top + 32, left : left + 32]).permute(
                    2, 0, 1
                )
                assert torch.equal(row["clips"][c, :, t], expected)


def test_training_clips_are_pure_and_lie_inside_their_video(dataset: str) -> None:
    labels = load_labels(dataset)
    first, second = (
        LabelledClips(labels, ClipView(size=32), clip_frames=4, seed=3, epoch_clips=8)
        for _ in range(2)
    )
    keys = [(e, s) for e in range(3) for s in range(8)]
    forward = {key: first[key] for key in keys}
    starts = set()
    for key in reversed(keys):
        row = second[key]
        assert torch.equal(row["clip"], forward[key]["clip"])
        assert (row["video"], row["start"], row["unreadable"]) == tuple(
            forward[key][k] for k in ("video", "start", "unreadable")
        )
        assert tuple(row["clip"].shape) == (3, 4, 32, 32)
        name, number = row["name"].removesuffix(".mp4").split()
        assert 0 <= row["start"] <= max(LENGTHS[name][int(number)] - 4, 0)
        assert labels.classes[row["label"]] == name
        starts.add(row["name"])
    assert len(starts) == 6, "every readable training video is drawn in 24 clips of 7 videos"
    assert {name for row in forward.values() for name, _ in row["unreadable"]} == {"broken too.mp4"}


def test_scores_do_not_depend_on_the_batch_size_or_the_workers(
    dataset: str, finished: tuple[Path, dict[str, Any]]
) -> None:
    student, labels = load_student(finished[0]), load_labels(dataset)
    clips = EvaluationClips(labels, labels.test, ClipView(size=32), clip_frames=4, clips=10)
    predictions = []
    for batch_size, workers in ((1, 0), (16, 0), (64, 2)):
        tables = Predictions.empty(
            labels.classes,
            [v.path for v in labels.test],
            [v.label for v in labels.test],
            10,
            protocol={},
            identity={},
        )
        predict(
            student,
            clips,
            tables,
            batch_size=batch_size,
            workers=workers,
            device=torch.device("cpu"),
        )
        predictions.append(tables)
    with h5py.File(finished[0] / "predictions.h5") as file:
        stored = file["clip_scores"][:]
    for tables in predictions:
        assert tables.status == predictions[0].status
        np.testing.assert_allclose(tables.clip_scores, stored, atol=1e-4)
    readable = np.isfinite(stored).all(axis=(1, 2))
    np.testing.assert_allclose(stored[readable].sum(axis=2), 1, atol=1e-5)
    images = clips[(0, 0)]["clips"].float().div(255).numpy()
    mean, std = (
        np.array(v).reshape(1, 3, 1, 1, 1)
        for v in ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
    )
    with torch.no_grad():
        logits = (
            student(torch.from_numpy((images - mean) / std).float())["label"]
            .numpy()
            .astype(np.float64)
        )
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(stored[0], expected, atol=1e-4)


class Crashing(EvaluationClips):
    """End the whole process, like a decoder that crashes in C."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if key[1] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


def test_a_video_that_crashes_its_decoder_costs_itself_alone(
    dataset: str, finished: tuple[Path, dict[str, Any]]
) -> None:
    student, labels = load_student(finished[0]), load_labels(dataset)
    videos = [v.path for v in labels.test]
    tables = Predictions.empty(
        labels.classes, videos, [v.label for v in labels.test], 10, protocol={}, identity={}
    )
    clips = Crashing(labels, labels.test, ClipView(size=32), clip_frames=4, clips=10)
    predict(student, clips, tables, batch_size=16, workers=2, device=torch.device("cpu"))
    assert [f["video"] for f in tables.failures()] == [videos[2], "broken.mp4"]
    assert tables.reasons[2] == "its decoder crashed"
    whole = Predictions.read(finished[0] / "predictions.h5").clip_scores
    for i in (0, 1, 3):
        np.testing.assert_allclose(tables.clip_scores[i], whole[i], atol=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(
    dataset: str, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Killed in step 7 of 12, in mid-epoch: losses, weights and scores are those of the other
    run."""
    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt), StopsAt(7) as console:
        finetune(config(dataset, out), console)
    assert not (out / "predictions.h5").exists()
    with pytest.raises(UsageError, match="--resume"):
        finetune(config(dataset, out), Console(quiet=True))
    result = finetune(config(dataset, out, resume=True), Console(quiet=True))
    assert result["resumed_from_step"] == 6
    whole = finished[0]

    def losses(run: Path) -> list[tuple[int, float]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]

    assert losses(out) == losses(whole)
    assert len(losses(out)) == 12
    expected = load_student(whole).state_dict()
    for name, tensor in load_student(out).state_dict().items():
        assert torch.equal(tensor, expected[name])
    with h5py.File(out / "predictions.h5") as ours, h5py.File(whole / "predictions.h5") as theirs:
        np.testing.assert_array_equal(ours["clip_scores"][:], theirs["clip_scores"][:])
    again = finetune(config(dataset, out, resume=True), Console(quiet=True))
    assert again["already_finished"]
    assert again["metrics"] == result["metrics"]


def test_resume_refuses_other_classes(
    dataset: str, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    csv = Path(dataset.removeprefix("csv:"))
    renamed = csv.with_name("renamed.csv")
    write_whole(renamed, csv.read_bytes().replace(b",red,", b",crimson,"))
    with pytest.raises(CheckpointError, match=r"'crimson'.*'red'"):
        finetune(config(f"csv:{renamed}", finished[0], resume=True), Console(quiet=True))
    with pytest.raises(UsageError, match="--out"):
        evaluate(
            EvaluateConfig(runs=[str(finished[0])], dataset=f"csv:{renamed}"), Console(quiet=True)
        )
    other = EvaluateConfig(runs=[str(finished[0])], dataset=f"csv:{renamed}", out=str(tmp_path))
    with pytest.raises(CheckpointError, match="crimson"):
        evaluate(other, Console(quiet=True))


def test_finetuning_begins_where_another_run_ended(
    dataset: str,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The file decides architecture, length and size; the head is new; the report compares the two
    runs."""
    out = tmp_path / "second"
    one = {
        "epochs": 1,
        "epoch_clips": 4,
        "batch_size": 4,
        "lr": 1e-8,
        "workers": 0,
        "device": "cpu",
    }
    with Console() as console:
        result = finetune(
            FinetuneConfig.model_validate(
                {"init": str(finished[0]), "dataset": dataset, "out": str(out), "loop": one}
            ),
            console,
        )
    used = yaml.safe_load((out / "config.yaml").read_text())["finetune"]
    assert (used["clips"]["clip_frames"], used["clips"]["size"], used["student"]["width"]) == (
        4,
        32,
        0.0625,
    )
    assert sorted(result["tensors_left"]) == ["fc.bias", "fc.weight"]
    captured = capfd.readouterr()
    assert f"{result['tensors_loaded']} tensors" in captured.err
    assert "broken.mp4" in captured.err
    assert "top 1" in captured.out
    before, after = load_student(finished[0]), load_student(out)
    weights = "backbone.layer4.0.conv1.0.weight"
    torch.testing.assert_close(
        after.state_dict()[weights], before.state_dict()[weights], atol=1e-5, rtol=0
    )
    assert not torch.equal(after.head("label").weight, before.head("label").weight)

    reported = report(
        ReportConfig(folders=[str(finished[0]), str(out)], out=str(tmp_path / "report")),
        Console(quiet=True),
    )
    assert [(d["run"], d["base"], d["videos"]) for d in reported["differences"]] == [
        ("second", "scratch", 5)
    ]
    wrong = {
        "init": str(finished[0]),
        "dataset": dataset,
        "out": str(tmp_path / "x"),
        "student": {"width": 0.5},
    }
    with pytest.raises(CheckpointError, match=r"width.*0\.0625.*0\.5"):
        finetune(FinetuneConfig.model_validate(wrong), Console(quiet=True))


def test_evaluating_again_gives_the_same_numbers(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, result = finished
    again = evaluate(
        EvaluateConfig(runs=[str(run)], out=str(tmp_path), device="cpu"), Console(quiet=True)
    )
    assert again["metrics"] == result["metrics"]
    with pytest.raises(UsageError, match=r"test\.clips=3.*--out"):
        evaluate(
            EvaluateConfig.model_validate({"runs": [str(run)], "test": {"clips": 3}}),
            Console(quiet=True),
        )
    with pytest.raises(UsageError, match="distinit finetune"):
        evaluate(EvaluateConfig(runs=[str(tmp_path)]), Console(quiet=True))


def test_an_interrupted_evaluation_goes_on(
    dataset: str, finished: tuple[Path, dict[str, Any]]
) -> None:
    """Videos that a partial file has are not read again, and the numbers are the same."""
    run, result = finished
    whole = Predictions.read(run / "predictions.h5")
    partial = Predictions.read(run / "predictions.h5")
    for i in (0, 3):
        partial.status[i] = "pending"
        partial.clip_scores[i] = np.nan
    partial.write(run / "predictions.partial.h5")
    (run / "predictions.h5").unlink()
    again = finetune(config(dataset, run, resume=True), Console(quiet=True))
    assert again["metrics"] == result["metrics"]
    np.testing.assert_allclose(
        Predictions.read(run / "predictions.h5").clip_scores, whole.clip_scores, atol=1e-4
    )
    assert not (run / "predictions.partial.h5").exists()


def test_an_interrupted_evaluate_goes_on(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Ctrl-C after three of five videos: the next call does the other two, the one after it all of
    them again."""

    def tested(out: Path, console: StopsAt) -> int:
        """Return the number of tested videos."""
        values = {
            "runs": [str(finished[0])],
            "out": str(out),
            "device": "cpu",
            "test": {"batch_size": 1},
        }
        steps = console.steps_left
        with console:
            evaluate(EvaluateConfig.model_validate(values), console)
        return steps - console.steps_left

    assert tested(tmp_path / "whole", StopsAt(99)) == 5
    with pytest.raises(KeyboardInterrupt):
        tested(tmp_path / "broken", StopsAt(3))
    assert not (tmp_path / "broken/predictions.h5").exists()
    assert tested(tmp_path / "broken", StopsAt(99)) == 2
    whole, broken = (
        Predictions.read(tmp_path / name / "predictions.h5") for name in ("whole", "broken")
    )
    np.testing.assert_array_equal(broken.clip_scores, whole.clip_scores)
    assert (broken.status, broken.reasons) == (whole.status, whole.reasons)
    results = [
        json.loads((tmp_path / name / "result.json").read_text())["metrics"]
        for name in ("whole", "broken")
    ]
    assert results[0] == results[1]
    assert tested(tmp_path / "broken", StopsAt(99)) == 5
