"""Encodings of logits: float16, or int8 with a scale and an offset per row at half the size.

int8 maps a row's smallest logit to −128 and its largest to 127, both exactly: z ≈ offset + scale ·
q. With a symmetric scale alone the steps would be larger by half, where it matters most, at the top
(docs/stores.md). Entropies never come from stored logits, but from the teacher's float32 logits.

Shapes: n rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from ..common.errors import StoreError
from ..common.numerics import softmax
from .store_options import Encoding

ENCODINGS: tuple[str, ...] = get_args(Encoding)
DEFAULT: Encoding = "float16"
LARGEST = float(np.finfo(np.float16).max)
"""The largest magnitude of a logit that is kept, whatever the encoding: every store can become a
float16 one."""


def check_encoding(name: object, where: str) -> Encoding:
    """Raise StoreError if a store uses an encoding that version 1 does not have."""
    if name not in ENCODINGS:
        raise StoreError(f"{where}: encoding {name!r}, this distinit reads {', '.join(ENCODINGS)}")
    return cast(Encoding, name)


def arrays_of(encoding: Encoding) -> tuple[str, ...]:
    """Return the names of the arrays that hold a teacher's logits."""
    return ("logits", "scale", "offset") if encoding == "int8" else ("logits",)


def row_bytes(classes: int, encoding: Encoding) -> int:
    """Return the size of a row of logits in bytes."""
    return classes + 8 if encoding == "int8" else 2 * classes


def storable(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rows [n] of `logits` [n, K] that can be kept: all finite and none beyond float16."""
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(logits) <= LARGEST).all(axis=-1))  # False for nan


def encode(logits: NDArray[np.float32], encoding: Encoding) -> dict[str, NDArray[Any]]:
    """Encode `logits` [n, K] as the arrays of `arrays_of(encoding)`.

    Rows that cannot be stored become fill.
    """
    good = storable(logits)
    z = logits if good.all() else np.where(good[:, None], logits, np.float32(np.nan))
    if encoding == "float16":
        return {"logits": z.astype(np.float16)}
    low, high = (
        z.min(axis=1, initial=np.inf).astype(np.float64),
        z.max(axis=1, initial=-np.inf).astype(np.float64),
    )
    scale = ((high - low) / 255).astype(np.float32)
    # From the rounded scale, so that the largest logit, which has the most weight, is met whatever
    # the scale lost.
    offset = (high - 127 * scale.astype(np.float64)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint((z - offset[:, None]) / scale[:, None])
    # All logits are equal: no step, and the offset alone is exact.
    steps = np.where(scale[:, None] > 0, steps, np.where(good, 127, 0)[:, None])
    return {"logits": np.clip(steps, -128, 127).astype(np.int8), "scale": scale, "offset": offset}


def decode(arrays: Mapping[str, NDArray[Any]], encoding: Encoding) -> NDArray[np.float32]:
    """Logits [n, K] in float32; NaN in fill."""
    logits = arrays["logits"].astype(np.float32)
    if encoding == "int8":
        logits *= arrays["scale"][:, None]
        logits += arrays["offset"][:, None]
    return logits


def read_logits(read: Callable[[str], NDArray[Any]], encoding: Encoding) -> NDArray[np.float32]:
    """Return decoded logits [n, K], where `read(array)` returns rows of a teacher's array."""
    return decode({name: read(name) for name in arrays_of(encoding)}, encoding)


def rounding(arrays: Mapping[str, NDArray[Any]], encoding: Encoding) -> NDArray[np.float32]:
    """Return the largest error of a stored logit in each row [n]."""
    if encoding == "int8":
        return np.asarray(arrays["scale"] / 2, np.float32)
    return np.asarray(
        np.abs(arrays["logits"].astype(np.float32)).max(axis=1, initial=0) * 2**-11, np.float32
    )


def divergence(logits: NDArray[np.float32], kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """KL of softmax(kept) from softmax(logits) at τ = 1, in nats [n]: the error of an encoding.

    With p the first and d = kept − logits, KL = log Σ p exp d − Σ p d. Shifted so that Σ p d = 0,
    that is log1p Σ p (exp d − 1 − d), a sum of small terms of one sign: float32 resolves even
    float16's 1e-6.
    """
    p = softmax(logits)
    d = kept - logits
    d -= (p * d).sum(axis=-1, keepdims=True)
    if np.abs(d).max(initial=0) < 0.5:  # its series, several times faster than expm1
        excess = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120))))
    else:
        excess = np.expm1(d) - d
    return np.asarray(np.log1p((p * excess).sum(axis=-1)), np.float32)


def error_record(values: NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Return what a commit records of its rows' divergences: mean and 99th percentile.

    Both are null without rows.
    """
    if len(values) == 0:
        return {"kl_mean": None, "kl_p99": None}
    return {
        "kl_mean": float(values.mean()),
        "kl_p99": float(np.quantile(values, 0.99, method="higher")),
    }


def total_error(records: list[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Combine the errors of several commits, (rows, record) each.

    The mean is exact. The percentile is the largest of them, an upper bound: where at most 1 % of
    each
    commit's rows are above a value, at most 1 % of all are.
    """
    measured = [(n, r) for n, r in records if n and r["kl_mean"] is not None]
    rows = sum(n for n, _ in measured)
    if not rows:
        return {"kl_mean": None, "kl_p99": None}
    return {
        "kl_mean": sum(n * r["kl_mean"] for n, r in measured) / rows,
        "kl_p99": max(r["kl_p99"] for _, r in measured),
    }
