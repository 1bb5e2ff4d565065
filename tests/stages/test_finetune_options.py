"""Stage three's other ways: all splits, a frozen backbone, other protocols, fusion, comparison, own
videos."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from distinit.cli import main
from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.clips.transforms import normalize_clip
from distinit.pipeline.common.config import load_config
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, SourceError, UsageError
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig, PredictConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.labelled_clips import EvaluationClips
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.reporting.figures.filters import read_filters, variation_over_time
from distinit.pipeline.reporting.run_folders import read_run
from distinit.pipeline.students.inflate import video_name
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.stages.options import ReportConfig
from distinit.stages.predict import predict
from distinit.stages.report import report
from distinit.tests import warm
from distinit.tests.tiny_finetuning import tiny_finetuning

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine videos, three of them blue; two splits."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(2)
    rows = ["path,label,source,split1,split2"]
    for i in range(9):
        label = "blue" if i % 3 == 0 else "red"
        images = random.integers(0, 60, (8 + i, 6, 9, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        images[..., 2 if label == "blue" else 0] += 120
        write_video(root / f"{i}.mp4", images, fps=8)
        sides = ("train", "test") if i < 5 else ("test", "train")
        rows.append(f"{i}.mp4,{label},s{i},{sides[0]},{sides[1]}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


def config(folder: Path, out: Path, **changes: Any) -> FinetuneConfig:
    values = tiny_finetuning(f"csv:{folder / 'labels.csv'}", out, **changes)
    return FinetuneConfig.model_validate(values)


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs")
    return out, finetune(config(folder, out / "all", split="all"), QUIET)


def test_all_splits_go_on_after_an_interrupt(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Interrupted in the first split, the others have not begun."""
    with pytest.raises(UsageError, match="--resume"):
        finetune(config(folder, tmp_path / "none", split="all", resume=True), QUIET)
    finetune(config(folder, tmp_path / "all" / "split1", split=1), QUIET)
    with pytest.raises(UsageError, match="--resume"):
        finetune(config(folder, tmp_path / "all", split="all"), QUIET)
    result = finetune(config(folder, tmp_path / "all", split="all", resume=True), QUIET)
    assert result["splits"]["1"]["already_finished"]
    assert result["mean"] == runs[1]["mean"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_another_kind_of_run_is_left_alone(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path, resume: bool
) -> None:
    """Both write config.yaml and result.json into it, and a resume would take one's checkpoint for
    the other's."""
    shutil.copytree(runs[0] / "all" / "split1", tmp_path / "one")
    shutil.copytree(runs[0] / "all", tmp_path / "all")
    (student := tmp_path / "student").mkdir()
    (student / "config.yaml").write_text("train-student: {store: t.zarr}\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"one.*--split all"):
        finetune(config(folder, tmp_path / "one", split="all", resume=resume), QUIET)
    with pytest.raises(UsageError, match=r"all.*1, 2"):
        finetune(config(folder, tmp_path / "all", resume=resume), QUIET)
    with pytest.raises(
        UsageError,
        match=r"student.*config.yaml.*train-student",
    ):
        finetune(config(folder, student, resume=resume), QUIET)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_test_on_videos_of_the_training_is_told_of(
    folder: Path,
    runs: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Split 2 tests the five videos that split 1 trains on."""
    values = {
        "runs": [str(runs[0] / "all/split1")],
        "out": str(tmp_path / "seen"),
        "split": 2,
        "device": "cpu",
    }
    with Console() as console:
        evaluate(EvaluateConfig.model_validate(values), console)
    assert (
        "warning: 5 of 5 test videos are among those that the run was trained on"
        in capfd.readouterr().err
    )
    other = tmp_path / "other.csv"
    other.write_text(
        "path,label,split1\n0.mp4,blue,train\n1.mp4,red,train\n6.mp4,blue,test\n5.mp4,red,test\n"
    )
    values |= {
        "dataset": f"csv:{other}",
        "root": str(folder),
        "out": str(tmp_path / "unseen"),
        "split": None,
    }
    with Console() as console:
        evaluate(EvaluateConfig.model_validate(values), console)
    assert "trained on" not in capfd.readouterr().err


def test_a_resize_is_held_against_the_size_of_the_initialisation(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    init = {"init": str(runs[0] / "all/split1"), "student": None}
    with pytest.raises(
        UsageError,
        match=r"clips\.resize.*20x30.*32.*clips\.size",
    ):
        finetune(config(folder, tmp_path / "small", clips={"resize": [20, 30]}, **init), QUIET)
    assert not (tmp_path / "small").exists()
    finetune(config(folder, tmp_path / "fits", clips={"resize": [36, 40]}, **init), QUIET)


def test_all_splits_are_runs_of_their_own_and_their_mean(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, result = runs
    each = [result["splits"][split]["metrics"]["top1"]["value"] for split in ("1", "2")]
    assert result["mean"]["top1"]["mean"] == pytest.approx(np.mean(each))
    assert result["mean"]["top1"]["std"] == pytest.approx(np.std(each, ddof=1))
    assert json.loads((out / "all/result.json").read_text())["mean"] == result["mean"]
    assert [
        r["name"]
        for r in report(
            ReportConfig(folders=[str(out / "all")], out=str(tmp_path / "report")), QUIET
        )["runs"]
    ] == [
        "split1",
        "split2",
    ]
    single = finetune(config(folder, tmp_path / "two", split=2), QUIET)
    assert single["metrics"] == result["splits"]["2"]["metrics"]
    again = finetune(config(folder, out / "all", split="all", resume=True), QUIET)
    assert again["mean"] == result["mean"]
    assert all(part["already_finished"] for part in again["splits"].values())
    tested = evaluate(
        EvaluateConfig(runs=[str(out / "all")], out=str(tmp_path / "again"), device="cpu"), QUIET
    )
    assert tested["mean"] == result["mean"]
    assert (tmp_path / "again/split2/predictions.h5").exists()
    with pytest.raises(UsageError, match="split"):
        evaluate(
            EvaluateConfig(runs=[str(tmp_path / "two")], split="all", out=str(tmp_path / "x")),
            QUIET,
        )
    with pytest.raises(UsageError, match="--resume"):
        finetune(config(folder, out / "all", split="all"), QUIET)


def test_a_linear_probe_leaves_the_backbone(
    folder: Path,
    runs: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    start = runs[0] / "all/split1"
    probe = config(
        folder, tmp_path / "probe", init=str(start), freeze="backbone", dropout=0.2, verbose=True
    )
    with Console() as console:
        result = finetune(probe, console)
    before, after = (load_student(path).state_dict() for path in (start, tmp_path / "probe"))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.startswith("backbone."), name
    stderr = capfd.readouterr().err
    assert "backbone frozen" in stderr
    assert "2 (blue) to 3 (red)" in stderr
    assert "always guessing 'red'" in stderr
    assert "stem.0.weight [4, 3, 3, 7, 7] from stem.0.weight" in stderr
    assert "left: fc.weight [2, 32]" in stderr
    assert result["train_videos_of_class"] == {"blue": 2, "red": 3}
    with pytest.raises(CheckpointError, match=r'freeze.*"backbone".*"none"'):
        finetune(
            config(folder, tmp_path / "probe", init=str(start), dropout=0.2, resume=True), QUIET
        )


def test_an_inflated_run_keeps_the_filters_it_began_with(folder: Path, tmp_path: Path) -> None:
    """For Figure 3: a ResNet-18 of 4 planes, with its squares, and what finetuning made of their
    copies."""
    options = StudentOptions(architecture="r3d_18", width=0.0625)
    reference = build_student(options, {"label": 2}).backbone.state_dict()
    names = {video_name(name): name for name in resnet18(weights=None).state_dict()}
    squares = {
        names[new]: t.mean(2) if t.ndim == 5 else t for new, t in reference.items() if new in names
    }
    torch.save(squares, tmp_path / "resnet18.pth")
    out = tmp_path / "inflated"
    finetune(config(folder, out, init=f"inflate:{tmp_path / 'resnet18.pth'}"), QUIET)
    before, after = read_filters(read_run(out, "inflated"))
    repeated = squares["conv1.weight"].numpy()[:, :, None].repeat(3, axis=2) / 3
    assert np.array_equal(before.weights.astype(np.float32), repeated)
    assert (before.start, before.state, after.state) == (
        True, "inflated, before finetuning", "inflated, after finetuning",
    )  # fmt: skip
    assert variation_over_time(before.weights) == pytest.approx(0, abs=1e-7)
    assert variation_over_time(after.weights) > 1e-4


def test_shuffled_and_frozen_clips_have_the_frames_of_ordered_ones(
    folder: Path, runs: Any, tmp_path: Path
) -> None:
    """Held against the ordered clip, and the saved scores against the student called here."""
    run = str(runs[0] / "all/split1")
    labels = load_labels(f"csv:{folder / 'labels.csv'}")
    clips = {
        order: EvaluationClips(
            labels, labels.test, ClipView(size=32), clip_frames=4, clips=3, crops=3, order=order
        )[0, 1]
        for order in ("ordered", "shuffled", "frozen")
    }
    ordered, shuffled, frozen = (
        clips[order]["clips"] for order in ("ordered", "shuffled", "frozen")
    )
    assert torch.equal(frozen, ordered[:, :, 2:3].expand_as(ordered))
    orders = []
    for n in range(9):
        orders.append(
            [
                next(s for s in range(4) if torch.equal(ordered[n, :, s], shuffled[n, :, t]))
                for t in range(4)
            ]
        )
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert all(orders[3 * n] == orders[3 * n + 1] == orders[3 * n + 2] for n in range(3)), (
        "crops share it"
    )
    with pytest.raises(UsageError, match=r"test\.frames=frozen.*--out"):
        evaluate(
            EvaluateConfig.model_validate({"runs": [run], "test": {"frames": "frozen"}}), QUIET
        )
    # Into one folder: the results of one order are not taken for those of another.
    for order, given in (("frozen", frozen), ("shuffled", shuffled)):
        test = {"clips": 3, "frames": order, "workers": 0}
        options = {"runs": [run], "out": str(tmp_path), "test": test, "device": "cpu"}
        evaluate(EvaluateConfig.model_validate(options), QUIET)
        with torch.no_grad():
            expected = load_student(run)(normalize_clip(given[1::3]))["label"].softmax(dim=1)
        scores = Predictions.read(tmp_path / "predictions.h5").clip_scores[1]
        np.testing.assert_allclose(scores, expected.numpy(), atol=1e-4)
    with pytest.raises(UsageError, match=r"test\.frames=shuffled"):
        EvaluationClips(
            labels,
            labels.test,
            ClipView(size=32),
            clip_frames=4,
            clips=3,
            channels=2,
            order="shuffled",
        )


def test_three_crops_and_logits(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Views equal crops that the test makes, and scores those of the student that it calls."""
    run = str(runs[0] / "all/split1")
    test = {"clips": 3, "crops": 3, "scores": "logits", "workers": 0}
    for key in ("clips", "crops", "scores"):
        with pytest.raises(UsageError, match=rf"test\.{key}={test[key]}.*--out"):
            evaluate(
                EvaluateConfig.model_validate({"runs": [run], "test": {key: test[key]}}), QUIET
            )
    evaluate(
        EvaluateConfig.model_validate(
            {"runs": [run], "out": str(tmp_path), "test": test, "device": "cpu"}
        ),
        QUIET,
    )
    predictions = Predictions.read(tmp_path / "predictions.h5")
    assert predictions.clip_scores.shape == (4, 9, 2)
    labels, view = load_labels(f"csv:{folder / 'labels.csv'}"), ClipView(size=32)
    one, three = (
        EvaluationClips(labels, labels.test, view, clip_frames=4, clips=3, crops=crops)[0, 1][
            "clips"
        ]
        for crops in (1, 3)
    )
    assert torch.equal(three[1::3], one), "the middle one is that of a single crop"
    frames = read_frames(
        labels.absolute(labels.test[1]), np.arange(14), view.frame_view()
    ).images  # [14, 37, 49, 3]
    for clip, start in enumerate((0, 5, 10)):  # 14 frames, 4 a clip
        for crop, left in enumerate((0, 8, 17)):
            expected = frames[start : start + 4, 2:34, left : left + 32].transpose(3, 0, 1, 2)
            np.testing.assert_array_equal(three[3 * clip + crop].numpy(), expected)
    student = load_student(run)
    with torch.no_grad():
        features = student.features(normalize_clip(three))
        logits = student.head("label")(features)
    np.testing.assert_allclose(predictions.clip_scores[1], logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(predictions.features[1], features.numpy(), atol=1e-4)
    with h5py.File(tmp_path / "predictions.h5") as file:
        np.testing.assert_allclose(file["video_scores"][1], logits.numpy().mean(axis=0), atol=1e-4)
        assert json.loads(file.attrs["protocol"])["scores"] == "logits"


def test_runs_are_fused_and_compared_without_decoding(
    folder: Path,
    runs: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    a = str(runs[0] / "all/split1")
    finetune(
        config(
            folder, tmp_path / "b", loop={**config(folder, tmp_path).loop.model_dump(), "seed": 5}
        ),
        QUIET,
    )
    b = str(tmp_path / "b")
    with Console() as console:
        fused = evaluate(
            EvaluateConfig(runs=[a, b], fuse=True, weights=[1, 2], out=str(tmp_path / "f")), console
        )
    assert "per_clip" not in fused["metrics"]
    assert fused["metrics"]["videos"] == 4
    scores = [
        Predictions.read(Path(path) / "predictions.h5").video_scores
        for path in (a, b, tmp_path / "f")
    ]
    np.testing.assert_allclose(scores[2], (scores[0] + 2 * scores[1]) / 3, atol=1e-6)
    with Console() as console:
        compared = evaluate(
            EvaluateConfig(runs=[str(tmp_path / "f"), a], compare=True, out=str(tmp_path / "c")),
            console,
        )
    assert set(compared["measures"]) == {"top1", "top5", "class_mean"}
    assert compared["classes"]["red"]["videos"] == 3
    assert json.loads((tmp_path / "c/result.json").read_text()) == compared
    stdout = capfd.readouterr().out
    assert "late fusion of 1 × split1, 2 × b" in stdout
    assert "bootstrap over the 4 " in stdout
    assert "top 1 of each class" in stdout
    for wrong, words in (
        ({"runs": [a, b]}, "--fuse.*--compare"),
        ({"runs": [a], "fuse": True}, "--fuse"),
        ({"runs": [a], "compare": True}, "--compare.*1"),
        ({"runs": [a, b], "compare": True, "weights": [1, 2]}, "--weights.*--fuse"),
    ):
        with pytest.raises(UsageError, match=words):
            load_config(EvaluateConfig, "evaluate", options=wrong)
    every = str(runs[0] / "all")
    both = evaluate(
        EvaluateConfig(runs=[every, every], fuse=True, out=str(tmp_path / "every")), QUIET
    )
    assert both["mean"] == {
        name: mean for name, mean in runs[1]["mean"].items() if name != "per_clip"
    }
    assert (tmp_path / "every/split2/predictions.h5").exists()
    with pytest.raises(UsageError, match=r"split1, .*split2"):
        evaluate(EvaluateConfig(runs=[every, a], compare=True), QUIET)
    with pytest.raises(UsageError, match=r"--fuse.*--out"):
        evaluate(EvaluateConfig(runs=[a, b], fuse=True), QUIET)


def test_no_other_run_is_overwritten(folder: Path, runs: tuple[Path, dict[str, Any]]) -> None:
    a, b = (str(runs[0] / "all" / name) for name in ("split1", "split2"))
    before = {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()}
    for options in (
        {"runs": [a, a], "fuse": True, "out": a},
        {"runs": [a, a], "compare": True, "out": a},
        {"runs": [a], "split": 2, "out": b},
        {"runs": [a], "split": 2, "out": str(runs[0] / "all")},
    ):
        with pytest.raises(UsageError, match="--out"):
            evaluate(EvaluateConfig.model_validate(options), QUIET)
    with pytest.raises(UsageError, match="--out"):
        evaluate(
            EvaluateConfig.model_validate({"runs": [a], "test": {"clips": 3}, "out": a}), QUIET
        )
    assert {path: path.read_bytes() for path in runs[0].rglob("*") if path.is_file()} == before


def test_no_other_result_is_overwritten(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    a, b = (str(runs[0] / "all" / name) for name in ("split1", "split2"))
    out = str(tmp_path / "frozen")
    frozen = EvaluateConfig.model_validate({"runs": [a], "test": {"frames": "frozen"}, "out": out})
    for _ in range(2):  # the same once more is no other
        evaluate(frozen, QUIET)
    for options in (
        {"runs": [b]},
        {"runs": [a, a], "fuse": True},
        {"runs": [a, a], "compare": True},
    ):
        with pytest.raises(UsageError, match=r"frozen.*run=.*split1.*--out"):
            evaluate(EvaluateConfig.model_validate(options | {"out": out}), QUIET)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"):
        evaluate(frozen.model_copy(update={"out": str(tmp_path / "file")}), QUIET)
    model = evaluate(EvaluateConfig(runs=[str(Path(a) / "model.safetensors")]), QUIET)
    assert model["metrics"] == json.loads((Path(a) / "result.json").read_text())["metrics"]


def test_own_videos_get_classes_and_failures_reasons(
    folder: Path,
    runs: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = runs[0] / "all/split1"
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    command = [
        "predict",
        str(model),
        str(folder / "5.mp4"),
        str(tmp_path / "broken.mp4"),
        str(folder / "6.mp4"),
    ]
    with pytest.raises(SystemExit) as end:
        main([*command, "--json", "--device", "cpu", "--test-clips", "2"])
    assert end.value.code == 1, "one of the three could not be read"
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [Path(f["video"]).name for f in result["failed"]] == ["broken.mp4"]
    assert "warning:" in captured.err
    assert [Path(row["video"]).name for row in result["videos"]] == ["5.mp4", "6.mp4"]
    tested = Predictions.read(model / "predictions.h5")
    for row, name in zip(result["videos"], ("5.mp4", "6.mp4"), strict=True):
        scores = dict(
            zip(tested.classes, tested.video_scores[tested.videos.index(name)], strict=True)
        )
        probabilities = {best["class"]: best["probability"] for best in row["top"]}
        assert probabilities == pytest.approx(scores, abs=1e-4)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert row["frames"] == 8 + int(name[0])
    alone = predict(
        PredictConfig(model=str(model / "model.safetensors"), sources=[str(folder)], top=1), QUIET
    )
    assert alone["ok"]
    assert [len(row["top"]) for row in alone["videos"]] == [1] * 9
    with pytest.raises(SourceError):
        predict(PredictConfig(model=str(model), sources=[str(tmp_path / "none")]), QUIET)
    with pytest.raises(CheckpointError, match="none"):
        predict(PredictConfig(model=str(tmp_path / "none"), sources=[str(folder)]), QUIET)


def test_a_model_without_its_run_is_tested_on_what_it_is_given(
    folder: Path, runs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run_folder = runs[0] / "all/split1"
    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((run_folder / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"--dataset.*--out"):
        evaluate(EvaluateConfig(runs=[str(alone)]), QUIET)
    values = {
        "runs": [str(alone)],
        "dataset": f"csv:{folder / 'labels.csv'}",
        "out": str(tmp_path),
        "device": "cpu",
    }
    result = evaluate(EvaluateConfig.model_validate(values | {"test": {"clips": 2}}), QUIET)
    assert result["metrics"] == runs[1]["splits"]["1"]["metrics"]


STARTS = """
from distinit.pipeline.students.student import StudentOptions, build_student


def narrow():
    return build_student(StudentOptions(architecture="r3d_18", width=0.0625), {}).backbone
"""


def test_the_console_script_starts_from_a_function_in_the_working_folder(
    folder: Path, tmp_path: Path
) -> None:
    """Python itself does not look there: the first place of a script's path is the script's
    folder."""
    (tmp_path / "own_narrow_start.py").write_text(STARTS)
    script = Path(sysconfig.get_path("scripts")) / "distinit"
    code = (
        f"import runpy, sys; sys.path[0] = {str(script.parent)!r}; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    words = "finetune --init own_narrow_start:narrow --device cpu --frames 4 --size 32 --epochs 1"
    words += " --epoch-clips 4 --batch-size 4 --workers 0 --test-clips 1 --out run --json"
    dataset = f"csv:{folder / 'labels.csv'}"
    process = warm.run(*words.split(), "--dataset", dataset, code=code, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert (result["init"], result["tensors_loaded"]) == ("own_narrow_start:narrow", 120)


def test_presets_are_the_papers() -> None:
    for name in ("hmdb51", "ucf101"):
        options = {"root": "videos", "out": "run"}
        preset_config = load_config(FinetuneConfig, "finetune", preset=name, options=options)
        loop = preset_config.loop
        assert (preset_config.dataset, preset_config.split) == (name, 1)
        assert (loop.lr, loop.gamma, loop.step_epochs, loop.epochs) == (0.002, 0.1, 2, 8)
        assert (loop.epoch_clips, loop.weight_decay) == (40_000, 0.005)
        assert preset_config.test.protocol() == {
            "clips": 10,
            "crops": 1,
            "scores": "softmax",
            "frames": "ordered",
        }
    scratch = load_config(
        FinetuneConfig, "finetune", preset="scratch", options={"dataset": "hmdb51", "out": "run"}
    )
    assert (scratch.loop.lr, scratch.loop.step_epochs, scratch.loop.epochs) == (0.01, 10, 45)
    everything = load_config(
        FinetuneConfig,
        "finetune",
        preset="hmdb51",
        options={"root": "v", "out": "run", "split": "all"},
    )
    assert everything.split == "all"
