"""The learning rate, compared with the schedules of the paper and of R(2+1)D by epoch."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from distinit.pipeline.evaluation.finetune_options import FinetuneLoop
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.pipeline.training.optimizer import learning_rate


def test_the_papers_pretraining_schedule():
    options = LoopOptions(
        lr=0.01, warmup_epochs=10, step_epochs=10, epochs=45, epoch_clips=1_000_000, batch_size=1536
    )
    steps = options.steps_per_epoch
    # 1 000 000 / 1536 = 651.04…, rounded up to whole batches.
    assert steps == 652
    rates = [
        [learning_rate(epoch * steps + i, options) for i in range(steps)] for epoch in range(45)
    ]
    ramp = [rate for epoch in rates[:10] for rate in epoch]
    assert ramp == pytest.approx([0.01 * (i + 1) / len(ramp) for i in range(len(ramp))])
    for epoch in range(10, 45):
        expected = 0.01 if epoch < 20 else 1e-3 if epoch < 30 else 1e-4 if epoch < 40 else 1e-5
        assert rates[epoch] == pytest.approx([expected] * steps), epoch


def test_the_papers_finetuning_schedule_has_no_warmup_and_drops_every_two_epochs():
    options = LoopOptions(
        lr=0.002, warmup_epochs=0, step_epochs=2, epochs=8, epoch_clips=100, batch_size=10
    )
    by_epoch = [learning_rate(epoch * 10, options) for epoch in range(8)]
    assert by_epoch == pytest.approx([2e-3, 2e-3, 2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6])


def test_the_cosine_goes_from_the_peak_to_zero_after_the_warmup():
    options = LoopOptions(
        schedule="cosine", lr=0.4, warmup_epochs=1, epochs=5, epoch_clips=20, batch_size=4
    )
    rates = [learning_rate(step, options) for step in range(25)]
    assert rates[:5] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])
    expected = 0.2 + 0.2 * np.cos(np.linspace(0, np.pi, 21)[:-1])
    assert rates[5:] == pytest.approx(expected.tolist())
    # The schedule ends with the last epoch, so a resume cannot have more epochs.
    assert options.identity()["loop"]["epochs"] == 5
    assert "epochs" not in LoopOptions().identity()["loop"]


def test_identities_of_default_options_are_those_of_version_01():
    new = {"optimizer": "adamw", "betas": (0.9, 0.95), "schedule": "cosine", "ema": 0.99}
    plain = LoopOptions().identity()["loop"]
    assert not plain.keys() & new.keys()
    assert not plain.keys() & {"weights"}
    for name, value in new.items():
        assert name in LoopOptions.model_validate({name: value}).identity()["loop"]


def test_adamw_changes_the_defaults_but_not_options_that_are_set():
    options = LoopOptions(optimizer="adamw")
    assert (options.lr, options.weight_decay) == (0.001, 0.05)
    assert FinetuneLoop(optimizer="adamw").lr == 0.0003
    assert LoopOptions(optimizer="adamw", lr=0.01).lr == 0.01
    assert (LoopOptions().lr, FinetuneLoop().lr) == (0.01, 0.002)
    with pytest.raises(ValidationError, match="--ema"):
        LoopOptions(weights="ema")


def test_an_epoch_consists_of_whole_batches():
    options = LoopOptions(batch_size=24).for_videos(100)
    assert (options.steps_per_epoch, options.clips_per_epoch) == (5, 120)
    assert LoopOptions(epoch_clips=7).for_videos(100).epoch_clips == 7


def test_the_rate_is_scaled_only_if_its_batch_size_is_set():
    plain = LoopOptions(lr=0.01, batch_size=1536, epoch_clips=15360, warmup_epochs=2, step_epochs=1)
    scaled = plain.model_copy(update={"lr_base_batch_size": 24})
    for step in (0, 7, 19, 20, 35):
        assert learning_rate(step, scaled) == pytest.approx(64 * learning_rate(step, plain))
    assert plain.describe_rate() == "peak learning rate 0.01 (not scaled by the batch size)"
    assert scaled.describe_rate() == "peak learning rate 0.64 (0.01 × 1536 / 24)"


@pytest.mark.parametrize(
    ("world", "micro_batch_size", "pieces"),
    [(1, None, 1), (1, 24, 64), (64, 24, 1), (5, 24, 13), (2, 1000, 1)],
)
def test_a_step_is_split_into_pieces_that_fit(world, micro_batch_size, pieces):
    options = LoopOptions(batch_size=1536, micro_batch_size=micro_batch_size, epoch_clips=1536)
    assert options.accumulation_steps(world) == pieces
    assert micro_batch_size is None or -(-1536 // world) <= pieces * micro_batch_size
