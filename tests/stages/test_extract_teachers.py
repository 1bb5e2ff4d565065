"""A store grows by the teacher whose rows it holds: its code may not change, whatever its name and
weights say."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import (
    DistInitError,
    StoreMismatchError,
    TeacherError,
    UsageError,
)
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.digests import seal
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import (
    ExportConfig,
    InfoConfig,
    MergeConfig,
    VerifyConfig,
)
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_info import targets_info
from distinit.stages.targets_merge import targets_merge
from distinit.stages.targets_verify import targets_verify

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
MODULE = """
import multiprocessing
import os

import torch
from torch import nn

CHANGES = {
    "": lambda x, net: net(x),
    "three times": lambda x, net: 3 * net(x),
    "reversed": lambda x, net: net(x).flip(1),
    "two classes exchanged": lambda x, net: net(x)[:, [0, 1, 2, 4, 3, *range(5, 30)]],
    "one class": lambda x, net: net(x) + 0.02 * torch.eye(30)[7],
    "normalisation": lambda x, net: net(x * 1.02 + 0.01),
    "interpolation": lambda x, net: net(nn.functional.interpolate(x, (9, 9), mode="bicubic")),
    "channels": lambda x, net: net(x.flip(1)),
    "not a number": lambda x, net: torch.where(torch.arange(30) == 3, torch.nan, net(x)),
    "next to nothing": lambda x, net: net(x) + 1e-6,
    "dropout": lambda x, net: net(nn.functional.dropout(x, 0.1, training=True)),
    "batch": lambda x, net: net(x - x.mean(0)),
    "on a worker": lambda x, net: net(x) * (1 if multiprocessing.parent_process() is None else 3),
}


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 30))

    def forward(self, x):
        return CHANGES[os.environ.get("CHANGE", "")](x, super().forward)


def teacher():
    return Net()
"""
REAL = ["three times", "reversed", "two classes exchanged", "one class", "normalisation", "interpolation", "channels",
        "not a number"]  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with the teacher's module and three videos in videos/."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "grown_teachers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    (tmp_path / "videos").mkdir()
    for number in range(3):
        add_video(tmp_path, number)
    return tmp_path


def add_video(home: Path, number: int) -> None:
    frames = np.random.default_rng(number).integers(0, 255, (9, 4, 6, 3)).repeat(8, 1).repeat(8, 2)
    write_video(home / "videos" / f"v{number}.mp4", frames.astype(np.uint8), fps=25)


def extract(home: Path, out: str = "s.zarr", **more: Any) -> dict[str, Any]:
    spec = TeacherSpec(name="grown_teachers:teacher", options={"name": "t", "input_size": "32"})
    values = {
        "sources": [str(home / "videos")],
        "out": home / out,
        "teachers": [spec],
        "batch_size": 4,
        "decoders": 1,
    }
    return extract_targets(ExtractConfig.model_validate({**values, **more}), QUIET)


def node(store: Path) -> Path:
    return store / "teachers" / "t" / "fingerprint"


def files(store: Path) -> dict[str, str]:
    return {
        str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in store.rglob("*") if f.is_file()
    }


def test_a_store_refuses_rows_of_code_that_changed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(home)
    add_video(home, 3)
    before = files(home / "s.zarr")
    for change in REAL:
        monkeypatch.setenv("CHANGE", change)
        with pytest.raises(StoreMismatchError, match="'t'"):
            extract(home)
        with pytest.raises(StoreMismatchError, match="'t'"):
            extract(home, retry_failed=True, allow_different_numerics=True, accept_teachers=["t"])
    assert files(home / "s.zarr") == before
    findings = targets_verify(
        VerifyConfig(store=str(home / "s.zarr"), deep=1, allow_teachers=["grown_teachers:teacher"]),
        QUIET,
    )["findings"]
    assert {f["teacher"] for f in findings} == {"t"}
    monkeypatch.setenv("CHANGE", "next to nothing")
    assert extract(home)["ok"] == 4
    monkeypatch.setenv("CHANGE", "")
    assert targets_verify(
        VerifyConfig(store=str(home / "s.zarr"), deep=9, allow_teachers=["grown_teachers:teacher"]),
        QUIET,
    )["ok"]


def test_bf16_is_no_way_around(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(home, precision="bf16")
    add_video(home, 3)
    monkeypatch.setenv("CHANGE", "one class")
    with pytest.raises(StoreMismatchError, match="'t'"):
        extract(home, precision="bf16")


@pytest.mark.parametrize("change", ["dropout", "batch"])
def test_logits_that_are_not_the_image_s_are_not_cached(
    home: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setenv("CHANGE", change)
    with pytest.raises(TeacherError, match="'t'"):
        extract(home)
    assert not (home / "s.zarr").exists()


def test_a_worker_has_a_teacher_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGE", "on a worker")
    with pytest.raises(DistInitError, match="StoreMismatchError: teacher 't'"):
        extract(home, workers=1, retries=0)
    assert TargetStore.open(home / "s.zarr").n_rows == 0


def test_a_store_of_version_0_1_gets_its_fingerprint_once_rows_agree(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(home)
    shutil.rmtree(node(home / "s.zarr"))
    before = files(home / "s.zarr")
    (home / "videos").rename(home / "elsewhere")
    extract(
        home, sources=[f"videos={home / 'elsewhere'}"]
    )  # nothing to add, and so nothing to prove
    assert files(home / "s.zarr") == before
    (home / "elsewhere").rename(home / "videos")
    add_video(home, 3)
    monkeypatch.setenv("CHANGE", "two classes exchanged")
    for accepted in ([], ["t"]):
        with pytest.raises(StoreMismatchError, match="'t'"):
            extract(home, accept_teachers=accepted)
    assert files(home / "s.zarr") == before
    monkeypatch.setenv("CHANGE", "")
    extract(home)
    assert info(home)["basis"] == {"kind": "rows", "rows": 9, "videos": 3}
    shards = {
        f: digest
        for f, digest in before.items()
        if "/c/" in f and "/videos/" not in f and "/segments/" not in f
    }
    assert shards.items() <= files(home / "s.zarr").items()


def test_a_part_of_a_video_is_enough_for_the_check(home: Path) -> None:
    shutil.rmtree(home / "videos")
    (home / "videos").mkdir()
    frames = np.random.default_rng(0).integers(0, 255, (300, 4, 6, 3)).repeat(8, 1).repeat(8, 2)
    write_video(home / "videos" / "long.mp4", frames.astype(np.uint8), fps=25, gop=12)
    cut = {"shard_rows": 256, "sampling": Sampling(every=1)}
    extract(home, **cut)
    for commits in ("frames", "teachers/t"):  # as of a run that was killed
        shutil.rmtree(home / "s.zarr" / "commits" / commits / "000001")
    shutil.rmtree(node(home / "s.zarr"))
    assert extract(home, **cut)["ok"] == 1
    assert info(home)["basis"] == {"kind": "rows", "rows": 32, "videos": 1}


def test_without_videos_a_user_must_say_that_it_is_the_same(home: Path) -> None:
    extract(home)
    shutil.rmtree(node(home / "s.zarr"))
    shutil.copy(home / "videos" / "v0.mp4", home / "videos" / "v1.mp4")  # another file now
    (home / "videos" / "v0.mp4").unlink()
    (home / "videos" / "v2.mp4").write_bytes(b"x")
    with pytest.raises(StoreMismatchError, match=r"--accept-teacher t"):
        extract(home, sources=[], retry_failed=True)
    with pytest.raises(UsageError, match="--accept-teacher u"):
        extract(home, sources=[], accept_teachers=["u"])
    extract(home, sources=[], retry_failed=True, accept_teachers=["t"])
    assert info(home)["basis"] == {"kind": "accepted"}
    targets_export(ExportConfig(store=str(home / "s.zarr"), out=str(home / "some.zarr")), QUIET)
    assert info(home, "some.zarr")["basis"] == {"kind": "accepted"}


def info(home: Path, store: str = "s.zarr") -> dict[str, Any]:
    return dict(
        targets_info(InfoConfig(store=str(home / store)), QUIET)["teachers"][0]["fingerprint"] or {}
    )


def test_parts_of_other_code_are_not_merged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (1, 2):
        extract(home, f"{part}.zarr", part=f"{part}/2", shard_rows=256)
    for change in ("reversed", "next to nothing"):
        monkeypatch.setenv("CHANGE", change)
        extract(home, f"{change}.zarr", part="2/2", shard_rows=256)
    with pytest.raises(StoreMismatchError, match=r"reversed\.zarr"):
        targets_merge(
            MergeConfig(
                parts=[str(home / "1.zarr"), str(home / "reversed.zarr")], out=str(home / "no.zarr")
            ),
            QUIET,
        )
    assert not (home / "no.zarr").exists()
    targets_merge(
        MergeConfig(
            parts=[str(home / "1.zarr"), str(home / "next to nothing.zarr")],
            out=str(home / "all.zarr"),
        ),
        QUIET,
    )
    assert info(home, "all.zarr")["basis"] == {"kind": "new"}
    shutil.rmtree(node(home / "2.zarr"))
    targets_merge(
        MergeConfig(
            parts=[str(home / "1.zarr"), str(home / "2.zarr")], out=str(home / "half.zarr")
        ),
        QUIET,
    )
    assert info(home, "half.zarr") == {}


def test_a_fingerprint_that_cannot_be_read_is_found(home: Path) -> None:
    extract(home)
    path = node(home / "s.zarr") / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["distinit"]["probes"] = 99
    path.write_bytes(seal(document))
    assert [
        f["teacher"]
        for f in targets_verify(VerifyConfig(store=str(home / "s.zarr")), QUIET)["findings"]
    ] == ["t"]
    with pytest.raises(DistInitError, match="99"):
        extract(home)
