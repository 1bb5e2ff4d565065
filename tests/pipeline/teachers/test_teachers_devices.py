"""A teacher gives the same logits on every kind of device, up to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distinit.pipeline.extraction.teacher_runner import TeacherRunner
from distinit.pipeline.teachers.teacher import TeacherOutput, TeacherSpec, load_teacher

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


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.usefixtures("random_teachers")
def test_batches_that_run_at_once_have_the_rows_of_each_alone(device: str) -> None:
    spec = TeacherSpec(name="random_teachers:teacher", options={"k": "7", "input_size": "32"})
    teacher = load_teacher(spec).to(device)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, *teacher.input_shape, 3), np.uint8)
    expected = [teacher.logits(batch).numpy() for batch in images]

    outputs = {"t": TeacherOutput(teacher, "logits")}
    with TeacherRunner(outputs, [teacher.view], batch_size=3, threads=2) as runner:
        futures = []
        for pictures in images:
            batch = runner.take()
            batch.images[0][:], batch.count = pictures, 3
            futures.append(runner.submit(batch, ["t"]))
        actual = [future.result()["t"] for future in futures]

    for rows, alone in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(rows, alone)
