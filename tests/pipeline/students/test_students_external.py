"""Third-party students: torchvision's models without their classifier, and modules of users."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from torchvision.models import video
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Conv2Plus1D,
    Conv3DSimple,
    R2Plus1dStem,
    VideoResNet,
)

from distinit.pipeline.common.errors import CheckpointError, UsageError
from distinit.pipeline.students.student import Student, build_student, count_parameters
from distinit.pipeline.students.student_files import (
    load_backbone,
    load_student,
    read_options,
    save_student,
)
from distinit.pipeline.students.student_options import StudentMeta, StudentOptions

MODULE = '''
from torch import nn


def maps(channels=3, depth=4):
    """Features [B, D, t, h, w], of any number of channels."""
    return nn.Sequential(nn.Conv3d(channels, depth, 3, stride=2), nn.ReLU(), nn.BatchNorm3d(depth))


class Flat(nn.Module):
    """Features [B, 6], of RGB alone; with a layer named as a head of torchvision's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 5, 3)
        self.fc = nn.Linear(5, 6)

    def forward(self, clip):
        return self.fc(self.conv(clip).mean((2, 3, 4)))


def tokens():
    return nn.Flatten(2)


def number():
    return 3
'''


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write a module to the working directory, as users do."""
    (tmp_path / "my_students.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield
    import sys

    sys.modules.pop("my_students", None)


def student_of(name: str, clip: tuple[int, int] = (8, 32), **options: Any) -> Student:
    torch.manual_seed(0)
    student_options = StudentOptions.model_validate({"architecture": name, **options})
    return build_student(student_options, {"t": 5}, clip=clip).eval()


def clip_of(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 8, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("architecture", "convolution", "stem"),
    [("r2plus1d_34", Conv2Plus1D, R2Plus1dStem), ("r3d_34", Conv3DSimple, BasicStem)],
)
def test_34_layers_are_torchvisions_blocks_stacked_3_4_6_3(
    architecture: str, convolution: Any, stem: Any
) -> None:
    with torch.device("meta"):
        reference = VideoResNet(BasicBlock, [convolution] * 4, [3, 4, 6, 3], stem, num_classes=400)
        student = build_student(StudentOptions(architecture=architecture), {"t": 400})
    shapes = {
        name: tensor.shape
        for name, tensor in reference.state_dict().items()
        if not name.startswith("fc.")
    }
    state = student.backbone.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert count_parameters(student) == count_parameters(reference)


def test_s3d_gives_torchvisions_features_and_its_file_loads_there(tmp_path: Path) -> None:
    student = student_of("s3d")
    assert student.feature_size == 1024
    save_student(tmp_path / "s.safetensors", student, StudentMeta(clip_size=32))
    reference = video.s3d(num_classes=5)
    state = load_file(tmp_path / "s.safetensors")
    keys = reference.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("fc.")}, strict=False
    )
    assert keys.missing_keys == ["classifier.1.weight", "classifier.1.bias"]
    assert not keys.unexpected_keys
    with torch.inference_mode():
        expected = reference.eval().features(clip_of()).mean((2, 3, 4))
        assert torch.equal(student.features(clip_of()), expected)
        loaded = load_student(tmp_path / "s.safetensors")
        assert torch.equal(loaded(clip_of())["t"], student(clip_of())["t"])
        other = student_of("s3d")
        assert len(load_backbone(other, tmp_path / "s.safetensors").loaded) == len(
            student.backbone.state_dict()
        )
        assert torch.equal(other.features(clip_of()), expected)


def test_two_channels_change_the_first_convolution_alone() -> None:
    rgb, flow = student_of("s3d"), student_of("s3d", channels=2)
    a, b = rgb.backbone.state_dict(), flow.backbone.state_dict()
    differing = [name for name in a if a[name].shape != b[name].shape]
    assert len(differing) == 1
    assert b[differing[0]].shape[1] == 2
    assert flow(clip_of(2))["t"].shape == (2, 5)


def test_a_users_modules(modules: None, tmp_path: Path) -> None:
    maps, flat = (
        student_of("my_students:maps", options={"depth": 7}),
        student_of("my_students:Flat"),
    )
    assert (maps.feature_size, flat.feature_size) == (7, 6)
    with torch.inference_mode():
        assert torch.allclose(maps.features(clip_of()), maps.backbone(clip_of()).mean((2, 3, 4)))
        assert student_of("my_students:maps", channels=2)(clip_of(2))["t"].shape == (2, 5)
    path = tmp_path / "s.safetensors"
    save_student(path, flat, StudentMeta(clip_size=32))
    assert {"fc.weight", "heads.t.weight"} <= set(load_file(path))
    with torch.inference_mode():
        loaded = load_student(path, factory="my_students:Flat")
        assert torch.equal(loaded(clip_of())["t"], flat(clip_of())["t"])
    # A file alone runs no code.
    for read in (load_student, read_options):
        with pytest.raises(
            CheckpointError, match=r"made by my_students:Flat, whose code would be run; name it"
        ):
            read(path)
    with pytest.raises(CheckpointError, match="architecture is 'my_students:Flat' in the file"):
        load_backbone(maps, path)


def test_refusals_name_the_problem(modules: None) -> None:
    with pytest.raises(
        ValidationError, match=r"'resnet18' is not known; there are: r2plus1d_18, .*s3d, .*:factory"
    ):
        StudentOptions(architecture="resnet18")
    with pytest.raises(ValidationError, match=r"width is 0\.5; s3d has only 1"):
        StudentOptions(architecture="s3d", width=0.5)
    with pytest.raises(ValidationError, match="options depth: r3d_18 takes none"):
        StudentOptions(architecture="r3d_18", options={"depth": 3})
    for name, words in {
        "my_students:nobody": "has no function 'nobody'",
        "no_such_module:f": "ModuleNotFoundError",
        "my_students:number": "the factory returned a int",
        "my_students:tokens": r"gives \[1, 3, 8192\] for one clip, allowed: features \[1, D\] or \[1, D, t, h, w\]",
    }.items():
        with pytest.raises(UsageError, match=words):
            student_of(name)
    with pytest.raises(
        UsageError, match=r"'my_students:Flat' does not take clips .* \['B', 2, 8, 32, 32\]"
    ):
        student_of("my_students:Flat", channels=2)
    with pytest.raises(UsageError, match=r"options\.weights: s3d begins with fresh weights"):
        student_of("s3d", options={"weights": "DEFAULT"})
    assert isinstance(student_of("my_students:maps").backbone, nn.Sequential)
