"""Students of torchvision, timm, transformers and user modules, compared with these libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model

from distinit.pipeline.common.errors import CheckpointError, UsageError
from distinit.pipeline.students.external import torchvision_backbone
from distinit.pipeline.students.initialization import resolve_init
from distinit.pipeline.students.student import Student, build_student
from distinit.pipeline.students.student_files import load_backbone, load_student, save_student
from distinit.pipeline.students.student_options import StudentMeta, StudentOptions
from distinit.pipeline.training.loop import LossReport, fit
from distinit.pipeline.training.loop_options import LoopOptions

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
VIVIT = {**TINY, "tubelet_size": [2, 16, 16]}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MODULE = """
from torch import nn

class Wrapper(nn.Module):
    def __init__(self, clip_frames, clip_size, channels):
        super().__init__()
        self.feature_dim = 6
        self.conv = nn.Conv3d(channels, 6, (clip_frames, 4, 4), stride=4)

    def forward_features(self, clip):
        return {"features": self.conv(clip)}

def wrapper(**options):
    return Wrapper(**options)

def honest(clip_frames, clip_size, channels):
    return Wrapper(clip_frames, clip_size, channels)

def wrong(clip_frames, clip_size, channels):
    module = Wrapper(clip_frames, clip_size, channels)
    module.feature_dim = 7
    return module
"""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "videomae": ("hf:videomae", TINY),
    "vivit": ("hf:vivit", VIVIT),
    "timesformer": ("hf:timesformer", TINY),
    "timm-vit": ("timm:vit_tiny_patch16_224", VIT),
    "timm-convnet": ("timm:lcnet_035", {}),
    "wrapper": ("my_wrappers:honest", {}),
}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_wrappers.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def student_of(name: str, options: Mapping[str, Any] = {}, **others: Any) -> Student:
    if name.startswith("hf:"):
        pytest.importorskip("transformers", reason="the extra distinit[hf] is not installed")
    if name.startswith("timm:"):
        pytest.importorskip("timm", reason="the extra distinit[timm] is not installed")
    torch.manual_seed(0)
    student_options = StudentOptions.model_validate(
        {"architecture": name, "options": options, **others}
    )
    return build_student(student_options, {"t": 5}, clip=(8, 32)).eval()


def clip_of(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 8, 32, 32, generator=torch.Generator().manual_seed(1))


class Clips:
    """Clips of noise, whose target is their mean."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        noise = torch.Generator().manual_seed(100 * key[0] + key[1])
        clip = torch.randn(3, 8, 32, 32, generator=noise)
        return {"clip": clip, "y": clip.mean(), "name": str(key)}


class Squares:
    """Squared error of a head; may crash at a given call."""

    def __init__(self, crash: int | None = None) -> None:
        self.crash, self.calls = crash, 0

    def counts(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return torch.tensor([len(batch["y"])])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: torch.Tensor) -> LossReport:
        self.calls += 1
        if self.calls == self.crash:
            raise ZeroDivisionError
        error = model(batch["clip"])["t"] - batch["y"][:, None]
        return LossReport(error.square().sum() / counts[0])


def train(run: Path, student: Student, *, crash: int | None = None, resume: bool = False) -> None:
    options = LoopOptions(
        batch_size=2, epochs=2, epoch_clips=4, checkpoint_every=1, workers=0, threads=1,
        device="cpu", optimizer="adamw", schedule="cosine", log_every=10,
    )  # fmt: skip
    fit(
        model=student, dataset=Clips(), objective=Squares(crash), options=options, run_dir=run,
        identity={}, resume=resume,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_trained_resumed_saved_and_loaded(
    modules: None, tmp_path: Path, kind: str
) -> None:
    name, options = KINDS[kind]
    whole, parts = student_of(name, options), student_of(name, options)
    initial = {key: value.clone() for key, value in whole.named_parameters()}
    train(tmp_path / "whole", whole)
    for key, value in whole.named_parameters():
        # With several processes a parameter without a gradient is an error.
        assert value.grad is not None, key
    assert sum(not torch.equal(value, initial[key]) for key, value in whole.named_parameters()) > 3
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "parts", parts, crash=3)
    parts = student_of(name, options)
    train(tmp_path / "parts", parts, resume=True)
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in parts.state_dict().items())

    path = tmp_path / "s.safetensors"
    save_student(path, whole.eval(), StudentMeta(clip_length=8, clip_size=32))
    loaded = load_student(path, factory=name)
    other = student_of(name, options)
    assert all(key.startswith("fc.") for key in load_backbone(other, path).left)
    with torch.inference_mode():
        features = whole.features(clip_of())
        assert features.shape == (2, whole.feature_size)
        # Not bit by bit, because training has changed the memory format (channels last).
        assert torch.allclose(loaded(clip_of())["t"], whole(clip_of())["t"], atol=1e-6)
        assert torch.allclose(other.features(clip_of()), features, atol=1e-6)


@pytest.mark.parametrize("name", ["mvit_v1_b", "mvit_v2_s"])
def test_mvit_is_equal_to_torchvisions_for_its_clip_size(name: str) -> None:
    with torch.device("meta"):
        backbone = torchvision_backbone(StudentOptions(architecture=name), (16, 224))
        reference = get_model(name)
    reference.head = nn.Identity()
    assert repr(backbone) == repr(reference)
    models = (backbone, reference)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "frames", "size"),
    [("mvit_v1_b", 8, 112), ("mvit_v2_s", 4, 64), ("swin3d_t", 4, 64), ("s3d", 8, 64)],
)
def test_torchvisions_models_take_clips_of_any_size(name: str, frames: int, size: int) -> None:
    # Only shapes are computed.
    with torch.device("meta"):
        options = StudentOptions(architecture=name, channels=2)
        student = build_student(options, {"t": 5}, clip=(frames, size))
        logits = student(torch.zeros(2, 2, frames, size, size))["t"]
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_frames_are_averaged_after_the_image_model() -> None:
    name = "vit_tiny_patch16_224"
    student = student_of(f"timm:{name}", VIT, channels=2)
    import timm

    model = timm.create_model(name, num_classes=0, in_chans=2, img_size=32, **VIT).eval()
    prefix = "image_model."
    state = {k.removeprefix(prefix): v for k, v in student.backbone.state_dict().items()}
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        frames = torch.stack([model(clip_of(2)[:, :, frame]) for frame in range(8)])
        assert torch.allclose(student.features(clip_of(2)), frames.mean(0), atol=1e-6)


def test_transformers_sees_time_before_channels() -> None:
    student = student_of("hf:videomae", TINY)
    model = student.backbone.model
    with torch.inference_mode():
        hidden = model.videomae(clip_of().permute(0, 2, 1, 3, 4)).last_hidden_state
        # 4 tubelets of 2 frames, 2 × 2 patches of 16 pixels.
        assert hidden.shape == (2, 4 * 4, 32)
        expected = model.fc_norm(hidden.mean(1))
        assert torch.allclose(student.features(clip_of()), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["videomae", "timesformer"])
def test_a_folder_of_transformers_is_an_initialisation(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="distinit[hf] is not installed")
    options = {**TINY, "image_size": 32, "num_frames": 8}
    config = transformers.AutoConfig.for_model(kind, **options)
    model = transformers.AutoModelForVideoClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    init = resolve_init(f"hf:{tmp_path}", None)
    assert init.options.architecture == f"hf:{kind}"
    student = build_student(init.options, {"label": 2}, clip=(8, 32)).eval()
    init.fill(student)
    model.classifier = nn.Identity()
    with torch.inference_mode():
        expected = model(pixel_values=clip_of().transpose(1, 2)).logits
        assert torch.equal(student.features(clip_of()), expected)
    # The file of the student does not need the folder.
    save_student(tmp_path / "s.safetensors", student, StudentMeta(clip_length=8, clip_size=32))
    with torch.inference_mode():
        features = load_student(tmp_path / "s.safetensors").features(clip_of())
    assert torch.equal(features, expected)

    with pytest.raises(CheckpointError, match="architecture is"):
        resolve_init(f"hf:{tmp_path}", StudentOptions(architecture="s3d"))
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    (tmp_path / "s.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        init.fill(student)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match=r"'bert'.*videomae"):
        resolve_init(f"hf:{tmp_path}", None)
    grey = {"model_type": "videomae", "num_channels": 1}
    (tmp_path / "config.json").write_text(json.dumps(grey))
    with pytest.raises(CheckpointError, match=r"num_channels is 1.*2, 3"):
        resolve_init(f"hf:{tmp_path}", None)


@pytest.mark.parametrize(
    ("name", "options", "larger"),
    [
        # transformers computes positional embeddings in Python, which takes a minute for 2**20.
        ("hf:videomae", TINY, {"hidden_size": 2**14}),
        ("timm:vit_tiny_patch16_224", VIT, {"embed_dim": 2**20}),
        ("timm:vit_tiny_patch16_224", VIT, {"checkpoint_path": "a.pth"}),
    ],
)
def test_a_file_that_claims_a_larger_student_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], larger: dict[str, Any]
) -> None:
    path, meta = tmp_path / "s.safetensors", {"clip_length": 8, "clip_size": 32}
    save_student(path, student_of(name, options), meta)
    header = {"format_version": 1, "heads": {"t": 5}, "meta": meta}
    for changes in ({}, larger):
        student_options = {"architecture": name, "options": {**options, **changes}}
        text = json.dumps({**header, "options": student_options})
        save_file(load_file(path), path, {"distinit": text})
        if not changes:
            load_student(path)
    with pytest.raises((CheckpointError, UsageError), match=r"s\.safetensors|checkpoint_path"):
        load_student(path)


def test_options_that_a_library_does_not_take_are_refused_by_name(modules: None) -> None:
    for name, options, words in [
        ("timm:no_such_model", {}, "no such model"),
        ("timm:hf-hub:somebody/model", {}, "no such model"),
        ("timm:vit_tiny_patch16_224", {"checkpoint_path": "a.pth"}, r"options\.checkpoint_path"),
        ("timm:vit_tiny_patch16_224", {"pretrained": True}, r"options\.pretrained"),
        ("timm:vit_tiny_patch16_224", {"no_such_option": 1}, "no_such_option"),
        ("hf:videomae", {"attn_implementation": "a/b"}, r"options\.attn_implementation"),
        ("hf:vivit", {"_name_or_path": "a/b"}, r"options\._name_or_path"),
        ("hf:videomae", {**TINY, "num_frames": 16}, r"does not take clips .*8, 32, 32"),
        ("my_wrappers:wrong", {}, "feature_dim is 7, its features have 6"),
    ]:
        with pytest.raises(UsageError, match=words):
            student_of(name, options)
    with pytest.raises(ValidationError, match=r"hf:bert.*hf:videomae"):
        StudentOptions(architecture="hf:bert")
