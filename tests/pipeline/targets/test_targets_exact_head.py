"""Heads of real models: the classifier of EfficientNet-Lite0, and texts by open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import VocabularyConfig
from distinit.pipeline.targets.class_head import ClassHead
from distinit.pipeline.teachers.teacher import load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_vocabulary import targets_vocabulary

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
NAME = "efficientnet_lite0"


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_features_through_the_classifier_are_the_logits(
    tiny_store: Any, tmp_path: Path, encoding: str
) -> None:
    """Within what rounding the stored features and logits can move."""
    video = sorted(tiny_store.videos.iterdir())[2]  # five frames
    spec = TeacherSpec(name=NAME, outputs=("logits", "features"))
    out = tmp_path / "targets.zarr"
    extract_targets(
        ExtractConfig(sources=[str(video)], out=out, teachers=[spec], encoding=encoding), QUIET
    )
    classifier = load_teacher(TeacherSpec(name=NAME)).module.get_submodule("_fc")
    store = TargetStore.open(out)
    weight, bias = (x.detach().numpy() for x in (classifier.weight, classifier.bias))
    path = tmp_path / "head.safetensors"
    ClassHead(weight, bias, store.teachers[NAME].classes).write(path)
    rows = store.committed_rows(NAME)
    features = store.outputs(f"{NAME}.features", rows)
    found, stored = ClassHead.read(path)(features), store.logits(NAME, rows)

    # Half a step of each value: of 255 between a row's ends, or in float16 of 11 bits.
    def step(x: np.ndarray) -> np.ndarray:
        if encoding == "int8":
            return np.ptp(x, axis=1, keepdims=True) / 255 / 2 + np.zeros_like(x)
        return np.abs(x) * 2.0**-11 + 2.0**-24

    bound = step(features) @ np.abs(weight).T + step(stored) + 1e-4
    assert (np.abs(found - stored) <= bound).all()
    assert np.abs(found - stored).max() > 0
    assert (found.argmax(axis=1) == stored.argmax(axis=1)).all()


def test_a_vocabulary_is_the_mean_of_its_prompts(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {"vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-words.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-words.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-words", pretrained=None).eval()
    weights, names = tmp_path / "clip.safetensors", tmp_path / "classes.txt"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    names.write_text("# mine\nrun\n\njump\nrun\n")
    prompts = ["a photo of {}.", "someone who {}s"]
    options = VocabularyConfig(
        classes=str(names), out=str(tmp_path / "head.safetensors"), teacher="open_clip:tiny-words",
        weights=str(weights), prompts=prompts,
    )  # fmt: skip
    assert targets_vocabulary(options, QUIET)["classes"] == ["run", "jump"]
    head = ClassHead.read(options.out)
    tokens = open_clip.get_tokenizer("tiny-words")
    with torch.no_grad():
        for row, name in zip(head.weight, ("run", "jump"), strict=True):
            texts = model.encode_text(tokens([text.replace("{}", name) for text in prompts]))
            mean = torch.nn.functional.normalize(texts, dim=1).mean(dim=0)
            expected = torch.nn.functional.normalize(mean, dim=0).numpy()
            np.testing.assert_allclose(row, expected, atol=1e-5)
    assert head.normalize
    assert head.logit_scale == pytest.approx(float(model.logit_scale.exp()), rel=1e-6)
    with pytest.raises(UsageError, match="open_clip"):
        targets_vocabulary(options.model_copy(update={"teacher": "resnet50"}), QUIET)


@pytest.mark.parametrize(
    "changes", [{"prompts": ["a photo"]}, {"prompts": ["{} {}"]}, {"out": "head.pt"}]
)
def test_options_that_make_no_vocabulary(changes: dict[str, Any]) -> None:
    base = {"classes": "c.txt", "out": "h.safetensors", "teacher": "open_clip:tiny-words"}
    with pytest.raises(ValueError, match=next(iter(changes))):
        VocabularyConfig(**(base | changes))
