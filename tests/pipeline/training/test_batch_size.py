"""The largest batch that fits, on a CPU, with a network that raises for larger batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import TrainingError, UsageError
from distinit.pipeline.training.batch_size import largest_that_fits, repeated, with_batch_size
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.pipeline.training.loop import LossReport
from distinit.pipeline.training.loop_options import DEFAULT_BATCH_SIZE, LoopOptions
from distinit.stages.train_student import train_student

CPU = torch.device("cpu")


class Limited(nn.Module):
    """A network with memory for so many clips; for more it raises the error of CUDA."""

    def __init__(self, max_clips: int) -> None:
        super().__init__()
        self.max_clips, self.sizes = max_clips, []
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.max_clips:
            raise torch.OutOfMemoryError(f"{len(x)} clips")
        out: Tensor = self.layers(x)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Limited:
        duplicate = Limited(self.max_clips)
        duplicate.layers = copy.deepcopy(self.layers, memo)
        # The test checks the sizes that the copy was called with.
        duplicate.sizes = self.sizes
        return duplicate


class Squares:
    """An objective on clips "x", all of which count."""

    def counts(self, batch: Any) -> Tensor:
        return torch.tensor([len(batch["x"])])

    def __call__(self, model: nn.Module, batch: Any, counts: Tensor) -> LossReport:
        assert len(batch["name"]) == len(batch["x"])
        return LossReport(model(batch["x"]).square().sum() / counts[0], {})


class Points:
    """Clips of three numbers."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return {"x": torch.full((3,), float(key[1])), "name": f"v{key[1]}.mp4"}


@pytest.mark.parametrize(
    ("limit", "max_size", "expected"),
    [
        # 96 fits and 104 does not; a tenth less, rounded down to a multiple of 8, is 80.
        (100, 1024, 80),
        (10**6, 64, 64),
        (10**6, 50, 50),
        (7, 1024, 6),
        (3, 1024, 2),
        (2, 1024, 1),
    ],
)
def test_the_largest_batch_size_is_returned_less_a_margin(
    limit: int, max_size: int, expected: int
) -> None:
    model = Limited(limit)
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    random_state = torch.random.get_rng_state()
    options = LoopOptions(workers=0, epoch_clips=8, channels_last=False, ema=0.9)
    size = largest_that_fits(model, Points(), Squares(), options, CPU, max_size)
    assert size == expected
    assert size <= limit
    assert max(model.sizes) <= max_size
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_only_micro_batches_must_fit() -> None:
    options = LoopOptions(workers=0, epoch_clips=8, channels_last=False, micro_batch_size=4)
    model = Limited(4)
    assert largest_that_fits(model, Points(), Squares(), options, CPU, 48) == 48


def test_a_network_too_large_for_one_clip_and_other_faults_end_the_search() -> None:
    options = LoopOptions(workers=0, epoch_clips=8, channels_last=False)
    with pytest.raises(TrainingError, match="--batch-size auto"):
        largest_that_fits(Limited(0), Points(), Squares(), options, CPU)

    class Faulty(Limited):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("another fault")

        def __deepcopy__(self, memo: dict[int, Any]) -> Faulty:
            return self

    with pytest.raises(RuntimeError, match="another fault"):
        largest_that_fits(Faulty(0), Points(), Squares(), options, CPU)


def test_rows_are_repeated_in_tensors_lists_and_mappings() -> None:
    batch = {"a": torch.tensor([1, 2, 3]), "b": ["x", "y", "z"], "c": {"d": torch.eye(3)}}
    larger = repeated(batch, 5)
    assert larger["a"].tolist() == [1, 2, 3, 1, 2]
    assert larger["b"] == ["x", "y", "z", "x", "y"]
    assert torch.equal(larger["c"]["d"], torch.eye(3)[[0, 1, 2, 0, 1]])


def test_a_cpu_has_the_default_and_a_number_is_kept() -> None:
    def parts() -> Any:
        raise AssertionError("nothing is measured")

    auto = LoopOptions(batch_size="auto", device="cpu")
    assert with_batch_size(auto, 1, 10**6, parts).batch_size == DEFAULT_BATCH_SIZE
    assert with_batch_size(LoopOptions(batch_size=5), 1, 10, parts).batch_size == 5
    with pytest.raises(UsageError, match="--batch-size auto"):
        auto.for_videos(8).steps_per_epoch  # noqa: B018
    with pytest.raises(ValueError, match="batch_size"):
        LoopOptions(batch_size=0)


@pytest.mark.slow
def test_a_run_records_the_number_and_resumes_with_it(tiny_store: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def config(**loop: Any) -> TrainConfig:
        loop = {"epochs": 1, "epoch_clips": 8, "workers": 0, "device": "cpu", **loop}
        student = {"architecture": "r3d_18", "width": 0.0625}
        clips = {"clip_frames": 8, "size": 32, "resize": [40, 60]}
        return TrainConfig.model_validate(
            {"store": str(tiny_store.path), "out": str(run), "student": student}
            | {"clips": clips, "loop": loop, "resume": "auto"}
        )

    train_student(config(batch_size="auto"), Console(quiet=True))
    path = run / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    assert stored["train-student"]["loop"]["batch_size"] == DEFAULT_BATCH_SIZE
    # A resume keeps the run's batch size, also on a machine where a different one fits.
    train_student(config(batch_size=DEFAULT_BATCH_SIZE, epochs=2), Console(quiet=True))
    result = train_student(config(batch_size="auto", epochs=3), Console(quiet=True))
    assert (result["resumed_from_step"], result["steps"]) == (2, 3)
    assert yaml.safe_load(path.read_text())["train-student"]["loop"]["batch_size"] == 32
