"""A teacher gives the same logits on every kind of device, up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distinit.pipeline.teachers.teacher import TeacherSpec, load_teacher

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.1)])
@pytest.mark.usefixtures("random_teachers")
def test_logits_of_a_device_are_those_of_the_cpu(
    device: str, precision: str, tolerance: float
) -> None:
    spec = TeacherSpec(name="random_teachers:teacher", options={"k": "7", "input_size": "32"})
    teacher = load_teacher(spec)
    images = np.random.default_rng(0).integers(0, 256, (5, *teacher.input_shape, 3), np.uint8)
    on_cpu = teacher.logits(images)

    on_device = teacher.to(device, precision).logits(images)

    assert teacher.device.type == device
    assert (on_device.dtype, on_device.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(on_device, on_cpu, atol=tolerance, rtol=0)
