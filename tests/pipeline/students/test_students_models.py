"""Students, compared with torchvision's models and with published parameter counts."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models import video

from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.students.student import Backbone, build_student, count_parameters
from distinit.pipeline.students.student_options import StudentOptions


@pytest.mark.parametrize(
    ("architecture", "variant", "parameters"),
    [
        ("r2plus1d_18", "torchvision", 31_505_325),
        ("r2plus1d_18", "vmz", 33_370_839),
        ("r3d_18", "torchvision", 33_371_472),
        ("mc3_18", "torchvision", 11_695_440),
    ],
)
def test_parameter_counts_at_400_classes(architecture: str, variant: str, parameters: int) -> None:
    options = StudentOptions.model_validate({"architecture": architecture, "variant": variant})
    with torch.device("meta"):
        student = build_student(options, {"kinetics": 400})
    assert count_parameters(student) == parameters


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["r2plus1d_18", "r3d_18", "mc3_18"])
def test_torchvision_variant_is_torchvisions_model(architecture: str) -> None:
    reference = getattr(video, architecture)(num_classes=5).eval()
    student = build_student(
        StudentOptions.model_validate({"architecture": architecture}), {"a.b": 5}
    ).eval()
    state = reference.state_dict()
    head = {name: state.pop(f"fc.{name}") for name in ("weight", "bias")}
    student.backbone.load_state_dict(state, strict=True)
    student.head("a.b").load_state_dict(head)
    clip = torch.randn(1, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(student(clip)["a.b"], reference(clip))
        assert student.features(clip).shape == (1, student.feature_size) == (1, 512)
    for model in (student, reference):
        norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm3d))
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_initialisation_has_torchvisions_spread() -> None:
    torch.manual_seed(0)
    reference = video.r3d_18(num_classes=50)
    student = build_student(StudentOptions(architecture="r3d_18"), {"t": 50})
    for name, tensor in student.backbone.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        spread = reference.state_dict()[name].float().std().item()
        assert tensor.float().std() == pytest.approx(spread, rel=0.05, abs=1e-6), name
    assert student.head("t").weight.detach().std().item() == pytest.approx(0.01, rel=0.05)


def test_middle_widths_of_both_variants() -> None:
    """They differ in the second convolution of the first block of layers 2-4."""
    widths = {}
    for variant in ("torchvision", "vmz"):
        with torch.device("meta"):
            backbone = Backbone(StudentOptions.model_validate({"variant": variant}))
        layers = (backbone.layer2, backbone.layer3, backbone.layer4)
        widths[variant] = [layer[0].conv2[0][0].out_channels for layer in layers]
        assert [layer[0].conv1[0][0].out_channels for layer in layers] == [230, 460, 921]
    assert widths == {"torchvision": [230, 460, 921], "vmz": [288, 576, 1152]}


def test_vmz_batchnorm() -> None:
    with torch.device("meta"):
        backbone = Backbone(StudentOptions(variant="vmz"))
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm3d)]
    # 2 in the stem, 4 in each of 8 blocks (2 factorised convolutions), 3 downsamples.
    assert len(norms) == 2 + 4 * 8 + 3
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.1)}


@pytest.mark.parametrize(("variant", "channels"), [("torchvision", 2), ("vmz", 3)])
def test_narrow_students_keep_the_shape(variant: str, channels: int) -> None:
    options = StudentOptions.model_validate(
        {"variant": variant, "width": 0.25, "channels": channels}
    )
    student = build_student(options, {"imagenet": 10, "places": 4}, dropout=0.5)
    shapes: list[tuple[int, ...]] = []
    for part in ("stem", "layer1", "layer2", "layer3", "layer4"):
        getattr(student.backbone, part).register_forward_hook(
            lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    outputs = student(torch.zeros(2, channels, 8, 112, 112))
    assert shapes == [
        (16, 8, 56, 56),
        (16, 8, 56, 56),
        (32, 4, 28, 28),
        (64, 2, 14, 14),
        (128, 1, 7, 7),
    ]
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "imagenet": (2, 10),
        "places": (2, 4),
    }
    assert student.feature_size == 128


def test_every_head_learns_from_its_own_loss_alone() -> None:
    student = build_student(
        StudentOptions(architecture="r3d_18", width=0.1), {"train": 3, "x.y": 4}
    )
    student(torch.randn(2, 3, 2, 16, 16))["x.y"].sum().backward()
    assert student.head("x.y").weight.grad is not None
    assert student.head("train").weight.grad is None
    assert next(student.backbone.parameters()).grad is not None


def test_refusals() -> None:
    with pytest.raises(ValidationError, match="rule of r2plus1d_18"):
        StudentOptions(architecture="r3d_18", variant="vmz")
    with pytest.raises(ValidationError, match="r2plus1d_34"):
        StudentOptions.model_validate({"architecture": "resnet18"})
    with pytest.raises(UsageError, match=r"dropout is 1\.5"):
        build_student(StudentOptions(width=0.1), {}, dropout=1.5)
    with pytest.raises(UsageError, match="'b' is not in this student, it has: a"):
        build_student(StudentOptions(width=0.1), {"a": 1}).head("b")
