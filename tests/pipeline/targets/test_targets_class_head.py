"""Heads that make logits of features when clips are drawn, against NumPy and torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.targets.class_head import ClassHead, read_heads

CLASSES, FEATURES = ("cat", "dög", "a b"), 5


def head_file(path: Path, **changes: object) -> Path:
    random = np.random.default_rng(1)
    tensors = {"weight": random.normal(0, 1, (3, FEATURES)).astype(np.float16)}
    metadata = {"classes": json.dumps(CLASSES)}
    for key, value in changes.items():
        (tensors if isinstance(value, np.ndarray) else metadata)[key] = value
    save_file(
        {k: v for k, v in tensors.items() if v.size}, path, {k: str(v) for k, v in metadata.items()}
    )
    return path


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_torch(tmp_path: Path, normalize: bool, bias: bool) -> None:
    more = {"bias": np.array([1, -2, 0.5], np.float32)} if bias else {}
    path = head_file(tmp_path / "h.safetensors", logit_scale=20.5, normalize=normalize, **more)
    head = ClassHead.read(path)
    assert head.classes == CLASSES
    x = torch.randn(7, FEATURES)
    given = torch.nn.functional.normalize(x) if normalize else x
    weight = torch.from_numpy(head.weight)
    expected = 20.5 * torch.nn.functional.linear(given, weight)
    expected += torch.from_numpy(more["bias"]) if bias else 0
    logits = head(x.numpy())
    np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-5, atol=1e-5)
    for row in range(7):  # to the last bit, whatever rows are read with it
        assert (head(x.numpy()[row : row + 1])[0] == logits[row]).all()


def test_a_head_is_written_as_it_is_read(tmp_path: Path) -> None:
    head = ClassHead.read(head_file(tmp_path / "a.safetensors", normalize="true", logit_scale="3"))
    head.write(tmp_path / "b.safetensors")
    again = ClassHead.read(tmp_path / "b.safetensors")
    assert (again.weight == head.weight).all()
    assert (again.classes, again.normalize, again.logit_scale) == (CLASSES, True, 3.0)
    assert again.digest != head.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weight": np.zeros(3, np.float32)}, "weight"),
        ({"weight": np.zeros(0, np.float32)}, "weight"),
        ({"weight": np.zeros((3, 5), np.int32)}, "weight"),
        ({"weight": np.full((3, 5), np.nan, np.float32)}, "weight"),
        ({"bias": np.zeros(4, np.float32)}, "bias"),
        ({"classes": '["a", "b"]'}, "classes"),
        ({"classes": '["a", "b", "b"]'}, "classes"),
        ({"classes": "nothing"}, "classes"),
        ({"logit_scale": "-1"}, "logit_scale"),
        ({"logit_scale": "high"}, "logit_scale"),
        ({"normalize": "maybe"}, "normalize"),
    ],
)
def test_files_that_are_no_heads(tmp_path: Path, changes: dict, said: str) -> None:
    path = head_file(tmp_path / "h.safetensors", **changes)
    with pytest.raises(UsageError, match=said) as error:
        ClassHead.read(path)
    assert str(path) in str(error.value)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "h.safetensors").write_bytes(b"no")
    for name in ("h.safetensors", "missing.safetensors"):
        with pytest.raises(UsageError, match=name):
            ClassHead.read(tmp_path / name)


def test_heads_fit_their_teachers(tmp_path: Path) -> None:
    path = str(head_file(tmp_path / "h.safetensors"))
    outputs = {"f": "features", "l": "logits"}
    assert read_heads({"f": path}, {"f": FEATURES, "l": 9}, outputs)["f"].classes == CLASSES
    for name, width, said in (("l", FEATURES, "logits"), ("g", FEATURES, "'g'"), ("f", 6, "6")):
        with pytest.raises(UsageError, match=said):
            read_heads({name: path}, {"f": width, "l": width}, outputs)
