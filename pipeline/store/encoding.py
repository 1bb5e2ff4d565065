"""Encodings of a teacher's rows: float16, int8 with a scale and an offset per row, or pca:D.

int8 maps a row's smallest value to −128 and its largest to 127, both exactly: z ≈ offset + scale ·
q. With a symmetric scale alone the steps would be larger by half, where it matters most, at the top
(docs/stores.md). pca:D keeps D coefficients of a row in a fixed orthonormal basis, as int8. One
scale per dimension would cost features most of what they tell (docs/store-format.md), so there is
none. Entropies never come from stored logits, but from the teacher's float32 logits.

Shapes: n rows, K values of a row (classes or features), D coefficients of pca:D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from ..common.errors import StoreError
from ..common.numerics import softmax
from ..video.region import Region
from .store_options import Encoding, Output, PlainEncoding, pca_components
from .validation import OUTPUTS

ENCODINGS: tuple[str, ...] = get_args(PlainEncoding)
DEFAULT: Encoding = "float16"
LARGEST = float(np.finfo(np.float16).max)
"""The largest magnitude of a value that is kept, whatever the encoding: every store can become a
float16 one."""
ERROR_KEYS: dict[str, tuple[str, str]] = {
    "logits": ("kl_mean", "kl_p99"),
    "features": ("cosine_mean", "cosine_p99"),
}
"""The keys of a commit's error by output: mean and 99th percentile."""


def check_output(name: object, where: str) -> Output:
    """Raise StoreError if a store has a kind of output that this version does not know."""
    for output in OUTPUTS:
        if name == output:
            return output
    raise StoreError(f"{where}: output {name!r}, this distinit reads {', '.join(OUTPUTS)}")


def check_encoding(name: object, where: str, output: Output = "logits") -> Encoding:
    """Raise StoreError if a store uses an encoding that this version does not know."""
    if name in ENCODINGS or (output == "features" and pca_components(name)):
        return str(name)
    known = (*ENCODINGS, "pca:D") if output == "features" else ENCODINGS
    raise StoreError(f"{where}: encoding {name!r}, this distinit reads {', '.join(known)}")


def value_type(encoding: Encoding) -> str:
    """Return the type of the array that holds a teacher's values."""
    return "float16" if encoding == "float16" else "int8"


def arrays_of(encoding: Encoding, output: Output = "logits") -> tuple[str, ...]:
    """Return the names of the arrays that hold a teacher's values; the first is its output."""
    return (output,) if encoding == "float16" else (output, "scale", "offset")


def row_arrays(encoding: Encoding, output: Output = "logits") -> tuple[str, ...]:
    """Return the names of all of a teacher's arrays over rows: of logits the entropy as well."""
    return (*arrays_of(encoding, output), *(("entropy",) if output == "logits" else ()))


def row_bytes(width: int, encoding: Encoding) -> int:
    """Return the size of a row of `width` values in bytes."""
    return 2 * width if encoding == "float16" else (pca_components(encoding) or width) + 8


def storable(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rows [n] of `values` [n, K] that can be kept: all finite and none beyond float16."""
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(values) <= LARGEST).all(axis=-1))  # False for nan


def _int8(
    z: NDArray[np.float32], good: NDArray[np.bool_], output: Output
) -> dict[str, NDArray[Any]]:
    """Encode rows with a scale and an offset each; those that are not `good` are NaN in `z`."""
    low, high = (
        z.min(axis=1, initial=np.inf).astype(np.float64),
        z.max(axis=1, initial=-np.inf).astype(np.float64),
    )
    scale = ((high - low) / 255).astype(np.float32)
    # From the rounded scale, so that the largest value, which of logits has the most weight, is
    # met whatever the scale lost.
    offset = (high - 127 * scale.astype(np.float64)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint((z - offset[:, None]) / scale[:, None])
    # All values are equal: no step, and the offset alone is exact.
    steps = np.where(scale[:, None] > 0, steps, np.where(good, 127, 0)[:, None])
    return {output: np.clip(steps, -128, 127).astype(np.int8), "scale": scale, "offset": offset}


@dataclass(frozen=True)
class Codec:
    """How the rows of one teacher are stored, and how wide they are.

    basis float32 [D, K], orthonormal rows, and mean float32 [K]: of pca:D alone.
    """

    output: Output
    encoding: Encoding
    width: int
    basis: NDArray[np.float32] | None = field(default=None, compare=False)
    mean: NDArray[np.float32] | None = field(default=None, compare=False)

    def encode(self, values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Encode `values` [n, K] as the arrays of `arrays_of(encoding, output)`.

        Rows that cannot be stored become fill.
        """
        good = storable(values)
        z = values if good.all() else np.where(good[:, None], values, np.float32(np.nan))
        if self.encoding == "float16":
            return {self.output: z.astype(np.float16)}
        with np.errstate(invalid="ignore"):
            if self.basis is not None and self.mean is not None:
                # In float64, so that what is left of the order of summation, which depends on the
                # number of rows and of threads, is rounded away: a row has the same coefficients in
                # any batch.
                z = ((z - self.mean) @ self.basis.T.astype(np.float64)).astype(np.float32)
            return _int8(z, good, self.output)

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return values [n, K] in float32, in the teacher's own space; NaN in fill."""
        values = arrays[self.output].astype(np.float32)
        if self.encoding != "float16":
            values *= arrays["scale"][:, None]
            values += arrays["offset"][:, None]
        if self.basis is None or self.mean is None:
            return values
        return np.asarray(values @ self.basis + self.mean, np.float32)

    def read(self, read: Callable[[str], NDArray[Any]]) -> NDArray[np.float32]:
        """Return decoded rows [n, K], where `read(array)` returns rows of a teacher's array."""
        return self.decode({name: read(name) for name in arrays_of(self.encoding, self.output)})

    def error(self, values: NDArray[np.float32], kept: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the error of the encoding in each row [n]: KL of logits, cosine of features."""
        return (divergence if self.output == "logits" else cosine_error)(values, kept)

    def rounding(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the largest error of a stored logit in each row [n]."""
        error = np.abs(self.decode(arrays)).max(axis=1, initial=0) * 2**-11
        if self.encoding != "float16":  # an export in int8 was float16 before
            error = arrays["scale"] / 2 + error
        return np.asarray(error, np.float32)


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


def cosine_error(features: NDArray[np.float32], kept: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 − cos(features, kept) of each row [n]: 0 where both are zero, 1 where only one is.

    As half the squared distance of the unit vectors, which resolves float16's 1e-8.
    """
    unit = [_unit(x.astype(np.float64)) for x in (features, kept)]
    error = ((unit[0] - unit[1]) ** 2).sum(axis=-1) / 2
    return np.asarray(np.where(unit[0].any(-1) != unit[1].any(-1), 1, error), np.float32)


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return np.asarray(x / np.where(length > 0, length, 1))


def error_record(
    values: NDArray[np.floating[Any]], output: Output = "logits"
) -> dict[str, float | None]:
    """Return what a commit records of its rows' errors: mean and 99th percentile.

    Both are null without rows.
    """
    mean, p99 = ERROR_KEYS[output]
    if len(values) == 0:
        return {mean: None, p99: None}
    return {
        mean: float(values.mean()),
        p99: float(np.quantile(values, 0.99, method="higher")),
    }


def total_error(
    records: list[tuple[int, Mapping[str, Any]]], output: Output = "logits"
) -> dict[str, float | None]:
    """Combine the errors of several commits, (rows, record) each.

    The mean is exact. The percentile is the largest of them, an upper bound: where at most 1 % of
    each commit's rows are above a value, at most 1 % of all are.
    """
    mean, p99 = ERROR_KEYS[output]
    measured = [(n, r) for n, r in records if n and r[mean] is not None]
    rows = sum(n for n, _ in measured)
    if not rows:
        return {mean: None, p99: None}
    return {
        mean: sum(n * r[mean] for n, r in measured) / rows,
        p99: max(r[p99] for _, r in measured),
    }


@dataclass(frozen=True)
class Sums:
    """What the mean and the scale of a teacher are computed from, of the rows of one shard.

    rows: their number. total float64 [K]: their sum. square: the sum of all squared values. Of the
    values as they are read, not as the teacher gave them.
    """

    rows: int
    total: NDArray[np.float64]
    square: float

    @classmethod
    def of(cls, codec: Codec, stored: Mapping[str, NDArray[Any]]) -> Sums:
        """Add up rows of a teacher as stored; memory does not grow with their number."""
        rows = len(stored[codec.output])
        total, square = np.zeros(codec.width), 0.0
        for start in range(0, rows, 1024):
            some = {name: values[start : start + 1024] for name, values in stored.items()}
            values = codec.decode(some).astype(np.float64)
            total += values.sum(axis=0)
            square += float((values * values).sum())
        return cls(rows, total, square)

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of the rows of both."""
        return Sums(self.rows + other.rows, self.total + other.total, self.square + other.square)

    def of_cells(self, cells: int) -> Sums:
        """Return the sums with each of a row's `cells` cells as a row; 0: a row is one."""
        if not cells:
            return self
        return Sums(self.rows * cells, self.total.reshape(cells, -1).sum(axis=0), self.square)

    def record(self) -> dict[str, Any]:
        """Return the content of a node of statistics."""
        return {"rows": self.rows, "sum": self.total.tolist(), "square": self.square}


def mean_and_scale(sums: list[Sums], width: int) -> tuple[NDArray[np.float32], float]:
    """Return the mean [K] over all rows, and sqrt of the mean of (x − mean)² over rows and K."""
    whole = sum(sums, Sums(0, np.zeros(width), 0.0))
    mean = whole.total / max(whole.rows, 1)
    spread = whole.square / max(whole.rows * width, 1)
    variance = spread - float((mean * mean).mean()) if width else 0.0
    return mean.astype(np.float32), float(np.sqrt(max(variance, 0.0)))


# Cells of the feature map of a frame


def roi_average(cells: NDArray[np.float32], region: Region) -> NDArray[np.float32]:
    """Return the average [n, D] of cells [n, G, G, D] by the area that `region` has of each.

    region: in shares of the picture that the cells cover.
    """
    down = shares(region.top, region.bottom, cells.shape[1])
    across = shares(region.left, region.right, cells.shape[2])
    weights = np.outer(down, across).astype(np.float32).ravel()
    flat = cells.reshape(len(cells), len(weights), -1)
    return np.asarray(np.matmul(weights, flat), np.float32)


def shares(first: float, end: float, count: int) -> NDArray[np.float64]:
    """Return which shares of the interval [first, end] are in `count` equal parts of [0, 1].

    What is outside [0, 1] does not count; an interval that is outside as a whole is in the nearest
    part.
    """
    edges = np.arange(count + 1) / count
    overlap = np.clip(np.minimum(end, edges[1:]) - np.maximum(first, edges[:-1]), 0, None)
    if overlap.sum() <= 0:
        overlap[0 if end <= 0 else -1] = 1.0
    return np.asarray(overlap / overlap.sum())
