"""Stage two on features: losses, heads at load time, balance, dropping, resumed bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, TrainingInterrupted, UsageError
from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.encoding import Codec, Sums, error_record
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.staging import ShardResult, TeacherPart, new_staging, stage_array
from distinit.pipeline.store.writer import StoreWriter
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import load_student
from distinit.pipeline.targets.class_head import ClassHead
from distinit.pipeline.targets.dataset import student_clips
from distinit.pipeline.training.checkpoint import load_weights
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.train_student import train_student

QUIET = Console(quiet=True)
WIDTH, TEACHER = 6, "cells.features"


@dataclass(frozen=True)
class FeatureStore:
    """Add features of every cached frame to the tiny store, [rows, WIDTH] float32."""

    path: Path
    features: np.ndarray


@pytest.fixture(scope="module")
def feature_store(tiny_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("features") / "targets.zarr"
    shutil.copytree(tiny_store.path, path)
    store = TargetStore.open(path)
    codec = Codec("features", "float16", WIDTH)
    values = np.random.default_rng(8).normal(2, 3, (store.index.n_shards, 4096, WIDTH))
    all_rows = np.zeros((store.index.n_shards * store.index.shard_rows, WIDTH), np.float32)
    attributes = {"name": TEACHER, "identity": {"name": "cells"}, "run": {}}
    with StoreWriter(
        path, sampling=store.attributes["sampling"], shard_rows=store.index.shard_rows
    ) as writer:
        writer.add_teacher(TEACHER, (), attributes, codec=codec)
        for shard in range(writer.index.n_shards):
            count = int(sum(writer.index.frame_commits[shard]["rows"]))
            x = values[shard, :count].astype(np.float32)
            all_rows[shard * writer.index.shard_rows :][:count] = x
            stored, folder = codec.encode(x), new_staging(path, shard)
            part = TeacherPart(rows=count, error=error_record(codec.error(x, x), "features"))
            part.sums = Sums.of(codec, stored)
            (spec,) = fmt.teacher_specs(TEACHER, WIDTH, "float16", "features")
            part.files += stage_array(
                folder, spec, shard, stored["features"], store.index.shard_rows
            )
            writer.commit(ShardResult(shard, None, {TEACHER: part}, str(folder)), {})
    return FeatureStore(path, all_rows)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    random = np.random.default_rng(2)
    weight = random.normal(0, 1, (4, WIDTH)).astype(np.float32)
    bias = random.normal(0, 1, 4).astype(np.float32)
    ClassHead(weight, bias, ("a", "b", "c", "d")).write(path)
    return path


def config(store: FeatureStore, out: Path, targets: dict[str, Any], **changes: Any) -> TrainConfig:
    loop = {
        "batch_size": 4, "epochs": 2, "epoch_clips": 12, "lr": 0.02, "workers": 0, "threads": 1,
        "device": "cpu", "checkpoint_every": 2, "log_every": 2, **changes.pop("loop", {}),
    }  # fmt: skip
    base = {
        "store": str(store.path), "out": str(out), "student": {"width": 0.125}, "loop": loop,
        "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]}, "targets": targets,
    }  # fmt: skip
    return TrainConfig.model_validate(base | changes)


def test_targets_are_means_of_the_picked_frames_features(feature_store: FeatureStore) -> None:
    with pytest.raises(UsageError, match=r"max_entropy names 'nobody'"):
        student_clips(feature_store.path, max_entropy={"nobody": 1.0})
    clips = student_clips(feature_store.path, frames=8, size=32, picks="random:2")
    sampler = clips.sampler
    for sample in range(8):
        draw = sampler.draw(0, sample)
        index, _, rows = sampler.store.frames(draw.video)
        picked = feature_store.features[rows[np.isin(index, draw.picked)]]
        np.testing.assert_allclose(draw.targets[TEACHER], picked.mean(axis=0), rtol=2e-3, atol=2e-3)
        assert draw.weight[TEACHER] == 1


def test_a_head_gives_logits_entropies_and_the_filter(
    feature_store: FeatureStore, head: Path
) -> None:
    options: dict[str, Any] = {"frames": 8, "size": 32, "picks": "random:2", "teachers": [TEACHER]}
    plain = student_clips(feature_store.path, **options).sampler
    classes = ClassHead.read(head)
    nats = []
    for sample in range(12):
        draw = plain.draw(0, sample)
        logits = torch.from_numpy(classes.weight @ draw.targets[TEACHER] + classes.bias)
        nats.append(float(torch.distributions.Categorical(logits=logits).entropy()))
    limit = float(np.median(nats))
    sampler = student_clips(
        feature_store.path, heads={TEACHER: head}, max_entropy={TEACHER: limit},
        filter_mode="zero-weight", **options,
    ).sampler  # fmt: skip
    for sample in range(12):
        draw, features = sampler.draw(0, sample), plain.draw(0, sample).targets[TEACHER]
        np.testing.assert_allclose(
            draw.targets[TEACHER], classes.weight @ features + classes.bias, rtol=1e-4, atol=1e-4
        )
        assert sampler.entropies(0, sample)[0] == pytest.approx(nats[sample], abs=1e-4)
        if abs(nats[sample] - limit) > 1e-4:
            assert draw.weight[TEACHER] == (nats[sample] <= limit)


ALL = {"sure": "cosine", "unsure": "squared-error", TEACHER: "mse"}
MANY = {"loss": ALL, "balance_losses": True, "teacher_dropping": 0.4, "picks": "random:2"}


@pytest.mark.slow
def test_a_run_of_many_losses_is_resumed_bit_by_bit(
    feature_store: FeatureStore, tmp_path: Path
) -> None:
    class Stopping(Console):
        """SIGTERM when the first log line is shown, after step 2."""

        def info(self, text: str) -> None:
            if "step 2/" in text:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = train_student(config(feature_store, tmp_path / "whole", MANY, held_out=0.3), QUIET)
    held_out = whole["held_out"]
    assert set(held_out) == {"loss", *(f"loss/{name}" for name in ALL)} | {
        "agreement/sure", "cosine/sure", "agreement/unsure", "kl/unsure", f"cosine/{TEACHER}"
    }  # fmt: skip
    # Balanced: a constant predictor has a loss of 1 per teacher.
    baseline = whole["baseline_loss" if "baseline_loss" in whole else "loss_of_a_constant"]
    assert baseline == pytest.approx(3, rel=1e-6)
    cut = config(feature_store, tmp_path / "cut", MANY, held_out=0.3)
    with pytest.raises(TrainingInterrupted), Stopping(quiet=True) as console:
        train_student(cut, console)
    resumed = train_student(cut.model_copy(update={"resume": True}), QUIET)
    assert resumed["resumed_from_step"] in (2, 3)
    assert resumed["held_out"] == held_out
    first, second = (load_student(tmp_path / run).state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    student = load_student(tmp_path / "cut")
    assert student.classes == {"sure": 7, "unsure": 5, TEACHER: WIDTH}
    assert {name: (head.output, head.loss) for name, head in student.meta.heads.items()} == {
        "sure": ("logits", "cosine"), "unsure": ("logits", "squared-error"), TEACHER: ("features", "mse")
    }  # fmt: skip
    # What was trained is (x - mean) / scale; what is exported gives x.
    trained = build_student(student.options, student.classes).eval()
    load_weights(tmp_path / "cut", "last", trained)
    rows = TargetStore.open(feature_store.path).committed_rows(TEACHER)
    stored = feature_store.features[rows].astype(np.float16).astype(np.float64)
    clip = torch.randn(3, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs, raw = student(clip)[TEACHER].numpy(), trained(clip)[TEACHER].double().numpy()
    scale = np.sqrt(((stored - stored.mean(0)) ** 2).mean())
    np.testing.assert_allclose(outputs, raw * scale + stored.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_head_is_part_of_the_identity_of_a_run(
    feature_store: FeatureStore, head: Path, tmp_path: Path
) -> None:
    head_file = tmp_path / "mine.safetensors"
    shutil.copy(head, head_file)
    targets = {
        "teachers": [TEACHER],
        "heads": {TEACHER: str(head_file)},
        "max_entropy_quantile": 0.5,
    }
    one = config(feature_store, tmp_path / "run", targets, loop={"epochs": 1})
    result = train_student(one, QUIET)
    assert result["kept_share"] == pytest.approx(0.5, abs=0.1)
    student = load_student(tmp_path / "run")
    assert student.meta.classes == {TEACHER: ["a", "b", "c", "d"]}
    options = one.model_dump(mode="json") | {"resume": True}
    options["loop"]["epochs"] = 2
    moved = tmp_path / "moved.safetensors"
    head_file.rename(moved)
    options["targets"]["heads"] = {TEACHER: str(moved)}
    assert train_student(TrainConfig.model_validate(options), QUIET)["already_finished"] is False
    class_head = ClassHead.read(moved)
    ClassHead(class_head.weight * 2, class_head.bias, class_head.classes).write(moved)
    with pytest.raises(CheckpointError, match="heads"):
        train_student(TrainConfig.model_validate(options), QUIET)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ({"max_entropy": 2.0}, [f"--max-entropy 2.0: teacher '{TEACHER}'", "--head"]),
        ({"max_entropy_quantile": {TEACHER: 0.5}}, ["--max-entropy-quantile", TEACHER, "--head"]),
        ({"loss": {TEACHER: "cross-entropy"}}, [f"--loss {TEACHER}=cross-entropy", "cosine"]),
        ({"loss": {"nobody": "cosine"}}, ["'nobody'", "sure"]),
        ({"heads": {"sure": "h.safetensors"}}, ["--head sure=h.safetensors", "logits"]),
        ({"heads": {TEACHER: "missing.safetensors"}}, ["missing.safetensors"]),
    ],
)
def test_what_features_cannot_do(
    feature_store: FeatureStore, tmp_path: Path, targets: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        train_student(config(feature_store, tmp_path / "run", targets), QUIET)
    assert all(text in str(error.value) for text in said)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dropping_is_a_function_of_seed_and_sample(feature_store: FeatureStore) -> None:
    sampler = student_clips(feature_store.path, frames=8, size=32, seed=4).sampler
    assert sampler.dropped(0, 0) == {}
    sampler.teacher_dropping = 0.3
    drops = [tuple(sampler.dropped(epoch, k).values()) for epoch in range(20) for k in range(100)]
    assert [tuple(sampler.dropped(3, k).values()) for k in range(100)] == drops[300:400]
    assert np.mean(drops, axis=0) == pytest.approx([0.3] * 3, abs=0.05)
    assert len(set(map(tuple, np.array(drops).reshape(20, -1).tolist()))) == 20
    assert json.dumps(sampler.dropped(0, 1))
