"""Baseline loss and lower bound of a student's loss, compared with the losses of constants."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distinit.pipeline.training.distillation import Distillation
from distinit.pipeline.training.losses import (
    HeadLoss,
)
from distinit.pipeline.training.objective import (
    LossBounds,
    head_bounds,
    loss_bounds,
    most_frequent_shares,
)

DRAWS, CLASSES = 40, {"a": 6, "b": 4}


def draws(
    *, weight_of_b: list[float] | None = None
) -> tuple[list[SimpleNamespace], dict[str, np.ndarray]]:
    """Return stand-ins for draws, and the logits of all draws [M, K]."""
    random = np.random.default_rng(3)
    logits = {
        name: random.normal(0, 2, (DRAWS, k)).astype(np.float32) for name, k in CLASSES.items()
    }
    samples = [
        SimpleNamespace(
            targets={name: values[i] for name, values in logits.items()},
            weight={"a": 1.0, "b": weight_of_b[i] if weight_of_b else 1.0},
        )
        for i in range(DRAWS)
    ]
    return samples, logits


def test_the_share_of_the_most_frequent_class_is_that_of_the_clips_that_count() -> None:
    weights = [float(i % 3 > 0) for i in range(DRAWS)]
    samples, logits = draws(weight_of_b=weights)
    top_classes = {name: torch.from_numpy(values).argmax(dim=1) for name, values in logits.items()}
    top_classes["b"] = top_classes["b"][torch.tensor(weights) > 0]
    expected = {
        name: float((classes == classes.mode().values).double().mean())
        for name, classes in top_classes.items()
    }
    assert most_frequent_shares(samples, ["a", "b"]) == pytest.approx(expected)
    assert most_frequent_shares(draws(weight_of_b=[0.0] * DRAWS)[0], ["b"]) == {}, "no draw counts"


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_bounds_of_cross_entropy_are_the_losses_of_the_mean_target_and_of_the_targets(
    tau: float,
) -> None:
    samples, logits = draws()
    bounds = loss_bounds(samples, Distillation(["a", "b"], tau=tau, weights={"b": 0.5}))
    constant = perfect = 0.0
    for name, factor in (("a", 1.0), ("b", 0.5)):
        targets = torch.softmax(torch.from_numpy(logits[name]).double() / tau, dim=1)
        constant -= factor * float((targets * targets.mean(0).log()).sum(1).mean())
        perfect -= factor * float((targets * targets.log()).sum(1).mean())
    assert bounds is not None
    assert bounds.constant == pytest.approx(constant, rel=1e-5)
    assert bounds.perfect == pytest.approx(perfect, rel=1e-5)
    assert bounds.explained_fraction(constant) == pytest.approx(0, abs=1e-4)
    assert bounds.explained_fraction(perfect) == pytest.approx(1, abs=1e-4)
    assert bounds.explained_fraction(constant + 0.1) < 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_constant_has_a_smaller_squared_error(reduction: str) -> None:
    samples, logits = draws()
    objective = Distillation(["a"], loss="squared-error", mse_reduction=reduction)
    bounds = loss_bounds(samples, objective)
    targets = torch.from_numpy(logits["a"])

    def loss(constant: torch.Tensor) -> float:
        return float(getattr((constant - targets) ** 2, reduction)(1).mean())

    assert bounds is not None
    assert bounds.perfect == 0
    assert bounds.constant == pytest.approx(loss(targets.mean(0)), rel=1e-5)
    for k in range(CLASSES["a"]):
        for step in (-0.1, 0.1):
            assert loss(targets.mean(0) + step * torch.eye(CLASSES["a"])[k]) > bounds.constant


def test_a_teacher_counts_the_draws_that_its_filter_keeps() -> None:
    weight = [float(i % 2) for i in range(DRAWS)]
    samples, logits = draws(weight_of_b=weight)
    bounds = loss_bounds(samples, Distillation(["b"]))
    kept_targets = torch.softmax(torch.from_numpy(logits["b"][1::2]).double(), dim=1)
    assert bounds is not None
    assert bounds.perfect == pytest.approx(
        float(-(kept_targets * kept_targets.log()).sum(dim=1).mean()), rel=1e-5
    )
    uncounted, _ = draws(weight_of_b=[0.0] * DRAWS)
    assert loss_bounds(uncounted, Distillation(["b"])) is None


def test_the_explained_fraction_is_zero_if_all_clips_have_the_same_target() -> None:
    assert LossBounds(1.5, 1.5).explained_fraction(1.5) == 0


@pytest.mark.parametrize(
    ("output", "loss"),
    [("logits", "cosine"), ("features", "cosine"), ("features", "mse"), ("features", "smooth-l1")],
)
def test_no_constant_is_better_than_the_best(output: str, loss: str) -> None:
    """Gradient descent over constants reaches the baseline, and the targets have loss 0."""
    samples, logits = draws()
    mean = torch.full((CLASSES["a"],), 0.5) if loss in ("mse", "smooth-l1") else None
    head = HeadLoss(output, loss, mean=mean, scale=1.5 if mean is not None else 1.0)
    baseline, bound = head_bounds(samples, Distillation(["a"], heads={"a": head}))["a"]
    targets = torch.from_numpy(logits["a"])
    constant = torch.full((1, CLASSES["a"]), 0.1).requires_grad_()
    optimizer = torch.optim.LBFGS([constant], max_iter=200)

    def value() -> torch.Tensor:
        optimizer.zero_grad()
        loss_value = head.by_clip(constant.expand_as(targets), targets).mean()
        loss_value.backward()
        return loss_value

    optimizer.step(value)
    assert baseline == pytest.approx(value().item(), rel=1e-4)
    assert bound == 0
    assert head.by_clip(head.normalized(targets), targets).mean().item() == pytest.approx(
        0, abs=1e-6
    )
