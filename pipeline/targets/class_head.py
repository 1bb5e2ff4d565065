"""Heads: classifiers that turn cached features into logits when clips are drawn.

A head is a linear classifier, or embeddings of class names with the scale of a text-image model. So
no teacher is required for a vocabulary of new classes: the features are in the store.

Shapes: n rows, K classes, D features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..common.errors import UsageError
from ..common.files import write_whole
from ..common.sealed import sha256_of


@dataclass(frozen=True)
class ClassHead:
    """Logits of features: logit_scale · weight · x + bias, with x of length 1 if `normalize`.

    weight: float32 [K, D]. bias: float32 [K] or None. classes: their names [K]. digest: sha256 of
    the file that it was read from, "" without one.

    Example:
        `ClassHead.read("classes.safetensors")(store.outputs("clip.features", rows))` → [n, K]
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    classes: tuple[str, ...]
    logit_scale: float = 1.0
    normalize: bool = False
    digest: str = ""

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return logits [n, K] of features [n, D]."""
        x = np.asarray(features, np.float32)
        if self.normalize:
            length = np.sqrt(np.square(x).sum(axis=1, keepdims=True))
            x = np.asarray(x / np.maximum(length, np.float32(1e-12)), np.float32)
        # A matrix product would round differently with the number of rows and threads; targets
        # must be a function of the row alone.
        logits = np.einsum("nd,kd->nk", x, self.weight, optimize=False)
        if self.logit_scale != 1:
            logits *= np.float32(self.logit_scale)
        return logits if self.bias is None else logits + self.bias

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ClassHead:
        """Read a safetensors file by `write` or by another program.

        Tensors `weight` [K, D] and, optionally, `bias` [K]; metadata `classes`, a JSON list of K
        names, and optionally `logit_scale`, a number, and `normalize`, true or false.

        Raises:
            UsageError: The file is of another kind.
        """
        where = f"--head {os.fspath(path)}"
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = sha256_of(path)
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise UsageError(f"{where}: cannot be read as safetensors ({error})") from None
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or weight.ndim != 2 or 0 in weight.shape:
            shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in tensors.items()) or "no tensors"
            raise UsageError(
                f"{where}: requires a tensor weight [classes, features]; it has {shapes}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise UsageError(
                f"{where}: bias has shape {list(bias.shape)}, expected [{len(weight)}] as weight"
            )
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not (tensor.dtype.kind == "f" and np.isfinite(tensor).all()):
                raise UsageError(f"{where}: {name} must hold finite floating-point numbers")
        return cls(
            weight.astype(np.float32),
            None if bias is None else bias.astype(np.float32),
            _classes(where, metadata, len(weight)),
            _number(where, metadata),
            _flag(where, metadata),
            digest,
        )

    def write(self, path: Path) -> None:
        """Write a file that `read` reads. Raises DistInitError where it cannot be written."""
        tensors: dict[str, NDArray[Any]] = {"weight": np.ascontiguousarray(self.weight)}
        if self.bias is not None:
            tensors["bias"] = np.ascontiguousarray(self.bias)
        metadata = {
            "classes": json.dumps(list(self.classes), ensure_ascii=False),
            "logit_scale": json.dumps(self.logit_scale),
            "normalize": json.dumps(self.normalize),
        }
        write_whole(path, save(tensors, metadata=metadata))


def _classes(where: str, metadata: dict[str, str], count: int) -> tuple[str, ...]:
    try:
        names = json.loads(metadata.get("classes", "null"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UsageError(f"{where}: its metadata requires `classes`, a JSON list of names")
    if len(names) != count or len(set(names)) != count:
        raise UsageError(
            f"{where}: {len(set(names))} different names in `classes`, but weight has {count} rows"
        )
    return tuple(names)


def _number(where: str, metadata: dict[str, str]) -> float:
    text = metadata.get("logit_scale", "1")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (np.isfinite(value) and value > 0):
        raise UsageError(f"{where}: logit_scale must be a number above 0, got {text!r}")
    return value


def _flag(where: str, metadata: dict[str, str]) -> bool:
    text = metadata.get("normalize", "false").lower()
    if text not in ("true", "false"):
        raise UsageError(f"{where}: normalize must be true or false, got {text!r}")
    return text == "true"


def read_heads(
    files: Mapping[str, str], widths: Mapping[str, int], outputs: Mapping[str, str]
) -> dict[str, ClassHead]:
    """Read the heads of teachers and compare each with its teacher.

    Args:
        files: teacher → file of its head.
        widths: teacher → numbers per row.
        outputs: teacher → "logits" or "features", for all teachers that are learned from.

    Raises:
        UsageError: A teacher is not among them or gives logits, or a file does not fit.
    """
    heads = {}
    for name, path in files.items():
        if name not in outputs:
            raise UsageError(
                f"--head {name}={path}: {name!r} is not learned from; the teachers are: "
                f"{', '.join(outputs)}"
            )
        if outputs[name] != "features":
            raise UsageError(
                f"--head {name}={path}: teacher {name!r} gives {outputs[name]}; a head requires "
                f"features"
            )
        head = ClassHead.read(path)
        if head.weight.shape[1] != widths[name]:
            raise UsageError(
                f"--head {name}={path}: weight has {head.weight.shape[1]} columns, teacher {name!r} "
                f"gives {widths[name]} features"
            )
        heads[name] = head
    return heads


def class_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the class names of a list, without blank lines and lines that begin with #."""
    return tuple(
        dict.fromkeys(
            text.strip() for text in texts if text.strip() and not text.strip().startswith("#")
        )
    )
