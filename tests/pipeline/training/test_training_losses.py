"""Losses, compared with NumPy in float64: sums over classes, means over the clips that count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.training.distillation import Distillation
from distinit.pipeline.training.distillation_options import LOSSES, TargetOptions, resolve_losses
from distinit.pipeline.training.losses import HeadLoss


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
    by_clip = -(softmax(teacher) * np.log(softmax(student))).sum(axis=1)
    loss = HeadLoss()(*(torch.tensor(x, dtype=torch.float32) for x in (student, teacher, weight)))
    assert loss.item() == pytest.approx(by_clip[weight == 1].mean(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_squared_error_reduces_over_classes_then_over_the_kept_clips(batch, reduction):
    student, teacher, weight = batch
    by_clip = getattr(np, reduction)((student - teacher) ** 2, axis=1)
    head = HeadLoss(loss="squared-error", mse_reduction=reduction)
    loss = head(*(torch.tensor(x, dtype=torch.float32) for x in (student, teacher, weight)))
    assert loss.item() == pytest.approx(by_clip[weight == 1].mean(), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES["logits"])
def test_no_kept_clip_gives_zero_with_a_zero_gradient(loss):
    logits = torch.randn(4, 5, requires_grad=True)
    value = HeadLoss(loss=loss)(logits, torch.randn(4, 5), torch.zeros(4))
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros(4, 5))


def test_the_loss_is_float32_for_outputs_in_bf16():
    logits = torch.randn(4, 1000, dtype=torch.bfloat16)
    teacher = torch.randn(4, 1000)
    targets = torch.softmax(teacher.double(), 1)
    expected = -(targets * torch.log_softmax(logits.double(), 1)).sum(1).mean()
    value = HeadLoss()(logits, teacher, torch.ones(4))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


MEAN, SCALE = np.linspace(-1, 1, 11), 2.5


def numpy_loss(head: HeadLoss, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Return the loss of each clip [B] by its definition."""
    normalized = (teacher - MEAN) / SCALE
    if head.loss == "cross-entropy":
        return -(softmax(teacher / head.tau) * np.log(softmax(student))).sum(axis=1)
    if head.loss == "squared-error":
        return ((student - teacher) ** 2).sum(axis=1)
    if head.loss == "mse":
        return ((student - normalized) ** 2).mean(axis=1)
    if head.loss == "smooth-l1":
        distance = np.abs(student - normalized)
        return np.where(distance < 1, distance**2 / 2, distance - 0.5).mean(axis=1)
    if head.output == "logits":
        student, teacher = (x - x.mean(axis=1, keepdims=True) for x in (student, teacher))
    norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    return 1 - (student * teacher).sum(axis=1) / norms


def head_of(output: str, loss: str) -> HeadLoss:
    scaled = loss in ("mse", "smooth-l1")
    mean = torch.tensor(MEAN, dtype=torch.float32) if scaled else None
    return HeadLoss(output, loss, tau=2.0, mean=mean, scale=SCALE if scaled else 1.0)


@pytest.mark.parametrize(
    ("output", "loss"), [(output, loss) for output, losses in LOSSES.items() for loss in losses]
)
def test_every_loss_is_its_definition_over_the_kept_clips(batch, output, loss):
    student, teacher, weight = batch
    head = head_of(output, loss)
    outputs, targets, mask = (torch.tensor(x, dtype=torch.float32) for x in batch)
    expected = numpy_loss(head, student, teacher)[weight == 1]
    assert head(outputs, targets, mask).item() == pytest.approx(expected.mean(), rel=1e-5)
    count = torch.tensor(7)
    assert head(outputs, targets, mask, count).item() == pytest.approx(expected.sum() / 7, rel=1e-5)


def test_a_constant_offset_changes_the_cosine_of_features_and_not_of_logits(batch):
    student, teacher, _ = (torch.tensor(x, dtype=torch.float32) for x in batch)
    for output, equal in (("logits", True), ("features", False)):
        head = HeadLoss(output, "cosine")
        shifted, original = head.by_clip(student + 5, teacher), head.by_clip(student, teacher)
        assert torch.allclose(shifted, original, atol=1e-5) == equal


def test_a_loss_is_chosen_by_output_or_by_name():
    outputs = {"a": "logits", "b": "features"}
    assert resolve_losses("cross-entropy", outputs) == {"a": "cross-entropy", "b": "cosine"}
    assert resolve_losses("cosine", outputs) == {"a": "cosine", "b": "cosine"}
    assert resolve_losses("mse", outputs) == {"a": "cross-entropy", "b": "mse"}
    assert resolve_losses({"b": "smooth-l1"}, outputs) == {"a": "cross-entropy", "b": "smooth-l1"}
    with pytest.raises(UsageError, match=r"mse.*squared-error"):
        resolve_losses({"a": "mse"}, outputs)
    with pytest.raises(UsageError, match=r"smooth-l1.*cross-entropy"):
        resolve_losses("smooth-l1", {"a": "logits"})
    with pytest.raises(ValueError, match=r"cosine.*'cosinus'"):
        TargetOptions(loss="cosinus")


class Fixed(torch.nn.Module):
    """A student whose outputs are parameters."""

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.outputs = torch.nn.ParameterDict({n: torch.tensor(x) for n, x in outputs.items()})

    def forward(self, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(self.outputs)


def test_dropping_keeps_the_teacher_with_the_highest_weighted_loss():
    random = np.random.default_rng(5)
    names, clips = ("a", "b", "c"), 40
    student, teacher = (
        {name: random.normal(0, 1, (clips, 11)) for name in names} for _ in range(2)
    )
    weights = {"a": 0.5, "b": 2.0, "c": 1.0}
    mask = {name: random.random(clips) < 0.8 for name in names}
    mask["a"] |= True
    dropped = {name: random.random(clips) < 0.6 for name in names}
    head = HeadLoss("features", "cosine")
    losses = np.stack([weights[n] * numpy_loss(head, student[n], teacher[n]) for n in names])
    used = np.stack([mask[n] for n in names])
    highest = np.where(used, losses, -np.inf).argmax(axis=0)
    keep = ~np.stack([dropped[n] for n in names]) | (highest == np.arange(3)[:, None])
    batch = {
        "clip": torch.zeros(clips, 3, 1, 2, 2, dtype=torch.uint8),
        "targets": {name: torch.tensor(teacher[name]) for name in names},
        "weight": {name: torch.tensor(mask[name], dtype=torch.float32) for name in names},
        "dropped": {name: torch.tensor(dropped[name]) for name in names},
    }
    objective = Distillation(names, weights=weights, heads=dict.fromkeys(names, head))
    model = Fixed(student)
    report = objective(model, batch, objective.counts(batch))
    expected = sum((losses * used)[i].sum() / used[i].sum() for i in range(3))
    assert report.loss.item() == pytest.approx(expected, rel=1e-5)
    report.loss.backward()
    for i, name in enumerate(names):
        outputs = torch.tensor(student[name], requires_grad=True)
        cosine = torch.nn.functional.cosine_similarity(outputs, torch.tensor(teacher[name]))
        factor = torch.tensor(weights[name] * used[i] * keep[i] / used[i].sum())
        (factor * (1 - cosine)).sum().backward()
        torch.testing.assert_close(model.outputs[name].grad, outputs.grad, rtol=1e-4, atol=1e-7)
    parts = [(losses / weights[n] * used)[i].sum() / used[i].sum() for i, n in enumerate(names)]
    assert [part.item() for part in report.parts.values()] == pytest.approx(parts, rel=1e-5)
