"""Stages two and three with a student of optical flow, end to end, on copies and on flow that was
prepared."""

from __future__ import annotations

import csv
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.prepared.prepare_options import PrepareConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.targets.dataset import StudentClips
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import TargetSampler
from distinit.pipeline.training.distillation_options import ClipOptions, TrainConfig
from distinit.pipeline.video import flow
from distinit.pipeline.video.frames import read_frames
from distinit.stages.finetune import finetune
from distinit.stages.prepare import prepare
from distinit.stages.train_student import train_student

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
LOOP = {"epochs": 1, "epoch_clips": 8, "batch_size": 4, "workers": 0, "device": "cpu"}


def config_of(tiny_store, tmp_path: Path, small: Path) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "store": os.fspath(tiny_store.path),
            "out": os.fspath(tmp_path / "student"),
            "student": {"width": 0.1, "channels": 2},
            "clips": {"clip_frames": 4, "size": 32},
            "loop": LOOP,
            "video_roots": {"videos": os.fspath(small)},
            "held_out": 0.3,
        }
    )


def tuned_config(tiny_store, tmp_path: Path, init: str, **changes: object) -> FinetuneConfig:
    names = sorted(path.name for path in tiny_store.videos.iterdir())
    lines = [
        f"{tiny_store.videos / name},{'ab'[i % 2]},{'train' if i < 8 else 'test'}"
        for i, name in enumerate(names)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split1", *lines]) + "\n")
    return FinetuneConfig.model_validate(
        {
            "init": init,
            "dataset": f"csv:{tmp_path / 'labels.csv'}",
            "out": os.fspath(tmp_path / "tuned"),
            "loop": LOOP,
            "test": {"clips": 2, "workers": 0},
            **changes,
        }
    )


def test_a_student_of_flow_is_trained_and_finetuned(tiny_store, tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    small = tmp_path / "small"
    prepare(
        PrepareConfig.model_validate({"sources": [os.fspath(tiny_store.videos)], "out": small}),
        QUIET,
    )
    result = train_student(config_of(tiny_store, tmp_path, small), QUIET)
    assert result["steps"] == 2
    student = load_student(tmp_path / "student")
    assert student.options.channels == 2
    assert student.meta.mean == (0.0046635, 0.0046261)
    tuned = finetune(tuned_config(tiny_store, tmp_path, result["run"]), QUIET)
    assert tuned["test_videos"] == 4


def test_a_student_of_flow_reads_flow_that_was_prepared(tiny_store, tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    out = tmp_path / "flow"

    def run(**changes: object) -> dict[str, Any]:
        values = {
            "sources": [os.fspath(tiny_store.videos)],
            "out": out,
            "copies": {"size": (37, 49)},
            "flow": True,
        }
        return prepare(PrepareConfig.model_validate({**values, "workers": 2, **changes}), QUIET)

    first = run()
    assert (first["new"], first["ok"], first["failed"], "psnr" in first) == (12, 12, 0, False)
    files = sorted((out / "videos").iterdir())
    assert [file.name for file in files] == [
        f"{path.name}.h5" for path in sorted(tiny_store.videos.iterdir())
    ]
    with open(out / "status.csv", newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert {(row["status"], row["width"], row["height"], row["psnr"]) for row in rows} == {
        ("ok", "49", "37", "")
    }
    with h5py.File(files[0]) as file:
        assert float(rows[0]["clipped"]) == pytest.approx(file["flow"].attrs["clipped"], abs=1e-6)
    # The same command goes on: what is whole stays, what is not is made again.
    files[0].write_bytes(files[0].read_bytes()[:5000])
    files[1].unlink()
    again = run()
    assert (again["new"], again["ok"]) == (2, 12)
    with pytest.raises(UsageError, match=r"bound=16\.0.*bound=8\.0"):
        run(flow_bound=8.0)
    with pytest.raises(UsageError, match="flow"):
        run(flow=False)
    with pytest.raises(UsageError, match=r"--flow.*--short-side"):
        run(copies={"short_side": 32})

    # Targets are those of the RGB frames with the same pts; the clip is the flow between those
    # frames.
    store = TargetStore.open(tiny_store.path)
    sampler = TargetSampler(
        store, teachers=("sure",), picks=PickRule.parse("random"), clip_frames=4, videos=store.usable(), seed=1,
        epoch_clips=12, ahead=1,
    )  # fmt: skip
    view = ClipView(size=32)
    clips = StudentClips(sampler, view, {"videos": os.fspath(out)}, channels=2)
    for sample in range(12):
        draw, example = sampler.draw(0, sample), clips[0, sample]
        assert (example["video"], example["unreadable"]) == (draw.video, [])
        np.testing.assert_array_equal(example["targets"]["sure"], draw.targets["sure"])
        frames = read_frames(store.video_path(draw.video), draw.indices, view.frame_view())
        picked = np.searchsorted(draw.indices, draw.picked)
        assert frames.pts[picked].tolist() == draw.picked_pts.tolist()
        grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in frames.images]
        expected = np.stack([cv2.calcOpticalFlowFarneback(a, b, None, 0.5**0.5, 5, 10, 2, 7, 1.5, 256)
                             for a, b in pairwise(grey)])  # fmt: skip
        top, left = int(draw.top * 6), int(draw.left * 18)
        expected = expected[:, top : top + 32, left : left + 32].transpose(3, 0, 1, 2)
        if draw.flip:
            expected = expected[..., ::-1] * np.array([-1, 1]).reshape(2, 1, 1, 1)
        np.testing.assert_allclose(example["clip"], expected.clip(-16, 16), atol=16 / 254 + 1e-3)

    config = config_of(tiny_store, tmp_path, out)
    result = train_student(config, QUIET)
    assert (result["steps"], result["unreadable"]) == (2, {})
    with pytest.raises(UsageError, match=r"student\.channels=2.*student\.channels=3"):
        train_student(
            config.model_copy(update={"student": StudentOptions(width=0.1), "out": f"{out}-x"}),
            QUIET,
        )
    with pytest.raises(UsageError, match=r"37x49.*46, 61"):
        train_student(
            config.model_copy(update={"clips": ClipOptions(size=40), "out": f"{out}-y"}), QUIET
        )
    with pytest.raises(UsageError, match=r"clips\.scale=\[1\.0, 1\.5\]"):
        train_student(
            config.model_copy(
                update={"clips": ClipOptions(size=32, scale=(1.0, 1.5)), "out": f"{out}-z"}
            ),
            QUIET,
        )
    tuned = finetune(
        tuned_config(tiny_store, tmp_path, result["run"], copies=os.fspath(out)), QUIET
    )
    assert (tuned["test_videos"], tuned["unreadable"], tuned["metrics"]["failed"]) == (4, {}, [])


def test_without_opencv_the_extra_is_named(
    tiny_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=r"student\.channels=2 .*distinit\[flow\]"):
        flow.require_opencv()
    config = config_of(tiny_store, tmp_path, tiny_store.videos)
    with pytest.raises(UsageError, match=r"distinit\[flow\]"):
        train_student(config, QUIET)
