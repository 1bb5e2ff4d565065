"""Losses against NumPy in float64: sum over classes, mean over the clips that count, separate
masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distinit.pipeline.training.losses import soft_target_cross_entropy, squared_error


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    student, teacher = random.normal(0, 3, (2, 6, 11))
    return student, teacher, np.array([1, 0, 1, 1, 0, 1], float)


def test_cross_entropy_is_equation_2_over_the_kept_clips(batch):
    student, teacher, weight = batch
    targets = softmax(teacher)
    by_clip = -(targets * np.log(softmax(student))).sum(axis=1)
    loss = soft_target_cross_entropy(
        *(torch.tensor(x, dtype=torch.float32) for x in (student, targets, weight))
    )
    assert loss.item() == pytest.approx(by_clip[weight == 1].mean(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_squared_error_reduces_over_classes_then_over_the_kept_clips(batch, reduction):
    student, teacher, weight = batch
    by_clip = getattr(np, reduction)((student - teacher) ** 2, axis=1)
    loss = squared_error(
        *(torch.tensor(x, dtype=torch.float32) for x in (student, teacher, weight)), reduction
    )
    assert loss.item() == pytest.approx(by_clip[weight == 1].mean(), rel=1e-6)


@pytest.mark.parametrize("loss", [soft_target_cross_entropy, squared_error])
def test_no_kept_clip_gives_zero_with_a_zero_gradient(loss):
    logits = torch.randn(4, 5, requires_grad=True)
    value = loss(logits, torch.softmax(torch.randn(4, 5), 1), torch.zeros(4))
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 5))


def test_the_loss_is_float32_whatever_the_forward_pass_was():
    logits = torch.randn(4, 1000, dtype=torch.bfloat16)
    targets = torch.softmax(torch.randn(4, 1000), 1)
    expected = -(targets.double() * torch.log_softmax(logits.double(), 1)).sum(1).mean()
    value = soft_target_cross_entropy(logits, targets, torch.ones(4))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
