"""Stage three on prepared copies, looked up by the paths of the originals in the labels."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import LabelsError, UsageError
from distinit.pipeline.evaluation.evaluation_options import EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.evaluation.labelled_clips import EvaluationClips, LabelledClips
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.evaluation.predictions import Predictions
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.video.encode import write_video
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune
from distinit.stages.prepare import prepare

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
VIEW = ClipView(size=32)
SIDES = ("train", "test")


def copy(*sources: Path | str, out: Path) -> dict[str, Any]:
    config = {
        "sources": list(map(os.fspath, sources)),
        "out": out,
        "copies": {"size": (37, 49), "crf": 8},
    }
    return prepare(PrepareConfig.model_validate(config | {"workers": 1}), QUIET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """DIR/{train,test}/{red,blue}/*.mp4, three of each, and their copies."""
    root = tmp_path_factory.mktemp("labelled") / "actions"
    random = np.random.default_rng(0)
    for side in SIDES:
        for label in ("red", "blue"):
            (root / side / label).mkdir(parents=True)
            for i in range(3):
                images = (
                    random.integers(0, 60, (9 + i, 6, 8, 3))
                    .repeat(8, 1)
                    .repeat(8, 2)
                    .astype(np.uint8)
                )
                images[..., 0 if label == "red" else 2] += 150
                write_video(root / side / label / f"{i}.mp4", images, fps=8)
    small = root.parent / "small"
    assert copy(root, out=small)["ok"] == 12
    return root, small


def test_copies_give_the_clips_of_the_originals(folder: tuple[Path, Path]) -> None:
    root, small = folder
    labels = load_labels(f"folder:{root}")
    copied = load_labels(f"folder:{root}", copies=os.fspath(small))
    assert (copied.train, copied.test, copied.root) == (labels.train, labels.test, labels.root)
    a, b = (
        LabelledClips(each, VIEW, clip_frames=4, seed=3, epoch_clips=6) for each in (labels, copied)
    )
    for sample in range(6):
        x, y = a[1, sample], b[1, sample]
        assert (x["video"], x["start"], x["label"]) == (y["video"], y["start"], y["label"])
        assert y["unreadable"] == []
        assert (
            0 < (x["clip"].int() - y["clip"].int()).abs().float().mean() < 6
        )  # other pixels, the same picture
    c, d = (
        EvaluationClips(each, each.test, VIEW, clip_frames=4, clips=3) for each in (labels, copied)
    )
    for i in range(6):
        x, y = c[0, i], d[0, i]
        assert (x["frames"], x["starts"].tolist(), y["note"]) == (
            y["frames"],
            y["starts"].tolist(),
            "",
        )
        assert 0 < (x["clips"].int() - y["clips"].int()).abs().float().mean() < 6


def test_finetune_and_evaluate_read_copies(folder: tuple[Path, Path], tmp_path: Path) -> None:
    root, small = folder
    out = tmp_path / "run"
    values = {
        "dataset": f"folder:{root}",
        "copies": os.path.relpath(small),
        "out": os.fspath(out),
        "student": {"architecture": "r3d_18", "width": 0.0625},
        "clips": {"size": 32, "clip_frames": 4},
        "loop": {"batch_size": 4, "epochs": 1, "epoch_clips": 4, "workers": 0, "device": "cpu"},
        "test": {"clips": 2, "workers": 0},
    }
    result = finetune(FinetuneConfig.model_validate(values), QUIET)
    assert (result["unreadable"], result["metrics"]["failed"]) == ({}, [])
    assert yaml.safe_load((out / "config.yaml").read_text())["finetune"]["copies"] == os.fspath(
        small
    )
    predictions = Predictions.read(out / "predictions.h5")
    assert predictions.protocol["copies"]["size"] == [37, 49]
    again = evaluate(EvaluateConfig(runs=[os.fspath(out)], device="cpu"), QUIET)
    assert again["metrics"] == result["metrics"]
    np.testing.assert_array_equal(
        Predictions.read(out / "predictions.h5").clip_scores, predictions.clip_scores
    )
    # null: the videos themselves, whatever the run was trained on.
    evaluate(
        EvaluateConfig(
            runs=[os.fspath(out)], device="cpu", copies=None, out=os.fspath(tmp_path / "o")
        ),
        QUIET,
    )
    originals = Predictions.read(tmp_path / "o" / "predictions.h5")
    assert "copies" not in originals.protocol
    assert 0 < np.abs(originals.clip_scores - predictions.clip_scores).max() < 0.2


def test_labels_elsewhere_lists_and_links_find_the_copies(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    root, small = folder
    names = [
        f"{side}/{label}/{i}.mp4" for side in SIDES for label in ("blue", "red") for i in range(3)
    ]

    def csv(path: Path, prefix: str) -> str:
        lines = [f"{prefix}{name},{name.split('/')[1]},{name.split('/')[0]}" for name in names]
        path.write_text("path,label,split1\n" + "\n".join(lines) + "\n")
        return f"csv:{path}"

    def copies_of(dataset: str, videos: Path) -> list[str]:
        labels = load_labels(dataset, copies=os.fspath(videos))
        return [
            os.path.relpath(labels.file(video).path, videos)
            for video in (*labels.train, *labels.test)
        ]

    expected = [f"actions/{name}.mp4" for name in names]
    # A label file somewhere else that names the originals, by absolute paths and relative ones.
    assert copies_of(csv(tmp_path / "absolute.csv", f"{root}/"), small) == expected
    assert (
        copies_of(csv(tmp_path / "relative.csv", os.path.relpath(root, tmp_path) + "/"), small)
        == expected
    )
    # Prepared through a link, from a list, and by another corpus name.
    (tmp_path / "link").symlink_to(root)
    assert copy(f"linked={tmp_path / 'link'}", out=tmp_path / "linked")["ok"] == 12
    assert copies_of(f"folder:{root}", tmp_path / "linked") == [
        f"linked/{name}.mp4" for name in names
    ]
    (tmp_path / "list.txt").write_text(
        "\n".join(f"{os.path.relpath(root, tmp_path)}/{name}" for name in names)
    )
    assert copy(tmp_path / "list.txt", out=tmp_path / "listed")["ok"] == 12
    assert len(set(copies_of(f"folder:{root}", tmp_path / "listed"))) == 12
    # On another machine: copies and a label file, no originals.
    (tmp_path / "there").mkdir()
    shutil.copytree(small, tmp_path / "there" / "small")
    alone = csv(tmp_path / "there" / "labels.csv", "")
    assert copies_of(alone, tmp_path / "there" / "small") == expected
    with pytest.raises(LabelsError, match="12 of 12 "):
        load_labels(alone)


def test_what_is_no_copy_of_the_labelled_video_is_not_read(
    folder: tuple[Path, Path], tmp_path: Path
) -> None:
    root, small = tmp_path / "actions", tmp_path / "small"
    shutil.copytree(folder[0], root)
    assert copy(root, out=small)["ok"] == 12
    write_video(
        root / "test" / "red" / "0.mp4", np.zeros((30, 48, 64, 3), np.uint8)
    )  # not what was copied
    os.utime(root / "test" / "red" / "1.mp4")  # the same file, touched
    (small / "actions" / "test" / "blue" / "0.mp4.mp4").unlink()
    labels = load_labels(f"folder:{root}", copies=os.fspath(small))
    clips = EvaluationClips(labels, labels.test, VIEW, clip_frames=4, clips=3)
    errors = {video.path: clips[0, i].get("error") for i, video in enumerate(labels.test)}
    assert (
        errors.pop("test/red/0.mp4")
        == "the original has changed since it was copied: run distinit prepare again"
    )
    assert errors.pop("test/blue/0.mp4") == f"no copy in {small}: see status.csv for the reason"
    assert set(errors.values()) == {None}
    with pytest.raises(UsageError, match=r"prepared\.json"):
        load_labels(f"folder:{root}", copies=os.fspath(root))
    shutil.rmtree(small / "actions")
    with pytest.raises(UsageError, match="12 "):
        load_labels(f"folder:{root}", copies=os.fspath(small))
