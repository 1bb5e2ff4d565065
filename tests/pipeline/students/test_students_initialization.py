"""Initialisations of students: inflation compared with the 2D network, Kinetics weights compared
with torchvision's model, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import ResNet18_Weights
from torchvision.models.video import R2Plus1D_18_Weights

from distinit.pipeline.common.errors import CheckpointError, DistInitError, UsageError, WeightsError
from distinit.pipeline.students.inflate import video_name
from distinit.pipeline.students.initialization import canonical_init, resolve_init
from distinit.pipeline.students.student import Student, build_student
from distinit.pipeline.students.student_files import InitReport, save_student
from distinit.pipeline.students.student_options import StudentMeta, StudentOptions


def image_network(name: str = "resnet18", classes: int = 10) -> nn.Module:
    """Return a ResNet with weights and statistics that differ from the initial ones."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
    return network.eval()


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return image_network()


@pytest.fixture(scope="module")
def places(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a checkpoint of CSAILVision: epoch, arch, state_dict under `module.`, best_prec1."""
    path = tmp_path_factory.mktemp("places") / "resnet18_places365.pth.tar"
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {"epoch": 90, "arch": "resnet18", "state_dict": state, "best_prec1": 54.7}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def initialised(
    init: str, wanted: dict[str, Any] | None = None, inflation: Any = "scaled"
) -> tuple[Student, InitReport]:
    initialization = resolve_init(
        init, StudentOptions.model_validate(wanted) if wanted is not None else None, inflation
    )
    torch.manual_seed(1)
    student = build_student(initialization.options, {"label": 3})
    return student.eval(), initialization.fill(student)


def pairs(network: nn.Module, student: Student) -> list[tuple[str, nn.Conv2d, nn.Conv3d]]:
    """Return each convolution of the two networks under its 2D name."""
    video = dict(student.backbone.named_modules())
    return [
        (name, module, video[video_name(f"{name}.weight").removesuffix(".weight")])
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "inflation"),
    [("r3d_18", "scaled"), ("r3d_18", "replicated"), ("mc3_18", "scaled")],
)
def test_every_convolution_has_the_same_output_for_a_static_clip_and_its_image(
    network: nn.Module, places: Path, architecture: str, inflation: str
) -> None:
    student, report = initialised(f"inflate:{places}", {"architecture": architecture}, inflation)
    convolutions = pairs(network, student)
    assert len(convolutions) == 20
    assert len([name for name in report.loaded if not name.endswith("num_batches_tracked")]) == 100
    assert sorted(report.left) == ["fc.bias", "fc.weight"]
    for name, flat, deep in convolutions:
        image = torch.randn(1, flat.in_channels, 9, 9)
        frames = deep.kernel_size[0]
        clip = image.unsqueeze(2).repeat(1, 1, 7, 1, 1)
        with torch.no_grad():
            expected, output = flat(image), deep(clip)
        if inflation == "replicated":
            expected = expected * frames
        inner = output[:, :, 1:-1] if frames > 1 else output
        assert inner.shape[2] > 0
        for frame in inner.unbind(2):
            torch.testing.assert_close(
                frame, expected, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_inflated_network_has_the_output_of_the_image_network_for_a_static_clip(
    network: nn.Module, places: Path
) -> None:
    """ResNet's max-pool is left out, which R3D does not have.

    The receptive field of frame 56 of 112 is 54 frames on either side, so padding has no effect.
    """
    student, _ = initialised(f"inflate:{places}")
    image = torch.randn(1, 3, 16, 16)
    backbone = student.backbone
    with torch.no_grad():
        flat = network.relu(network.bn1(network.conv1(image)))
        flat = network.layer4(network.layer3(network.layer2(network.layer1(flat))))
        deep = backbone.stem(image.unsqueeze(2).repeat(1, 1, 112, 1, 1))
        deep = backbone.layer4(backbone.layer3(backbone.layer2(backbone.layer1(deep))))
    torch.testing.assert_close(deep[:, :, 7], flat, atol=1e-3, rtol=1e-3)
    assert float(flat.abs().mean()) > 0.1


def test_flow_gets_the_mean_of_the_colours_for_both_channels(
    network: nn.Module, places: Path
) -> None:
    """Table 5's mean-inflated stem, in NumPy; all later layers are those of RGB."""
    student, report = initialised(f"inflate:{places}", {"channels": 2})
    kernel = network.conv1.weight.detach().numpy()  # [64, 3, 7, 7]
    expected = np.broadcast_to(kernel.mean(axis=1)[:, None, None] / 3, (64, 2, 3, 7, 7))
    np.testing.assert_allclose(
        student.backbone.stem[0].weight.detach().numpy(), expected, atol=1e-6
    )
    next_kernel = network.layer1[0].conv1.weight.detach().numpy()
    expected = np.broadcast_to(next_kernel[:, :, None] / 3, (64, 64, 3, 3, 3))
    np.testing.assert_allclose(
        student.backbone.layer1[0].conv1[0].weight.detach().numpy(), expected, atol=1e-6
    )
    line = next(line for line in report.lines if line.startswith("stem.0.weight"))
    assert line.endswith(
        "conv1.weight, averaged over RGB for 2 channels, repeated over 3 frames and divided by 3"
    )
    assert "left: fc.weight [10, 512]" in report.lines


@pytest.mark.parametrize(
    ("name", "wanted", "words"),
    [
        (
            "resnet18",
            {"architecture": "r2plus1d_18"},
            r"ResNet-18 does not inflate to r2plus1d_18: .*r3d_18 or mc3_18",
        ),
        (
            "resnet18",
            {"architecture": "r3d_34"},
            "to r3d_34: the depth differs; what fits: --student r3d_18",
        ),
        (
            "resnet18",
            {"variant": "vmz"},
            r"to r3d_18: variant 'vmz' is a rule of R\(2\+1\)D; what fits",
        ),
        ("resnet18", {"width": 0.5}, r"its width is 1, 0\.5 was asked for; what fits: --width 1"),
        (
            "resnet34",
            {"architecture": "r3d_18"},
            r"ResNet-34 does not inflate to r3d_18.*what fits: --student r3d_34",
        ),
        ("resnet50", {}, "bottleneck blocks"),
        ("vgg11", {}, "no 2D ResNet of RGB images"),
    ],
)
def test_misfits_of_inflation_are_refused_by_name(
    tmp_path: Path, name: str, wanted: dict[str, Any], words: str
) -> None:
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None, num_classes=2).state_dict()
    torch.save(
        {key: torch.zeros([]).expand(value.shape) for key, value in state.items()},
        tmp_path / "w.pth",
    )
    with pytest.raises(CheckpointError, match=words):
        resolve_init(f"inflate:{tmp_path / 'w.pth'}", StudentOptions.model_validate(wanted))


def test_torchvisions_weights_come_from_its_cache_or_the_error_names_their_url(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        # No server listens at this port.
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    for init in ("inflate:resnet18", "kinetics"):
        with pytest.raises(
            WeightsError, match=rf"--init {init}: .* cannot be fetched .*get https://.*:FILE"
        ):
            resolve_init(init, None)
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    student, report = initialised("inflate:resnet18")
    assert (student.options.architecture, report.path) == ("r3d_18", "inflate:resnet18")
    torch.testing.assert_close(student.backbone.stem[0].weight.sum(dim=2), network.conv1.weight)


@pytest.mark.slow
def test_kinetics_is_torchvisions_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(2)
    reference = torchvision.models.video.r2plus1d_18(weights=None, num_classes=400).eval()
    file = tmp_path / "hub/checkpoints" / Path(R2Plus1D_18_Weights.KINETICS400_V1.url).name
    file.parent.mkdir(parents=True)
    torch.save(reference.state_dict(), file)
    clip = torch.randn(1, 3, 4, 32, 32)
    student, report = initialised(f"kinetics:{file}")
    assert sorted(report.left) == ["fc.bias", "fc.weight"]
    with torch.no_grad():
        torch.testing.assert_close(reference.fc(student.features(clip)), reference(clip))
    from_cache = resolve_init("kinetics", None)
    assert from_cache.options == student.options == StudentOptions()
    student.backbone.stem[0].weight.data.zero_()
    from_cache.fill(student)
    torch.testing.assert_close(student.backbone.stem[0].weight, reference.stem[0].weight)
    for wanted, words in (
        (
            {"variant": "vmz"},
            r"--init kinetics: variant is 'torchvision' in the file, 'vmz' was asked for; what fits",
        ),
        ({"channels": 2}, "channels is 3 in the file, 2 was asked for"),
        ({"width": 0.5}, r"width is 1\.0 in the file"),
        (
            {"architecture": "r3d_34"},
            "no Kinetics weights of r3d_34; what fits: --student r2plus1d_18, r3d_18",
        ),
    ):
        with pytest.raises(CheckpointError, match=words):
            resolve_init("kinetics", StudentOptions.model_validate(wanted))
    with pytest.raises(
        CheckpointError, match="architecture is 'r2plus1d_18' in the file, 'r3d_18' was asked for"
    ):
        resolve_init(f"kinetics:{file}", StudentOptions(architecture="r3d_18"))


FACTORY = """
from distinit.pipeline.students.student import StudentOptions, build_student


def module():
    return build_student(StudentOptions(architecture="r3d_18", width=0.0625), {}).backbone


def state():
    return module().state_dict()


def number():
    return 3


def failing():
    raise KeyError("gone")
"""


def test_factories_and_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_inits.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    for name in ("module", "state"):
        student, report = initialised(f"my_inits:{name}")
        assert student.options == StudentOptions(architecture="r3d_18", width=0.0625)
        assert not report.left
    refused: dict[str, tuple[type[DistInitError], str]] = {
        "my_inits:number": (UsageError, "returned a int; expected a module or a dict of tensors"),
        "my_inits:failing": (UsageError, "KeyError: 'gone'"),
        "my_inits:none": (UsageError, "module 'my_inits' has no function 'none'"),
        "no_such_module:f": (UsageError, "ModuleNotFoundError"),
        "inflate:": (UsageError, "expected inflate:resnet18"),
        "runs/none": (CheckpointError, "no such file or run folder"),
        "inflate:none.pth": (
            WeightsError,
            "no such file; without one it is inflate:resnet18 or inflate:resnet34",
        ),
    }
    for init, (error, words) in refused.items():
        with pytest.raises(error, match=words):
            resolve_init(init, None)
    sys.modules.pop("my_inits", None)

    narrow = build_student(StudentOptions(architecture="r3d_18", width=0.0625), {"teacher": 4})
    save_student(tmp_path / "student.safetensors", narrow, StudentMeta())
    student, report = initialised(str(tmp_path), {"architecture": "r3d_18"})
    assert student.options.width == 0.0625, "only options that are set are compared"
    assert sorted(report.left) == ["fc.bias", "fc.weight"]
    with pytest.raises(
        CheckpointError, match=r"variant 'vmz' is a rule of .*; what fits: r3d_18 \(variant"
    ):
        initialised(str(tmp_path), {"variant": "vmz"})
    with pytest.raises(CheckpointError, match=r"width is 0\.0625 in the file, 1\.0 was asked for"):
        initialised(str(tmp_path), {"width": 1.0})
    monkeypatch.chdir(tmp_path)
    assert canonical_init("inflate:a.pth") == f"inflate:{tmp_path / 'a.pth'}"
    assert canonical_init("student.safetensors") == str(tmp_path / "student.safetensors")
    assert [canonical_init(x) for x in ("scratch", "kinetics", "inflate:resnet34", "a.b:c")] == [
        "scratch", "kinetics", "inflate:resnet34", "a.b:c",
    ]  # fmt: skip


def test_a_frozen_backbone_keeps_weights_and_statistics() -> None:
    student = build_student(
        StudentOptions(architecture="r3d_18", width=0.0625), {"label": 3}, dropout=0.5
    )
    student.freeze_backbone()
    initial = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    student.train()
    assert student.dropout.training
    optimizer = torch.optim.SGD(
        [p for p in student.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1
    )
    student(torch.randn(4, 3, 2, 16, 16))["label"].square().sum().backward()
    optimizer.step()
    changed = {
        name
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, initial[name])
    }
    assert changed == {"heads.head_label.weight", "heads.head_label.bias"}
