"""ONNX Runtime computes what torch does, whatever the batch, and is left alone where it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreMismatchError, TeacherError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import VerifyConfig
from distinit.pipeline.teachers import engines
from distinit.pipeline.teachers.engines import onnx_version, use_engine
from distinit.pipeline.teachers.teacher import Teacher, load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_verify import targets_verify

# An older torch's exporter fails with newer versions of onnxscript: then torch runs the teachers.
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="requires torch 2.13"
)

FACTORIES = '''
import torch
from torch import nn


class Both(nn.Module):
    """Logits and features of a small network whose weights depend on `seed`."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=16)]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(32, 7)

    def forward(self, images):
        cells = self.trunk(images)
        features = cells.mean((2, 3))
        return {"logits": self.head(features), "features": features, "map": cells}


class Branching(Both):
    """Its code depends on a number that only the run knows: no graph holds that."""

    def forward(self, images):
        given = super().forward(images)
        return given if float(images.sum()) > 1e9 else {key: -value for key, value in given.items()}


def both(seed=0):
    return Both(seed)


def branching():
    return Branching(0)
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factories, and a cache for all tests here: an export takes seconds."""
    folder = tmp_path_factory.mktemp("engines")
    (folder / "engine_teachers.py").write_text(FACTORIES)
    return folder


@pytest.fixture(autouse=True)
def cache(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(made))
    monkeypatch.setenv("DISTINIT_CACHE", str(made / "cache"))
    sys.modules.pop("engine_teachers", None)
    return made / "cache" / "onnx"


def spec(
    factory: str = "both", views: tuple[str, ...] = ("center",), **options: str
) -> TeacherSpec:
    options = {"input_size": "32", **options}
    outputs: Any = ("logits", "features")
    return TeacherSpec(
        name=f"engine_teachers:{factory}", outputs=outputs, options=options, views=views
    )


def pictures(count: int, teacher: Teacher) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, *teacher.input_shape, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("views", [("center",), ("center", "grid:4", "flip")])
def test_rows_agree_with_torch_and_do_not_depend_on_the_batch(
    views: tuple[str, ...], cache: Path
) -> None:
    teacher = load_teacher(spec(views=views))
    images = pictures(8, teacher)
    expected = teacher.compute(images)
    assert use_engine(teacher, "onnx") == onnx_version()
    actual = teacher.compute(images)
    assert set(actual) == set(teacher.outputs)
    assert len(actual) == (2 if views == ("center",) else 6)
    for output, rows in actual.items():
        torch.testing.assert_close(rows, expected[output], atol=1e-5, rtol=1e-4)
        assert torch.equal(rows[:3], teacher.compute(images[:3])[output])
        assert torch.equal(rows[5:], teacher.compute(images[5:])[output])
    assert list(cache.glob("*.onnx"))
    # torch again: the engine is not part of the module.
    assert use_engine(teacher, "torch") == "torch"
    assert torch.equal(teacher.compute(images)["logits"], expected["logits"])


@pytest.mark.slow
def test_an_exported_file_is_used_again_if_it_is_still_this_teacher(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_engine(load_teacher(spec()), "onnx")
    before = set(cache.glob("*.onnx"))
    use_engine(load_teacher(spec(seed="1")), "onnx")
    (other,) = set(cache.glob("*.onnx")) - before
    for file in before:
        file.write_bytes(other.read_bytes())  # as if the code had changed since

    teacher = load_teacher(spec())
    images = pictures(2, teacher)
    expected = teacher.logits(images)
    use_engine(teacher, "onnx")
    torch.testing.assert_close(teacher.logits(images), expected, atol=1e-5, rtol=1e-4)

    def no_export(*_: Any, **__: Any) -> None:
        raise AssertionError("exported once more")

    monkeypatch.setattr(torch.onnx, "export", no_export)
    again = load_teacher(spec())
    use_engine(again, "onnx")
    assert torch.equal(again.logits(images), teacher.logits(images))


@pytest.mark.slow
def test_auto_takes_what_is_worth_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(spec())
    before = set(cache.glob("*"))
    assert use_engine(teacher, "auto") == "torch"  # decoding costs more than this teacher
    assert set(cache.glob("*")) == before
    monkeypatch.setattr(engines, "CHEAP_S", 0.0)
    monkeypatch.setattr(engines, "MIN_SPEEDUP", 0.0)
    assert use_engine(teacher, "auto") == onnx_version()
    assert use_engine(teacher, "auto", "torch") == "torch"

    branching = load_teacher(spec("branching"))
    assert use_engine(branching, "auto") == "torch"
    (reason,) = [
        actual
        for file in cache.glob("*.json")
        if (actual := json.loads(file.read_text())["reason"]) is not None
    ]
    assert "exported" in reason
    with pytest.raises(TeacherError, match="--engine onnx"):
        use_engine(branching, "onnx")
    with pytest.raises(TeacherError, match="bf16"):
        use_engine(teacher.to("cpu", "bf16"), "onnx")
    with pytest.raises(TeacherError, match="abacus 3"):
        use_engine(teacher, "auto", "abacus 3")


@pytest.mark.slow
def test_a_store_keeps_the_engine_of_its_first_run(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    rng = np.random.default_rng(0)
    shades = rng.integers(0, 256, (2, 20, 4, 6, 3)).repeat(8, 2).repeat(8, 3).astype(np.uint8)
    write_video(videos / "a.mp4", shades[0], fps=25)

    def extract(out: str, **more: Any) -> TargetStore:
        config = {"sources": [str(videos)], "out": tmp_path / out, "teachers": [spec()]}
        config |= {"sampling": {"every": 1}, "batch_size": 8}
        extract_targets(ExtractConfig.model_validate({**config, **more}), Console(quiet=True))
        return TargetStore.open(tmp_path / out)

    name = "engine_teachers-both"
    assert "engine" not in extract("torch.zarr", engine="torch").teachers[name].run
    store = extract("onnx.zarr", engine="onnx")
    assert store.teachers[name].run["engine"] == onnx_version()
    write_video(videos / "b.mp4", shades[1], fps=25)
    with pytest.raises(StoreMismatchError, match=r"run\.engine"):
        extract("onnx.zarr", engine="torch")
    with pytest.raises(StoreMismatchError, match=r"run\.engine"):
        extract("torch.zarr", engine="onnx")
    grown, at_once = extract("onnx.zarr"), extract("whole.zarr", engine="onnx")
    for output in ("", ".features"):
        runs = [commit["run"] for commit in grown.index.teachers[name + output].commits.values()]
        assert {run["engine"] for run in runs} == {onnx_version()}
        array = "features" if output else "logits"
        rows = [
            store.read_stored(name + output, array, store.committed_rows(name + output))
            for store in (grown, at_once)
        ]
        assert len(rows[0]) == 40
        np.testing.assert_array_equal(*rows)

    # A view that is added later, too.
    viewed = extract("onnx.zarr", teachers=[spec(views=("center", "flip"))])
    assert viewed.teachers[f"{name}.flip"].run["engine"] == onnx_version()

    # The precision of the store, as its engine.
    assert extract("onnx.zarr", precision="auto").teachers[name].run["precision"] == "fp32"
    deep = targets_verify(
        VerifyConfig(store=str(tmp_path / "onnx.zarr"), deep=9, allow_teachers=[spec().name]),
        Console(quiet=True),
    )
    assert deep["findings"] == []
    assert [t["bit_equal"] for t in deep["deep"]["teachers"].values()] == [1] * 4
