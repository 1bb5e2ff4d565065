"""Weights of strangers: digests against hashlib, formats, and pickles that would run code."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distinit.pipeline.common.errors import WeightsError
from distinit.pipeline.common.weights import file_sha256, load_into, load_weights, state_sha256

STATE = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.num_batches_tracked": torch.tensor(7),
    "a.bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "é": torch.tensor([], dtype=torch.int64),
}


def reference_sha256(state: dict[str, torch.Tensor]) -> str:
    """The canonical form, written again from its description."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if not name.endswith("num_batches_tracked")):
        array = state[name].numpy()
        head = json.dumps([name, str(array.dtype), list(array.shape)], ensure_ascii=False)
        digest.update(
            head.encode() + b"\n" + array.astype(array.dtype.newbyteorder("<")).tobytes(order="C")
        )
    return digest.hexdigest()


def test_state_digest_against_hashlib() -> None:
    assert state_sha256(STATE) == reference_sha256(STATE)


def test_state_digest_sees_values_names_shapes_and_dtypes_alone() -> None:
    digest = state_sha256(STATE)
    without_counter = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}
    same = [
        dict(reversed(STATE.items())),
        without_counter,
        {**STATE, "b.weight": STATE["b.weight"].t().contiguous().t()},
    ]
    assert {state_sha256(state) for state in same} == {digest}
    others = [
        {**STATE, "b.weight": STATE["b.weight"] + 1e-6},
        {**STATE, "b.weight": STATE["b.weight"].reshape(3, 2)},
        {**STATE, "b.weight": STATE["b.weight"].view(torch.int32)},
        {**without_counter, "c": torch.zeros(1)},
        {"B.weight" if name == "b.weight" else name: tensor for name, tensor in STATE.items()},
    ]
    assert digest not in {state_sha256(state) for state in others}


def latin1_pickle() -> Any:
    """A pickle module whose strings are Python 2's: opcode SHORT_BINSTRING, bytes of latin-1."""

    class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def save_string(self, text: str) -> None:
            data = text.encode("latin1")
            self.write(b"U" + bytes([len(data)]) + data)
            self.memoize(text)

        dispatch = {**pickle._Pickler.dispatch, str: save_string}  # type: ignore[attr-defined]

    def dump(content: object, file: Any, protocol: int) -> None:
        Python2Pickler(file, protocol).dump(content)

    return SimpleNamespace(__name__="python2", Pickler=Python2Pickler, dump=dump)


@pytest.mark.parametrize("layout", ["safetensors", "zip", "nested", "module", "python2"])
def test_formats_give_the_same_state(tmp_path: Path, layout: str) -> None:
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth.tar")
    parallel = {f"module.{name}": tensor for name, tensor in STATE.items()}
    if layout == "safetensors":
        save_file(STATE, path)
    elif layout == "zip":
        torch.save(STATE, path)
    elif layout == "nested":
        torch.save({"epoch": 3, "model": STATE}, path)
    elif layout == "module":
        torch.save({"epoch": 3, "arch": "x", "state_dict": parallel, "best_prec1": 1.0}, path)
    else:
        state = {name: tensor for name, tensor in parallel.items() if tensor.numel()}
        content = {"arch": "r\xe9s", "state_dict": state}
        torch.save(
            content,
            path,
            pickle_module=latin1_pickle(),
            pickle_protocol=2,
            _use_new_zipfile_serialization=False,
        )
        with pytest.raises((UnicodeDecodeError, pickle.UnpicklingError)):
            torch.load(path, weights_only=True)
    weights = load_weights(path)
    assert set(weights.state) == {
        name for name in STATE if layout != "python2" or STATE[name].numel()
    }
    assert all(torch.equal(weights.state[name], STATE[name]) for name in weights.state)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    assert weights.name == path.name


class Bomb:
    """Pickles to a call that creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle", "inside"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, layout: str) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "created"
    bomb = Bomb(target)
    if layout == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        content = {"state_dict": STATE, "extra": bomb} if layout == "inside" else bomb
        torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy")
    with pytest.raises(WeightsError, match="never unpickled freely") as caught:
        load_weights(path)
    assert not target.exists()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    # The bomb is live: an ordinary load sets it off.
    torch.load(
        io.BytesIO(path.read_bytes()), weights_only=False
    ) if layout != "pickle" else pickle.loads(path.read_bytes())
    assert target.exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(WeightsError, match=r"w\.pth: No such file"):
        load_weights(path)
    for content in (b"", b"<html>404</html>", b"PK\x03\x04 half a zip"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"w\.pth: not a "):
            load_weights(path)
    (tmp_path / "w.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_weights(tmp_path / "w.safetensors")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(WeightsError, match="holds a list and no state dict"):
        load_weights(path)
    torch.save({"a": torch.zeros(1), "epoch": 3}, path)
    with pytest.raises(WeightsError, match="'epoch' is not a tensor"):
        load_weights(path)


def test_sha256_is_checked_before_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"not even a checkpoint")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(WeightsError) as caught:
        load_weights(path, sha256="AB" * 32)
    assert str(caught.value) == f"weights file {path}: sha256 is {digest}, expected {'ab' * 32}"
    with pytest.raises(WeightsError, match="not a "):
        load_weights(path, sha256=f" {digest.upper()} ")


def test_a_state_that_does_not_fit_is_described() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    del state["1.num_batches_tracked"]
    load_into(module, state, "weights file w")
    bad = {**state, "0.weight": torch.zeros(2, 4), "9.bias": torch.zeros(1)}
    del bad["1.bias"]
    with pytest.raises(WeightsError) as caught:
        load_into(module, bad, "weights file w")
    assert str(caught.value) == (
        "weights file w: does not fit Sequential: 1 tensors missing (first 1.bias), 1 unexpected (first 9.bias), "
        "1 of another shape (first 0.weight: [2, 4], the model's is [2, 3])"
    )
    assert np.array_equal(module[0].weight.detach().numpy(), state["0.weight"].numpy())
