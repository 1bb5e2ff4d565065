"""`targets verify --deep`: the videos are decoded and the teachers run once more."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DistInitError, UsageError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.digests import digest_bytes, seal
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import ExportConfig, VerifyConfig
from distinit.pipeline.teachers.recorded import load_spec, recorded_spec
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_verify import targets_verify
from distinit.tests import warm

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
MODULE = """
from torch import nn


def teacher():
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))
"""
"""Random weights, by the number in a file."""
FACTORY = "deep_teachers:teacher"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with videos/, two weights files, classes.txt and a store of two teachers, one of
    them int8."""
    (tmp_path / "deep_teachers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    sys.modules.pop("deep_teachers", None)
    import deep_teachers

    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(deep_teachers.teacher().state_dict(), tmp_path / f"weights{seed}.pt")
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "videos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        shade = rng.integers(0, 150, (300 if number == 3 else 20 + number, 1, 1, 3)) + rng.integers(
            0, 99, (1, 4, 6, 3)
        )
        write_video(
            tmp_path / "videos" / f"v{number}.mp4",
            shade.repeat(8, 1).repeat(8, 2).astype(np.uint8),
            fps=25,
        )
    extract(tmp_path, "one", "float16")
    extract(tmp_path, "small", "int8")
    return tmp_path


def extract(made: Path, name: str, encoding: str, **more: Any) -> None:
    """Teacher `name` over all of videos/, into s.zarr."""
    options = {"input_size": "32", "classes": str(made / "classes.txt"), "name": name}
    spec = TeacherSpec(name=FACTORY, weights=str(made / "weights1.pt"), options=options)
    config = {
        "sources": [str(made / "videos")],
        "out": made / "s.zarr",
        "teachers": [spec],
        "encoding": encoding,
    }
    size = {"batch_size": 7, "shard_rows": 256, "sampling": Sampling(every=1)}
    extract_targets(ExtractConfig.model_validate({**config, **size, **more}), QUIET)


def deep(made: Path, *, weights: str = "weights1.pt", **options: Any) -> dict[str, Any]:
    weights_files = {name: str(made / weights) for name in ("one", "small")}
    options = {"allow_teachers": [FACTORY], **options}
    return targets_verify(
        VerifyConfig(store=str(made / "s.zarr"), deep=99, weights=weights_files, **options), QUIET
    )


def test_a_good_store_is_computed_again_to_the_bit(made: Path) -> None:
    (made / "videos").rename(made / "elsewhere")
    result = deep(made, video_roots={"videos": str(made / "elsewhere")})
    assert result["findings"] == []
    store = TargetStore.open(made / "s.zarr")
    assert len(store.index.video) > 5  # one video is cut into segments
    for compared in result["deep"]["teachers"].values():
        assert compared["rows"] == store.n_rows
        assert compared["bit_equal"] == 1
    text = (made / "s.zarr" / "teachers" / "one" / "zarr.json").read_text()
    assert "weights1.pt" in text
    assert str(made) not in text


def test_rows_of_several_runs_that_an_export_put_together(made: Path) -> None:
    shutil.copy(made / "videos" / "v0.mp4", made / "videos" / "v9.mp4")
    for name, encoding in (("one", "float16"), ("small", "int8")):
        extract(made, name, encoding, batch_size=5, allow_different_numerics=True)
    (made / "s.zarr").rename(made / "grown.zarr")
    targets_export(
        ExportConfig(store=str(made / "grown.zarr"), out=str(made / "half.zarr"), shard_rows=1024),
        QUIET,
    )
    targets_export(ExportConfig(store=str(made / "half.zarr"), out=str(made / "s.zarr")), QUIET)
    runs = [
        c["run"] for c in TargetStore.open(made / "s.zarr").index.teachers["one"].commits.values()
    ]
    assert any("mixed" in run for run in runs)
    result = deep(made)
    assert result["findings"] == []
    assert [c["rows"] for c in result["deep"]["teachers"].values()] == [result["rows"]] * 2


def test_the_command_names_another_teacher_and_a_changed_video(made: Path) -> None:
    shutil.copy(made / "videos" / "v0.mp4", made / "videos" / "v1.mp4")
    (made / "videos" / "v2.mp4").unlink()
    words = ["targets", "verify", str(made / "s.zarr"), "--deep", "5", "--json"]
    words += [
        "--teacher-weights",
        f"one={made}/weights1.pt",
        "--teacher-weights",
        f"small={made}/weights2.pt",
    ]
    words += ["--allow-teacher", FACTORY]
    process = warm.run(*words)
    assert process.returncode == 1, process.stderr
    findings = json.loads(process.stdout)["findings"]
    assert len(findings) == 3
    assert findings[0]["teacher"] == "small"
    assert "not the teacher that was extracted: its sha256 is" in findings[0]["what"]
    assert "v1.mp4: changed, its digest is" in findings[1]["what"]
    assert "v2.mp4: no such file" in findings[2]["what"]
    assert all(f["what"] in process.stderr for f in findings)


def test_rows_of_another_frame_are_found_though_every_digest_is_right(made: Path) -> None:
    store = made / "s.zarr"
    rows = TargetStore.open(store).frames(0)[2]
    # A shard whose first two rows are exchanged, committed as if it had been written so.
    import zarr

    for array in ("logits", "entropy"):
        opened = zarr.open_array(store / "teachers" / "one" / array, mode="r+")
        two = opened[int(rows[0]) : int(rows[0]) + 2]
        opened[int(rows[0]) : int(rows[0]) + 2] = two[::-1]
    shard = int(rows[0]) // 256
    node = store / "commits" / "teachers" / "one" / f"{shard:06d}" / "zarr.json"
    document = json.loads(node.read_text())
    for name, record in document["attributes"]["distinit"]["files"].items():
        data = (store / name).read_bytes()
        record.update(size=len(data), blake2b=digest_bytes(data))
    node.write_bytes(seal(document))
    assert targets_verify(VerifyConfig(store=str(store)), QUIET)["ok"]
    (finding,) = deep(made)["findings"]
    assert (finding["teacher"], finding["shard"]) == ("one", shard)
    assert "v0.mp4: the teacher computes different logits of 2 frames" in finding["what"]


def test_what_is_missing_is_asked_for(made: Path) -> None:
    findings = targets_verify(VerifyConfig(store=str(made / "s.zarr"), deep=1), QUIET)["findings"]
    assert [f["teacher"] for f in findings] == ["one", "small"]
    assert f"--allow-teacher '{FACTORY}'" in findings[0]["what"]
    findings = targets_verify(
        VerifyConfig(store=str(made / "s.zarr"), deep=1, allow_teachers=[FACTORY]), QUIET
    )["findings"]
    assert [f["teacher"] for f in findings] == ["one", "small"]
    assert "weights1.pt" in findings[0]["what"]
    assert "--teacher-weights" in findings[0]["what"]
    with pytest.raises(UsageError, match="it has: one, small"):
        targets_verify(
            VerifyConfig(store=str(made / "s.zarr"), deep=1, weights={"other": "x"}), QUIET
        )
    with pytest.raises(ValidationError, match="--deep"):
        VerifyConfig(store=str(made / "s.zarr"), video_roots={"videos": "x"})


CODE = """
from pathlib import Path


def teacher(**options):
    Path(__file__).with_name("canary").write_text("ran")
"""


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"name": "os:system", "options": {"command": "touch CANARY"}}, "os:system"),
        ({"name": "canary_code:teacher", "options": {}}, "canary_code:teacher"),
        (
            {"name": "subprocess:getoutput", "options": {"cmd": "touch CANARY"}},
            "subprocess:getoutput",
        ),
        ({"name": "timm:hf-hub:owner/model", "options": {}}, "timm:hf-hub:owner/model"),
        ({"name": "timm:local-dir:/FOLDER", "options": {}}, "timm:local-dir:/FOLDER"),
        (
            {"name": "timm:resnet18", "options": {"checkpoint_path": "/FOLDER/weights1.pt"}},
            "checkpoint_path",
        ),
        (
            {"name": "timm:resnet18", "options": {"pretrained_cfg_overlay": "{url: http://x}"}},
            "pretrained_cfg_overlay",
        ),
        ({"name": "torchvision:resnet18", "options": {"norm_layer": "os.system"}}, "norm_layer"),
        ({"name": "torchvision:resnet18", "options": {"input_size": "99999999"}}, "input_size"),
        (
            {"name": "torchvision:resnet18", "options": {"num_classes": "&a [*a, *a]"}},
            "num_classes",
        ),
        ({"name": "torchvision:../x", "options": {}}, "torchvision:../x"),
        ({"name": "efficientnet_lite0", "weights": "/FOLDER/weights1.pt"}, "/FOLDER/weights1.pt"),
        ({"name": "torchvision:resnet18"}, "not downloaded"),
        ({"name": "timm:resnet18"}, "timm:resnet18"),
        ({"name": "torchvision:resnet18", "fetch": True}, "not downloaded"),
        ({"name": ["os:system"]}, "zarr.json"),
        ({"name": "efficientnet_lite0", "more": 1}, "zarr.json"),
        ("os:system", "zarr.json"),
    ],
)
def test_what_a_store_names_is_not_run_fetched_or_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: Any, named: str
) -> None:
    def refused(*args: object, **more: object) -> None:
        raise AssertionError(f"opened {args}")

    (tmp_path / "canary_code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    torch.save({}, tmp_path / "weights1.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refused)
    text = (
        json.dumps(spec)
        .replace("CANARY", str(tmp_path / "canary"))
        .replace("/FOLDER", str(tmp_path))
    )
    with pytest.raises(DistInitError) as caught:
        load_spec(recorded_spec({"spec": json.loads(text)}, "teachers/one/zarr.json"))
    assert named.replace("/FOLDER", str(tmp_path)) in str(caught.value)
    assert not (tmp_path / "canary").exists()
    assert "canary_code" not in sys.modules


def test_deep_runs_no_command_of_a_store(made: Path) -> None:
    node = made / "s.zarr" / "teachers" / "one" / "zarr.json"
    document = json.loads(node.read_text())
    spec = {"name": "os:system", "options": {"command": f"touch {made}/canary"}}
    document["attributes"]["distinit"]["provenance"]["spec"] = spec
    node.write_bytes(seal(document))
    findings = targets_verify(VerifyConfig(store=str(made / "s.zarr"), deep=1), QUIET)["findings"]
    assert any(f["teacher"] == "one" and "os:system" in f["what"] for f in findings)
    assert not (made / "canary").exists()


def test_a_library_teacher_loads_by_itself_from_what_is_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    (tmp_path / "hub/hub/checkpoints").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "hub/hub/checkpoints/resnet18-f37072fd.pth")
    spec = {"name": "torchvision:resnet18", "options": {"input_size": "64", "mean": "0.5"}}
    teacher = load_spec(recorded_spec({"spec": spec}, "here"))
    assert teacher.input_shape == (64, 64)
    assert len(teacher.classes) == 1000
