"""Sizes that a dry run computes, compared with sums by hand, and pixels of its picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.training.dry_run import footprint
from distinit.pipeline.training.preview import GAP, SIDE, render_batch


class Linear(nn.Module):
    """One matrix, whose footprint is easy to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 10, bias=False)

    def forward(self, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"t": self.linear(clip.flatten(1))}


def test_the_footprint_of_a_matrix_is_that_computed_by_hand() -> None:
    fp32 = footprint(Linear(), (5, 3, 2, 4, 4))
    assert fp32 is not None
    assert fp32.weights == 3 * 96 * 10 * 4
    # The input is stored for the gradient of the weights.
    assert fp32.activations == 5 * 96 * 4
    # The forward pass and the gradient of the weights cost the same.
    assert fp32.flops == 2 * (2 * 5 * 96 * 10)
    bf16 = footprint(Linear(), (5, 3, 2, 4, 4), precision="bf16")
    assert bf16 is not None
    assert bf16.activations == fp32.activations // 2


@pytest.mark.slow
def test_the_footprint_of_a_student_grows_with_the_batch_and_changes_nothing() -> None:
    student = build_student(StudentOptions(width=0.25), {"t": 5})
    one, four = (footprint(student, (clips, 3, 8, 32, 32)) for clips in (1, 4))
    assert one is not None
    assert four is not None
    assert four.weights == one.weights
    assert four.activations == pytest.approx(4 * one.activations, rel=0.01)
    assert four.flops == 4 * one.flops
    assert all(parameter.device.type == "cpu" for parameter in student.parameters())
    assert {
        int(m.num_batches_tracked) for m in student.modules() if isinstance(m, nn.BatchNorm3d)
    } == {0}


def batch(channels: int = 3) -> dict[str, Any]:
    """Two clips of one colour; the second counts for no teacher."""
    clips = torch.zeros(2, 3, 5, 8, 8, dtype=torch.uint8)
    clips[0] = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None, None]
    flow = torch.full((2, 2, 5, 8, 8), 0.0)
    flow[0, 0] = 4.0
    return {
        "clip": clips if channels == 3 else flow,
        "targets": {"a": torch.tensor([[0.0, 3.0, 1.0, 0.0]] * 2), "b": torch.zeros(2, 2)},
        "weight": {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 0.0])},
        "name": ["é 语.mp4", "b" * 100],
        "start": torch.tensor([3, 4]),
    }


@pytest.mark.parametrize(("channels", "colour"), [(3, [200, 100, 50]), (2, [192, 128, 128])])
def test_the_picture_of_a_batch_has_one_row_per_clip(channels: int, colour: list[int]) -> None:
    classes = {"a": ["x", "y", "z", "w"], "b": ["u", "v"]}
    picture = render_batch(batch(channels), classes, tau=0.5)
    pixels = np.asarray(picture)
    row_height = pixels.shape[0] // 2
    for frame in range(5):
        left = GAP + frame * (SIDE + GAP)
        assert (pixels[GAP : GAP + SIDE, left : left + SIDE] == colour).all()
        # The second clip was not decoded.
        top = GAP + row_height
        assert (pixels[top : top + 50, left : left + SIDE] == [225, 225, 225]).all()
    text = pixels[:, 5 * (SIDE + GAP) :]
    # Black text is that of a teacher for which the clip counts.
    assert (text[:row_height] < 60).all(axis=2).sum() > 200
