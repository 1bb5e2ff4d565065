"""The largest batch that fits, on a CPU: a network that takes no more than so many clips."""

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
    """A network with memory for some clips, as a GPU has it: one more raises what CUDA raises."""

    def __init__(self, clips: int) -> None:
        super().__init__()
        self.clips, self.tried = clips, []
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.tried.append(len(x))
        if len(x) > self.clips:
            raise torch.OutOfMemoryError(f"{len(x)} clips")
        out: Tensor = self.layers(x)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Limited:
        made = Limited(self.clips)
        made.layers = copy.deepcopy(self.layers, memo)
        made.tried = self.tried  # what the copy was asked for is known to the test
        return made


class Squares:
    """An objective of clips "x", all of which count."""

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
    ("limit", "most", "expected"),
    [
        (100, 1024, 80),  # 96 fits, 104 does not; less a tenth, in whole eights
        (10**6, 64, 64),
        (10**6, 50, 50),
        (7, 1024, 6),
        (3, 1024, 2),
        (2, 1024, 1),
    ],
)
def test_the_largest_batch_is_found_less_a_margin(limit: int, most: int, expected: int) -> None:
    model = Limited(limit)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    options = LoopOptions(workers=0, epoch_clips=8, channels_last=False, ema=0.9)
    found = largest_that_fits(model, Points(), Squares(), options, CPU, most)
    assert found == expected
    assert found <= limit
    assert max(model.tried) <= most
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_pieces_of_a_batch_are_what_must_fit() -> None:
    """With a micro batch, gradients of more clips are accumulated."""
    options = LoopOptions(workers=0, epoch_clips=8, channels_last=False, micro_batch_size=4)
    model = Limited(4)
    assert largest_that_fits(model, Points(), Squares(), options, CPU, 48) == 48


def test_a_network_too_large_for_one_clip_and_other_faults_end_the_search() -> None:
    options = LoopOptions(workers=0, epoch_clips=8, channels_last=False)
    with pytest.raises(TrainingError, match="--batch-size auto"):
        largest_that_fits(Limited(0), Points(), Squares(), options, CPU)

    class Broken(Limited):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("another fault")

        def __deepcopy__(self, memo: dict[int, Any]) -> Broken:
            return self

    with pytest.raises(RuntimeError, match="another fault"):
        largest_that_fits(Broken(0), Points(), Squares(), options, CPU)


def test_rows_are_repeated_in_tensors_lists_and_mappings() -> None:
    batch = {"a": torch.tensor([1, 2, 3]), "b": ["x", "y", "z"], "c": {"d": torch.eye(3)}}
    got = repeated(batch, 5)
    assert got["a"].tolist() == [1, 2, 3, 1, 2]
    assert got["b"] == ["x", "y", "z", "x", "y"]
    assert torch.equal(got["c"]["d"], torch.eye(3)[[0, 1, 2, 0, 1]])


def test_a_cpu_has_the_default_and_a_number_stays() -> None:
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
    # On a machine where another size fits, a resume is still that of the run.
    train_student(config(batch_size=DEFAULT_BATCH_SIZE, epochs=2), Console(quiet=True))
    result = train_student(config(batch_size="auto", epochs=3), Console(quiet=True))
    assert (result["resumed_from_step"], result["steps"]) == (2, 3)
    assert yaml.safe_load(path.read_text())["train-student"]["loop"]["batch_size"] == 32
