"""Farnebäck flow of a known translation, and clips of flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distinit.pipeline.clips.clip_options import ClipView
from distinit.pipeline.clips.transforms import (
    center_crop,
    crop_and_flip,
    normalize_clip,
    of_channels,
)
from distinit.pipeline.evaluation.labelled_clips import EvaluationClips, LabelledClips
from distinit.pipeline.evaluation.labels import load_labels
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.targets.dataset import StudentClips
from distinit.pipeline.targets.picks import PickRule
from distinit.pipeline.targets.sampler import TargetSampler
from distinit.pipeline.video import flow
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.frames import read_frames

cv2 = pytest.importorskip("cv2")
VIEW = ClipView(size=48, resize=(56, 72))


def shifted(steps: int, x: float, y: float, height: int = 96, width: int = 128) -> np.ndarray:
    """A smooth picture that moves by (x, y) pixels per frame, uint8 [steps, height, width, 3]."""
    random = np.random.default_rng(0)
    waves = [(*random.uniform(0.05, 0.25, 2), *random.uniform(0, 6.28, 2)) for _ in range(12)]
    rows, columns = np.mgrid[0:height, 0:width]
    frames = []
    for t in range(steps):
        value = sum(
            np.sin(a * (columns - t * x) + p) * np.cos(b * (rows - t * y) + q)
            for a, b, p, q in waves
        )
        frames.append(np.repeat((128 + 20 * value)[..., None], 3, -1).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


@pytest.mark.parametrize(("x", "y"), [(2.0, 0.0), (0.0, -1.5), (-3.0, 1.0), (0.0, 0.0)])
def test_a_translation_is_measured_in_pixels(x: float, y: float) -> None:
    computed = flow.optical_flow(shifted(4, x, y))
    assert computed.shape == (3, 96, 128, 2)
    assert computed.dtype == np.float32
    inside = computed[:, 16:-16, 16:-16]
    assert np.abs(inside - (x, y)).mean() < 0.15


def test_a_mirrored_clip_negates_x_and_normalisation_is_that_of_flow() -> None:
    images = shifted(4, 2.0, 1.0)
    clip = of_channels(crop_and_flip(images, 8, 8, 80, False), 2)
    mirrored = of_channels(crop_and_flip(images, 8, 8, 80, True), 2)
    assert clip.shape == (2, 3, 80, 80)
    stored = clip.flip(3) * torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    assert (mirrored - stored).abs()[..., 12:-12, 12:-12].mean() < 0.05
    expected = [(clip[0].mean() - 0.0046635) / 0.972347, (clip[1].mean() - 0.0046261) / 0.755146]
    assert normalize_clip(clip[None])[0].mean((1, 2, 3)).tolist() == pytest.approx(
        list(map(float, expected)), rel=1e-4
    )
    rgb = crop_and_flip(images, 8, 8, 80, False)
    assert of_channels(rgb, 3) is rgb


def test_students_of_flow_see_the_flow_of_the_clips_that_others_see(tiny_store) -> None:
    store = TargetStore.open(tiny_store.path)
    sampler = TargetSampler(
        store, teachers=("sure",), picks=PickRule.parse("random"), clip_frames=8, videos=store.usable(), seed=1,
        epoch_clips=12, ahead=1,
    )  # fmt: skip
    clips = StudentClips(sampler, VIEW, channels=2)
    for sample in range(6):
        draw, example = sampler.draw(0, sample), clips[0, sample]
        last = draw.frame_count - 1
        assert draw.indices.tolist() == [min(draw.start + t, last) for t in range(9)]
        if draw.frame_count > 8:
            assert draw.start + 8 <= last
        assert set(draw.picked.tolist()) <= set(draw.indices[:8].tolist())
        images = read_frames(store.video_path(draw.video), draw.indices, VIEW.frame_view()).images
        cropped = crop_and_flip(images, int(draw.top * 9), int(draw.left * 25), 48, draw.flip)
        expected = flow.optical_flow(cropped.permute(1, 2, 3, 0).numpy()).transpose(3, 0, 1, 2)
        np.testing.assert_array_equal(example["clip"], expected)
    with pytest.raises(ValueError, match="ahead=0"):
        StudentClips(sampler, VIEW)


@pytest.mark.slow
def test_labelled_clips_of_flow(tmp_path: Path) -> None:
    for name, speed in (("a.mp4", 2.0), ("b.mp4", -2.0), ("c.mp4", 2.2), ("d.mp4", -2.2)):
        write_video(tmp_path / name, shifted(20, speed, 0.0), gop=12)
    lines = [
        "path,label,split1",
        "a.mp4,right,train",
        "b.mp4,left,train",
        "c.mp4,right,test",
        "d.mp4,left,test",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    labels = load_labels(f"csv:{tmp_path / 'labels.csv'}", 1)
    steady = VIEW.model_copy(update={"flip": 0.0})
    train = LabelledClips(labels, steady, clip_frames=4, seed=0, epoch_clips=2, channels=2)
    for sample in range(2):
        example = train[0, sample]
        assert example["clip"].shape == (2, 4, 48, 48)
        sign = 1 if labels.classes[example["label"]] == "right" else -1
        assert sign * float(example["clip"][0].median()) > 0.5
    test = EvaluationClips(labels, labels.test, VIEW, clip_frames=4, clips=3, channels=2)
    row = test[0, 0]
    assert row["clips"].shape == (3, 2, 4, 48, 48)
    assert row["starts"].tolist() == [0, 7, 15]  # 20 frames, a clip spans 5
    images = read_frames(str(tmp_path / "c.mp4"), np.arange(7, 12), VIEW.frame_view()).images
    expected = of_channels(center_crop(images, 48), 2)
    assert torch.equal(row["clips"][1], expected)
