"""`export`: files that run without distinit, and folders for the hub, against plain torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import distinit
from distinit.pipeline.common.errors import CheckpointError, DistInitError, UsageError
from distinit.pipeline.evaluation.predictions import Predictions, metrics_from_file
from distinit.pipeline.students import graphs
from distinit.pipeline.students.student import Student, build_student
from distinit.pipeline.students.student_files import load_student, save_student
from distinit.pipeline.students.student_options import StudentOptions

pytestmark = pytest.mark.slow

T, SIZE = 4, 32
CLASSES = ["up", "down", "a|<b>"]
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


def student(channels: int = 3) -> Student:
    torch.manual_seed(0)
    options = StudentOptions.model_validate(
        {"architecture": "r3d_18", "width": 0.0625, "channels": channels}
    )
    built = build_student(options, {"label": 3, "features": 2})
    for module in built.modules():  # away from a fresh network's zeros and ones
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return built.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of a finetuned run, with predictions of 40 videos."""
    root = tmp_path_factory.mktemp("runs") / "ours"
    meta = {"clip_length": T, "clip_size": SIZE, "classes": {"label": CLASSES}}
    extra = {"dataset": "csv:/home/someone/labels.csv", "init": "/home/someone/student", "split": 1}
    save_student(root / "model.safetensors", student(), meta | extra)
    (root / "config.yaml").write_text(
        "finetune: {dataset: csv:/home/someone/har/labels.csv, init: scratch, split: 1}\n"
    )
    (root / "result.json").write_text('{"split": 1}')
    random = np.random.default_rng(0)
    tables = Predictions.empty(
        CLASSES,
        [f"{i}.mp4" for i in range(40)],
        random.integers(0, 3, 40).tolist(),
        2,
        protocol={"clips": 2, "crops": 1, "scores": "softmax"},
        identity={},
    )
    for i in range(40):
        scores = random.dirichlet([1, 1, 1], 2).astype(np.float32)
        tables.set_scores(i, scores, np.array([0, 1]), 9)
    tables.write(root / "predictions.h5")
    return root


def expected(clips: np.ndarray) -> list[np.ndarray]:
    """Features and outputs of the heads, by torch alone."""
    model, pixels = student(), torch.from_numpy(clips).double() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        features = model.backbone(((pixels - mean) / std).float())
        return [features.numpy(), *(model.head(n)(features).numpy() for n in model.classes)]


def outputs(file: Path, clips: np.ndarray) -> list[np.ndarray]:
    """Return the outputs of the file, by the library of its format alone."""
    if file.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(file))
        assert [each.name for each in session.get_outputs()] == [
            "features",
            "label",
            "head.features",
        ]
        return session.run(None, {"clips": clips})
    load = torch.jit.load if file.suffix == ".pt" else lambda f: torch.export.load(f).module()
    with torch.no_grad():
        return [each.numpy() for each in load(str(file))(torch.from_numpy(clips))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["onnx", "torch-export", "torchscript"])
def test_graphs_compute_what_the_student_does(to: str, run: Path, tmp_path: Path) -> None:
    if to == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module)
    out = tmp_path / {"onnx": "s.onnx", "torch-export": "s.pt2", "torchscript": "s.pt"}[to]
    result = distinit.export(run, to=to, out=out, quiet=True)
    assert result.largest_difference < 1e-4
    about = json.loads((tmp_path / f"{out.name}.json").read_text())
    assert about["verified"]["largest_difference"] == result.largest_difference
    assert about["heads"]["label"] == {"outputs": 3, "classes": CLASSES}
    assert about["clip"]["frames"] == T
    random = np.random.default_rng(1)
    for batch in (1, 5):
        clips = random.integers(0, 256, (batch, 3, T, SIZE, SIZE)).astype(np.uint8)
        for actual, want in zip(outputs(out, clips), expected(clips), strict=True):
            np.testing.assert_allclose(actual, want, atol=1e-4 * np.abs(want).max())


def test_an_export_that_differs_is_refused_and_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = graphs._MAKERS["torch-export"]

    def wrong(graph: graphs.Graph, clips: torch.Tensor) -> bytes:
        graph.mean.mul_(1.1)
        return make(graph, clips)

    monkeypatch.setitem(graphs._MAKERS, "torch-export", wrong)
    out = tmp_path / "s.pt2"
    with pytest.raises(CheckpointError, match="tolerance"):
        distinit.export(run, to="torch-export", out=out, quiet=True)
    assert not out.exists()
    assert not (tmp_path / "s.pt2.json").exists()


def test_wrong_files_and_missing_packages_are_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "mine.pt2"
    output.write_bytes(b"of another program")
    for to, out in (("torch-export", output), ("torch-export", tmp_path / "s.onnx"), ("hub", run)):
        with pytest.raises(UsageError, match=r"--out.*" + out.name):
            distinit.export(run, to=to, out=out, quiet=True)
    assert output.read_bytes() == b"of another program"
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnx.*distinit\[onnx\]"):
        distinit.export(run, to="onnx", out=tmp_path / "s.onnx", quiet=True)
    assert not (tmp_path / "s.onnx").exists()


def test_a_folder_for_the_hub_has_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    for _ in range(2):  # one's own folder is written again
        assert distinit.export(run, to="hub", out=out, quiet=True).largest_difference == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (out / "README.md").read_text()
    for key in ("top1", "class_mean"):
        e = metrics_from_file(run / "predictions.h5")[key]
        assert f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" in card
    assert "har/labels.csv" in card
    assert "<b>" not in card
    for path in out.iterdir():
        assert b"someone" not in path.read_bytes(), "no path of this machine is published"
    example = card.split("```python\n")[1].split("```")[0].replace("hf://ORG/NAME", str(out))
    given: dict[str, Any] = {}
    exec(example, given)
    assert given["clips"].dtype == torch.uint8
    assert given["outputs"]["label"].shape == (1, len(CLASSES))
    loaded = load_student(out)
    assert loaded.meta.classes == {"label": CLASSES}
    for name, tensor in student().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    leaked = shutil.copytree(run, tmp_path / "leaked")
    result = json.loads((leaked / "result.json").read_text())
    result["overlap"] = {"test_videos_seen_by_init": 7}
    (leaked / "result.json").write_text(json.dumps(result))
    distinit.export(leaked, to="hub", out=tmp_path / "leaked-hub", quiet=True)
    assert "7 of the test videos" in (tmp_path / "leaked-hub" / "README.md").read_text()
    assert "of the test videos" not in card
    alone = tmp_path / "alone"
    shutil.copy(run / "model.safetensors", tmp_path / "m.safetensors")
    distinit.export(tmp_path / "m.safetensors", to="hub", out=alone, quiet=True)
    assert "%" not in (alone / "README.md").read_text()


def test_a_repository_is_loaded_from_the_cache_of_the_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    shutil.copy(run / "model.safetensors", snapshot)
    (snapshot / "model.py").write_text("raise SystemExit('code of a repository was run')")
    clips: Any = torch.zeros(1, 3, T, SIZE, SIZE)
    for address in ("hf://org/name", "hf://org/name@main", f"hf://org/name@{commit}"):
        loaded = distinit.load_student(address)
        assert torch.equal(loaded(clips)["label"], load_student(run)(clips)["label"])
    for address in ("hf://org/other", "hf://name", "hf://org/name@v2"):
        with pytest.raises(DistInitError, match=address):
            distinit.load_student(address)
    (snapshot / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError):
        distinit.load_student("hf://org/name")
