"""The loop on a small synthetic task: equal batches for any number of workers, exact resumes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distinit.pipeline.clips import seeding
from distinit.pipeline.common.errors import (
    CheckpointError,
    StoreMismatchError,
    TrainingError,
    TrainingInterrupted,
    UsageError,
    WorkerDied,
)
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches
from distinit.pipeline.training.loop import FitResult, LossReport, Stop, fit
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.pipeline.training.optimizer import WeightAverage, make_optimizer

OPTIONS = LoopOptions(
    batch_size=4, epochs=3, epoch_clips=18, lr=0.05, warmup_epochs=1, step_epochs=1, checkpoint_every=2,
    log_every=2, workers=0, threads=1, device="cpu", seed=11,
)  # fmt: skip
IDENTITY = {"store": {"id": "a"}, "teachers": {"t": {"sha256": "1"}}, "student": {"variant": "vmz"}}


class Points:
    """Examples that are pure functions of their key; the first videos may be unreadable."""

    def __init__(self, num_unreadable: int = 0, bad: tuple[int, int] | None = None) -> None:
        self.num_unreadable, self.bad = num_unreadable, bad

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        random = seeding.rng(1, *key)
        x = torch.from_numpy(random.normal(size=6).astype("float32"))
        reasons = [(f"v{key[1]}.mp4", "no video stream")] if key[1] < self.num_unreadable else []
        if key == self.bad:
            raise TrainingError("v9.mp4: gone")
        return {
            "x": x, "y": x[:2].sum() * 2, "name": f"{key[0]}/{key[1]}", "rejected": 1, "unreadable": reasons,
            "deep": {"t": x[:3]},
        }  # fmt: skip


class Regression:
    """Records its batches and losses; may be interrupted, or crash, at a given call."""

    def __init__(self, stop: tuple[int, str] | None = None) -> None:
        self.stop, self.seen = stop, []

    def counts(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return torch.tensor([len(batch["y"])])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: torch.Tensor) -> LossReport:
        loss = (model(batch["x"]).squeeze(1) - batch["y"]).square().sum() / counts[0]
        if self.stop is not None and len(self.seen) == self.stop[0]:
            if self.stop[1] == "crash":
                raise ZeroDivisionError
            if self.stop[1] == "nan":
                loss = loss * float("nan")
            if self.stop[1] == "term":
                os.kill(os.getpid(), signal.SIGTERM)
        self.seen.append((tuple(batch["name"]), loss.item()))
        return LossReport(loss, {"loss/t": loss.detach()})


def network() -> nn.Module:
    """A network with batch statistics and dropout, so that buffers and random states matter."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
    )


def train(run: Path, objective: Regression, model: nn.Module, **changes: Any) -> FitResult:
    options = OPTIONS.model_copy(update=changes.pop("options", {}))
    arguments = {"dataset": Points(), "identity": IDENTITY, **changes}
    return fit(model=model, objective=objective, options=options, run_dir=run, **arguments)


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without numbers that depend on clock and machine."""
    timed = {"clips_per_s", "data_share", "memory_gb", "eta_s"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Regression, nn.Module, FitResult, list[dict[str, Any]]]:
    run = tmp_path_factory.mktemp("reference")
    objective, model = Regression(), network()
    result = train(run, objective, model)
    return objective, model, result, records(run)


def test_a_run_learns(tmp_path):
    changes = {"epochs": 30, "step_epochs": None, "lr": 0.02}
    result = train(tmp_path, Regression(), nn.Linear(6, 1), options=changes)
    epochs = [line["loss"] for line in records(tmp_path) if line["kind"] == "epoch"]
    assert sum(epochs[-5:]) < 0.6 * sum(epochs[:5])
    assert result.best < epochs[0]


def test_a_run_reports(reference):
    _, _, result, lines = reference
    assert (result.steps, result.epochs, result.resumed_from) == (15, 3, 0)
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["step"] for line in epochs] == [5, 10, 15]
    assert result.best == min(line["loss"] for line in epochs)
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [line["lr"] for line in steps[:2]] == pytest.approx([0.02, 0.04])
    # One draw is rejected for each clip that counts.
    assert all(line["filtered"] == 0.5 for line in steps)


@pytest.mark.parametrize("how", ["term", "crash"])
@pytest.mark.parametrize("stop", [1, 4, 7, 13])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, reference, stop, how):
    whole, expected, result, lines = reference
    first, second = Regression((stop, how)), Regression()
    with pytest.raises(TrainingInterrupted if how == "term" else ZeroDivisionError) as stopped:
        train(tmp_path, first, network())
    if how == "term":
        assert stopped.value.exit_code == 75
    model = network()
    resumed = train(tmp_path, second, model, resume=True, options={"workers": 1})
    first_step = resumed.resumed_from
    assert first_step == (stop + 1 if how == "term" else max(stop // 2 * 2, stop // 5 * 5))
    assert first.seen[:first_step] + second.seen == whole.seen
    weights = expected.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert (resumed.train_loss, resumed.best, resumed.best_epoch) == (
        result.train_loss, result.best, result.best_epoch,
    )  # fmt: skip
    # Also the means of steps between two records, of which the resume repeats a part.
    assert records(tmp_path) == lines


MODERN = {
    "optimizer": "adamw", "schedule": "cosine", "ema": 0.9, "weights": "ema", "lr": 0.01,
    "micro_batch_size": 2, "clip_norm": 1.0, "warmup_epochs": 1,
}  # fmt: skip


@pytest.mark.parametrize(("stop", "how"), [(5, "term"), (17, "crash")])
def test_adamw_cosine_and_ema_resume_bit_by_bit_with_accumulation(tmp_path, stop, how):
    held_out: dict[str, list[float]] = {"whole": [], "parts": []}

    def validate(model: nn.Module, name: str) -> dict[str, float]:
        held_out[name].append(sum(v.double().sum().item() for v in model.state_dict().values()))
        return {"loss": held_out[name][-1]}

    expected = network()
    whole = train(
        tmp_path / "whole", Regression(), expected, options=MODERN,
        validate=lambda: validate(expected, "whole"),
    )  # fmt: skip
    model = network()
    with pytest.raises(TrainingInterrupted if how == "term" else ZeroDivisionError):
        train(
            tmp_path / "parts", Regression((stop, how)), model, options=MODERN,
            validate=lambda: validate(model, "parts"),
        )  # fmt: skip
    model = network()
    resumed = train(
        tmp_path / "parts", Regression(), model, options=MODERN, resume=True,
        validate=lambda: validate(model, "parts"),
    )  # fmt: skip
    assert 0 < resumed.resumed_from < whole.steps
    assert held_out["parts"] == held_out["whole"]
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    states = [
        torch.load(tmp_path / run / "checkpoints" / "last.pt", weights_only=True)
        for run in ("whole", "parts")
    ]
    for part in ("model", "ema"):
        assert all(torch.equal(v, states[1][part][k]) for k, v in states[0][part].items())
    # The model has the average, which is neither the trained nor the initial weights.
    weights = states[0]["ema"]
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not torch.equal(weights["0.weight"], states[0]["model"]["0.weight"])
    assert not torch.equal(weights["0.weight"], network().state_dict()["0.weight"])


def test_the_average_follows_its_formula():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, 0.5)
    expected = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    for step in range(1, 30):
        # The forward pass changes running statistics and their count.
        model(torch.randn(5, 3))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            new = value.numpy()
            mean = decay * expected[name] + (1 - decay) * new
            expected[name] = mean if new.dtype == np.float32 else new.copy()
        average.update(model, step)
    assert expected["1.num_batches_tracked"] == 29
    for name, value in average.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6)
    original = {name: value.clone() for name, value in model.state_dict().items()}
    with average.applied(model):
        assert all(torch.equal(v, average.tensors[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())


def test_adamw_decays_neither_norms_nor_biases():
    model = network()
    options = OPTIONS.model_copy(update={"optimizer": "adamw", "weight_decay": 0.1, "lr": 0.5})
    optimizer = make_optimizer(model, options)
    initial = {name: value.clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    # Without gradients a step is the decay alone: w · (1 - lr · decay).
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 0.95 if name in ("0.weight", "4.weight") else 1.0
        assert torch.allclose(value, initial[name] * factor), name
    assert len(make_optimizer(model, OPTIONS).param_groups) == 1


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 7])
def test_the_batches_are_the_same_for_any_number_of_workers_and_any_start(workers, start):
    def names(workers: int, start: int) -> list[list[str]]:
        keys = EpochBatchSampler(batch_size=4, steps_per_epoch=5, epochs=3, start=start)
        batches = read_batches(Points(), keys, workers=workers, device=torch.device("cpu"))
        return [batch["name"] for batch in batches]

    all_names = names(0, 0)
    assert all_names[6] == ["1/4", "1/5", "1/6", "1/7"]
    assert names(workers, start) == all_names[start:]


def test_an_error_of_a_worker_arrives_as_it_was_raised():
    keys = EpochBatchSampler(batch_size=4, steps_per_epoch=5, epochs=1)
    with pytest.raises(TrainingError, match=r"^v9\.mp4: gone$"):
        list(read_batches(Points(bad=(0, 9)), keys, workers=2, device=torch.device("cpu")))


class Deadly(Points):
    """A data set whose decoder is killed, as the system does when memory runs out."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        if key == (0, 9):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


def test_a_worker_that_dies_is_an_error_of_one_line():
    keys = EpochBatchSampler(batch_size=4, steps_per_epoch=5, epochs=1)
    with pytest.raises(WorkerDied, match=r"SIGKILL.*loop\.workers") as died:
        list(read_batches(Deadly(), keys, workers=2, device=torch.device("cpu")))
    assert "\n" not in str(died.value)


def test_a_finished_run_does_nothing_and_more_epochs_continue_it(tmp_path, caplog):
    train(tmp_path, Regression(), network(), options={"epochs": 1})
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    objective = Regression()
    with caplog.at_level("INFO", "distinit"):
        result = train(tmp_path, objective, network(), resume=True, options={"epochs": 1})
    assert result.already_finished
    assert not objective.seen
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert "finished" in caplog.text
    assert "5 of 5 steps" in caplog.text
    longer = train(tmp_path, objective, network(), resume=True, options={"epochs": 2})
    assert longer.steps == 10
    assert len(objective.seen) == 5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"store": {"id": "b"}}, StoreMismatchError, ["store.id", '"a"', '"b"']),
        (
            {"teachers": {"t": {"sha256": "2"}}},
            StoreMismatchError,
            ["teachers.t.sha256", '"1"', '"2"'],
        ),
        (
            {"student": {"variant": "torchvision"}},
            CheckpointError,
            ["student.variant", '"vmz"', '"torchvision"'],
        ),
    ],
)
def test_the_resume_of_another_run_is_refused_by_name(tmp_path, change, error, words):
    train(tmp_path, Regression(), network(), options={"epochs": 1})
    with pytest.raises(error) as refused:
        train(tmp_path, Regression(), network(), identity=IDENTITY | change, resume=True)
    assert all(word in str(refused.value) for word in [*words, str(tmp_path)])
    with pytest.raises(CheckpointError, match=r"loop\.lr = 0\.05, now it is 0\.1"):
        train(tmp_path, Regression(), network(), resume=True, options={"lr": 0.1})
    with pytest.raises(UsageError, match="already holds a run"):
        train(tmp_path, Regression(), network())


def test_a_loss_that_is_not_finite_ends_the_run_unharmed_and_names_the_videos(tmp_path):
    model = network()
    objective = Regression((3, "nan"))
    with pytest.raises(TrainingError, match=r"the loss is not finite.*0/12, 0/13, 0/14, 0/15"):
        train(tmp_path, objective, model)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    # The last checkpoint is intact.
    assert train(tmp_path, Regression(), network(), resume=True).resumed_from == 2


def test_too_many_unreadable_videos_end_the_run_with_path_and_reason(tmp_path):
    result = train(tmp_path / "few", Regression(), network(), dataset=Points(num_unreadable=3))
    assert result.unreadable == {f"v{i}.mp4": "no video stream" for i in range(3)}
    with pytest.raises(
        TrainingError, match=r"loop\.max_unreadable allows 2; the last: v2\.mp4: no video stream"
    ):
        train(
            tmp_path / "many",
            Regression(),
            network(),
            dataset=Points(num_unreadable=3),
            options={"max_unreadable": 2},
        )


def test_best_is_by_held_out_loss_where_there_is_one(tmp_path):
    losses = iter([3.0, 1.0, 2.0])
    result = train(
        tmp_path,
        Regression(),
        network(),
        validate=lambda: {"loss": next(losses), "agreement/t": 0.5},
    )
    assert (result.best, result.best_epoch) == (1.0, 2)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["state"]["step"] == 10
    epochs = [line for line in records(tmp_path) if line["kind"] == "epoch"]
    assert [line["held_out/loss"] for line in epochs] == [3.0, 1.0, 2.0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_early_stopping_waits_for_a_better_held_out_loss_and_resumes_to_the_same_end(tmp_path):
    """Epoch 2 is the best, and the run ends after 4 more. A resume from the middle of an epoch ends
    at the same step with the same weights, and a finished run does not continue."""
    losses = [3.0, 1.0, 2.0, 1.5, 1.0, 1.2, 0.5, 0.4]
    options = {"epochs": len(losses)}

    def run(folder: Path, objective: Regression, **changes: Any) -> tuple[FitResult, nn.Module]:
        model = network()
        state = iter(losses[changes.pop("finished_epochs", 0) :])
        measure = {"validate": lambda: {"loss": next(state)}, "stop": Stop(patience=4)}
        return train(folder, objective, model, options=options, **measure, **changes), model

    result, model = run(tmp_path / "whole", Regression())
    assert (result.epochs, result.best_epoch, result.steps) == (6, 2, 30)
    assert result.best_validation == {"loss": 1.0}
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", Regression(stop=(23, "crash")))
    resumed, resumed_model = run(tmp_path / "cut", Regression(), resume=True, finished_epochs=4)
    assert (resumed.epochs, resumed.resumed_from) == (6, 22)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name
    finished, _ = run(tmp_path / "whole", Regression(), resume=True)
    assert finished.already_finished
    assert finished.epochs == 6
    short = train(tmp_path / "short", Regression(), network(), options=options, stop=Stop(epochs=2))
    assert (short.epochs, short.steps) == (2, 10)


def test_bf16_trains_on_a_cpu(tmp_path):
    result = train(
        tmp_path, Regression(), network(), options={"precision": "bf16", "clip_norm": 1.0}
    )
    assert result.steps == 15
    assert result.train_loss < 20
