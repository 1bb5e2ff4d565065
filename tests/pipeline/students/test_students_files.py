"""Student files, compared with plain safetensors and torchvision's model; misfits are refused by
name."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.models.video import r2plus1d_18

from distinit.pipeline.clips.transforms import normalize_clip
from distinit.pipeline.common.errors import CheckpointError
from distinit.pipeline.students.student import Student, build_student
from distinit.pipeline.students.student_files import (
    load_backbone,
    load_student,
    read_options,
    save_student,
)
from distinit.pipeline.students.student_options import StudentMeta, StudentOptions

NARROW = {"width": 0.125}


def student_of(heads: dict[str, int], **options: Any) -> Student:
    return build_student(StudentOptions.model_validate(options), heads).eval()


def clip_of(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_export_loads_strictly_into_torchvision(tmp_path: Path) -> None:
    student = student_of({"teacher": 7})
    # Statistics that differ from the initial ones, as after training.
    student.train()(clip_of())
    student.eval()
    save_student(
        tmp_path / "student.safetensors", student, StudentMeta(classes={"teacher": list("abcdefg")})
    )
    reference = r2plus1d_18(num_classes=7)
    reference.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    with torch.inference_mode():
        assert torch.equal(reference.eval()(clip_of()), student(clip_of())["teacher"])


def test_an_mlp_head_is_linear_gelu_linear_and_is_loaded_again(tmp_path: Path) -> None:
    options = StudentOptions.model_validate(NARROW)
    student = build_student(options, {"a": 3, "b": 4}, head_kinds={"a": "mlp"}).eval()
    assert student.head_kinds == {"a": "mlp", "b": "linear"}
    save_student(tmp_path / "s.safetensors", student, StudentMeta())
    state = load_file(tmp_path / "s.safetensors")
    assert state["heads.a.hidden.weight"].shape == (64, 64)
    with torch.inference_mode():
        features = student.features(clip_of()).double().numpy()
        hidden = features @ state["heads.a.hidden.weight"].double().numpy().T
        hidden = hidden + state["heads.a.hidden.bias"].double().numpy()
        hidden = hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))) / 2
        expected = hidden @ state["heads.a.output.weight"].double().numpy().T
        expected = expected + state["heads.a.output.bias"].double().numpy()
        assert np.allclose(student(clip_of())["a"].numpy(), expected, atol=1e-5)
        loaded = load_student(tmp_path / "s.safetensors")
        assert loaded.head_kinds == student.head_kinds
        assert torch.equal(loaded(clip_of())["a"], student(clip_of())["a"])
    other = build_student(options, {"label": 2})
    report = load_backbone(other, tmp_path / "s.safetensors")
    assert all(name.startswith("heads.") for name in report.left)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        assert json.loads(file.metadata()["distinit"])["head_kinds"] == {"a": "mlp"}
    # Files with only linear heads have the header of version 0.1.
    save_student(tmp_path / "plain.safetensors", other, StudentMeta())
    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        header = json.loads(file.metadata()["distinit"])
    assert set(header) == {"format_version", "options", "heads", "meta"}


def test_heads_of_features_are_written_in_the_teachers_scale(tmp_path: Path) -> None:
    options, kinds = StudentOptions.model_validate(NARROW), {"mlp": "mlp"}
    heads = {"linear": 3, "mlp": 3, "logits": 2}
    student = build_student(options, heads, head_kinds=kinds).eval()
    mean, scale = torch.tensor([5.0, -2.0, 0.5]), 7.5
    head_meta = {name: {"output": "features", "loss": "mse"} for name in ("linear", "mlp")}
    head_meta["logits"] = {"output": "logits", "loss": "cross-entropy"}
    scales = {"linear": (mean, scale), "mlp": (mean, scale)}
    with torch.inference_mode():
        scaled = student(clip_of())
        save_student(tmp_path / "s.safetensors", student, {"heads": head_meta}, scales)
        loaded = load_student(tmp_path / "s.safetensors")
        restored, unchanged = loaded(clip_of()), student(clip_of())
    for name in ("linear", "mlp"):
        assert torch.equal(unchanged[name], scaled[name])
        torch.testing.assert_close(restored[name], scaled[name] * scale + mean)
    assert torch.equal(restored["logits"], scaled["logits"])
    assert loaded.meta.model_dump()["heads"] == head_meta


def test_round_trip_with_several_heads_through_a_run_folder(tmp_path: Path) -> None:
    student = student_of({"a.b-c": 3, "keys": 2}, variant="vmz", channels=2, **NARROW)
    meta = {"classes": {"keys": ["no", "yes"]}, "clip_length": 16, "clip_size": 64, "store": "abc"}
    save_student(tmp_path / "student.safetensors", student, meta)
    loaded = load_student(tmp_path)
    assert loaded.options == student.options
    assert not loaded.training
    assert loaded.meta == StudentMeta(
        classes={"keys": ["no", "yes"]},
        clip_length=16,
        clip_size=64,
        mean=(0.0046635, 0.0046261),
        std=(0.972347, 0.755146),
        extra={"store": "abc"},
    )
    with torch.inference_mode():
        expected, outputs = student(clip_of(2)), loaded(clip_of(2))
    assert {name: torch.equal(outputs[name], expected[name]) for name in expected} == {
        "a.b-c": True,
        "keys": True,
    }
    with safe_open(tmp_path / "student.safetensors", framework="pt") as file:
        assert {name for name in file.keys() if name.startswith(("heads", "fc"))} == {  # noqa: SIM118
            "heads.a.b-c.weight",
            "heads.a.b-c.bias",
            "heads.keys.weight",
            "heads.keys.bias",
        }
        header = json.loads(file.metadata()["distinit"])
    assert header["format_version"] == 1
    assert header["options"]["variant"] == "vmz"
    assert header["heads"] == {"a.b-c": 3, "keys": 2}


def test_backbone_initialises_another_student(tmp_path: Path) -> None:
    source, target = student_of({"t": 5}, **NARROW), student_of({"labels": 2}, **NARROW)
    head = target.head("labels").weight.clone()
    save_student(tmp_path / "s.safetensors", source, StudentMeta())
    report = load_backbone(target, tmp_path / "s.safetensors")
    assert torch.equal(target.features(clip_of()), source.features(clip_of()))
    assert torch.equal(target.head("labels").weight, head)
    assert set(report.loaded) == set(source.backbone.state_dict())
    assert set(report.left) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"variant": "vmz"}, "variant is 'torchvision' in the file, 'vmz' was asked for"),
        (
            {"architecture": "r3d_18"},
            "architecture is 'r2plus1d_18' in the file, 'r3d_18' was asked for",
        ),
        ({"width": 0.25}, "width is 0.125 in the file, 0.25 was asked for"),
        ({"channels": 2}, "channels is 3 in the file, 2 was asked for"),
    ],
)
@pytest.mark.parametrize("has_metadata", [True, False])
def test_misfits_are_refused_by_name(
    tmp_path: Path, wanted: dict[str, Any], words: str, has_metadata: bool
) -> None:
    path = tmp_path / "s.safetensors"
    source = student_of({"t": 5}, **NARROW)
    save_student(path, source, StudentMeta())
    # Without metadata the options are recognised by the shapes.
    if not has_metadata:
        save_file(load_file(path), path)
    target = student_of({"labels": 2}, **{**NARROW, **wanted})
    initial = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_backbone(target, path)
    assert words in str(caught.value)
    fitting = "what fits: architecture=r2plus1d_18 variant=torchvision width=0.125 channels=3"
    assert fitting in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("variant", ["torchvision", "vmz"])
def test_options_are_recognised_by_shapes_for_a_file_of_torchvision(
    tmp_path: Path, variant: str
) -> None:
    student = student_of({"t": 2}, variant=variant, width=0.5)
    save_file(student.backbone.state_dict(), tmp_path / "plain.safetensors")
    assert read_options(tmp_path / "plain.safetensors") == student.options
    with pytest.raises(CheckpointError, match="no 'distinit' metadata"):
        load_student(tmp_path / "plain.safetensors")


def test_damaged_third_party_and_missing_files(tmp_path: Path) -> None:
    student = student_of({"t": 5}, **NARROW)
    path = tmp_path / "student.safetensors"
    with pytest.raises(CheckpointError, match="no such file or run folder"):
        load_student(path)
    with pytest.raises(CheckpointError, match=r"holds no student\.safetensors"):
        load_student(tmp_path)
    save_student(path, student, StudentMeta())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_student(path)
    tensors = load_file_bytes(whole)
    newer = {"distinit": json.dumps({"format_version": 2})}
    save_file(tensors, path, newer)
    with pytest.raises(CheckpointError, match="format version 2, this distinit reads 1"):
        load_student(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no student that distinit knows"):
        load_backbone(student, path)
    tensors["layer1.0.conv1.1.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(
        CheckpointError, match=r"layer1.0.conv1.1.bias holds values that are not finite"
    ):
        load_backbone(student, path)


def load_file_bytes(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    student = student_of({"t": 5}, **NARROW)
    save_student(path, student, StudentMeta())
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match="3 class names for head 't', which has 5"):
        save_student(path, student, StudentMeta(classes={"t": ["a", "b", "c"]}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=path.name):
            save_student(path, student, StudentMeta())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "header",
    [
        {"heads": {"t": 10**12}},
        {"heads": {"t": 3, "u": 10**12}},
        {"heads": {"t": -1}},
        {"heads": {}},
        {"options": {"width": 8}},
        {"options": {"width": float("nan")}},
        {"meta": {"clip_length": 10**12, "clip_size": 10**6}},
        {"meta": []},
        {"heads": [3]},
    ],
    ids=str,
)
def test_a_header_that_claims_more_than_its_tensors_is_refused(
    header: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "student.safetensors"
    save_student(path, student_of({"t": 3}, **NARROW), StudentMeta())
    tensors = load_file(path)
    good = {"format_version": 1, "options": NARROW, "heads": {"t": 3}, "meta": {}}
    save_file(tensors, path, {"distinit": json.dumps(good)})
    load_student(path)
    save_file(tensors, path, {"distinit": json.dumps({**good, **header})})
    with pytest.raises(CheckpointError, match=r"student\.safetensors"):
        load_student(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "3", "[]", '{"format_version": 1}', ""])
def test_metadata_that_is_no_header_is_refused(text: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"distinit": text})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_student(tmp_path / "a.safetensors")


@pytest.mark.parametrize("channels", [2, 3])
def test_the_exported_normalisation_is_the_one_of_clips(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "student.safetensors"
    save_student(path, student_of({"t": 5}, channels=channels, **NARROW), StudentMeta())
    meta = load_student(path).meta
    assert meta.mean is not None
    assert meta.std is not None
    clip = torch.arange(channels * 8).reshape(1, channels, 2, 2, 2) * 10
    clip = clip.to(torch.uint8) if channels == 3 else clip.float()
    mean, std = (torch.tensor(v).view(channels, 1, 1, 1) for v in (meta.mean, meta.std))
    expected = (clip / (255 if channels == 3 else 1) - mean) / std
    torch.testing.assert_close(normalize_clip(clip), expected)
