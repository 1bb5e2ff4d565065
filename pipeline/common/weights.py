"""Weights from third-party files, and the digests that identify them.

A checkpoint is data: safetensors, or torch's formats through its weights-only unpickler. A file
that requires unrestricted unpickling is refused.

Two digests, both sha256 in hex:

- of the **file**, as `sha256sum FILE` prints it: users pass it, and it is recorded for people;
- of the **state** that was loaded: it identifies a teacher. It covers every tensor of the state in
  the order of the names' UTF-8 bytes: name, dtype, shape, and the bytes as little-endian,
  contiguous. BatchNorm's batch counters are left out, since no output depends on them and older
  files lack them. The same weights have the same digest in every file, library and machine.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .errors import WeightsError, first_line
from .sealed import check_seal, sha256_of

_NESTED = ("state_dict", "model")
_COUNTER = "num_batches_tracked"
# Exceptions of torch's reader for a pickle of more than tensors, or one by Python 2.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    UnicodeDecodeError,
    TypeError,
    AttributeError,
    KeyError,
    ValueError,
)


@dataclass(frozen=True)
class WeightsFile:
    """A state read from a file, and the file's name (without folders) and sha256."""

    state: dict[str, Tensor]
    name: str
    sha256: str


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file, in hex.

    Raises:
        WeightsError: The file is missing or cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise WeightsError(f"weights file {path}: {error.strerror or error}") from None


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a state in the canonical form of this module's docstring, in hex."""
    digest = hashlib.sha256()
    for name in sorted(state, key=lambda key: key.encode()):
        if name.rsplit(".", 1)[-1] == _COUNTER:
            continue
        tensor = state[name].detach().cpu().contiguous()
        head = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(head, ensure_ascii=False).encode() + b"\n")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_sha256(prefix: str, digest: str, expected: str | None) -> None:
    """Compare a digest with the one of the user, if there is one.

    Upper case and surrounding spaces do not matter.

    Raises:
        WeightsError: They differ. The message begins with `prefix` and has both.
    """
    if expected is not None and digest != expected.strip().lower():
        raise WeightsError(f"{prefix}: sha256 is {digest}, expected {expected.strip().lower()}")


def load_weights(path: str | Path, sha256: str | None = None) -> WeightsFile:
    """Read a state dict from a safetensors or torch checkpoint, without unrestricted unpickling.

    The digest is checked before the file is parsed. A state may be stored under `state_dict` or
    `model`, and its names may all begin with `module.`, which DataParallel adds.

    Raises:
        WeightsError: The file is missing, has another sha256, is no checkpoint, or requires
            unrestricted unpickling.
    """
    path = Path(path)
    digest = file_sha256(path)
    check_sha256(f"weights file {path}", digest, sha256)
    # The file may be one of distinit, such as an exported student.
    check_seal(path, WeightsError)
    if path.suffix == ".safetensors":
        try:
            content: object = load_file(path)
        except (SafetensorError, ValueError) as error:
            raise WeightsError(
                f"weights file {path}: not a safetensors file ({first_line(error)})"
            ) from None
    else:
        content = _load_torch(path)
    return WeightsFile(_state_in(content, path), path.name, digest)


def _load_torch(path: Path) -> object:
    """Load a torch file, weights only; pickles written by Python 2 are read as latin1."""
    with warnings.catch_warnings():
        # torch warns that it ignores `encoding`; it does pass it to the weights-only reader.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except _UNPICKLING_ERRORS as error:
            refusal = error
        except (RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise WeightsError(
                f"weights file {path}: not a torch checkpoint ({first_line(error)})"
            ) from None
        try:
            return torch.load(path, map_location="cpu", weights_only=True, encoding="latin1")
        # A hostile pickle can make the reader raise any exception.
        except Exception:
            raise WeightsError(
                f"weights file {path}: not a checkpoint of tensors alone, and it is never unpickled freely; "
                f"save its state dict as safetensors ({_refused_content(refusal)})"
            ) from None


def _refused_content(error: Exception) -> str:
    """Return the content that torch's weights-only reader refuses, without the reader's advice."""
    match = re.search(r"[Uu]nsupported [^\n]{1,200}", str(error))
    return match[0].rstrip(".") if match else "neither torch nor safetensors can read it"


def _state_in(content: object, path: Path) -> dict[str, Tensor]:
    """Return the state dict inside a checkpoint."""
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"weights file {path}: holds a {type(content).__name__} and no state dict; "
            f"allowed: a state dict, alone or under {' or '.join(_NESTED)}"
        )
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise WeightsError(
            f"weights file {path}: {others[0]!r} is not a tensor, so this is no state dict"
        )
    names = [str(key) for key in content]
    prefix = "module." if all(name.startswith("module.") for name in names) else ""
    return {
        name.removeprefix(prefix): content[key] for name, key in zip(names, content, strict=True)
    }


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """Load a whole state; BatchNorm's batch counters may be missing.

    Raises:
        WeightsError: A tensor is missing, unexpected or of another shape. The message begins with
            `prefix` and names the first of each kind.
    """
    current = module.state_dict()
    missing = [name for name in current if name not in state and not name.endswith(_COUNTER)]
    extra = [name for name in state if name not in current]
    shapes = [
        name for name in current if name in state and current[name].shape != state[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors missing (first {missing[0]})")
    if extra:
        problems.append(f"{len(extra)} unexpected (first {extra[0]})")
    if shapes:
        name = shapes[0]
        problems.append(
            f"{len(shapes)} of another shape (first {name}: {list(state[name].shape)}, "
            f"the model's is {list(current[name].shape)})"
        )
    if problems:
        raise WeightsError(f"{prefix}: does not fit {type(module).__name__}: {', '.join(problems)}")
    module.load_state_dict(state, strict=False)


def hub_folder() -> Path:
    """Return the folder of torch hub's checkpoints, in TORCH_HOME or the user's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def library_weights(
    choice: Any, sha256: str | None = None, *, prefix: str, remedy: str, fetch: bool = True
) -> WeightsFile:
    """Return the weights of a torchvision enum member such as ResNet18_Weights.IMAGENET1K_V1.

    Args:
        choice: The member of the enum.
        sha256: The required sha256 of the file; None allows any.
        prefix: Begins the message: the option or model that requires the weights.
        remedy: Ends the message: how to pass a file.
        fetch: Whether the weights may be downloaded.

    Raises:
        WeightsError: The weights are not in the cache and cannot be fetched, have another sha256,
            or are damaged.
    """
    path = hub_folder() / Path(urlparse(choice.url).path).name
    if not path.is_file():
        if not fetch:
            raise WeightsError(
                f"{prefix}: {path.name} is not in {path.parent} and is not downloaded here; {remedy}"
            )
        try:
            choice.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
            )
        except (OSError, RuntimeError) as error:
            raise WeightsError(
                f"{prefix}: {path.name} is not in {path.parent} and cannot be fetched "
                f"({first_line(error)}); "
                f"get {choice.url} and {remedy}"
            ) from None
    return load_weights(path, sha256)
