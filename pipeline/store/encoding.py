"""Encodings of a teacher's rows: float16, int8 with a scale and an offset per row, or pca:D.

int8 maps a row's smallest value to −128 and its largest to 127, both exactly: z ≈ offset + scale ·
q. A symmetric scale without an offset would make the steps half as large again, which matters most
for the largest logits (docs/stores.md). pca:D stores D coefficients of a row in a fixed orthonormal
basis, as int8. There is no scale per dimension, because features would lose most of their
information (docs/store-format.md). Entropies are computed from the teacher's float32 logits, never
from stored logits.

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
"""Largest magnitude of a value that any encoding stores: every store can be converted to
float16."""
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
    readable = (*ENCODINGS, "pca:D") if output == "features" else ENCODINGS
    raise StoreError(f"{where}: encoding {name!r}, this distinit reads {', '.join(readable)}")


def value_type(encoding: Encoding) -> str:
    """Return the type of the array that holds a teacher's values."""
    return "float16" if encoding == "float16" else "int8"


def arrays_of(encoding: Encoding, output: Output = "logits") -> tuple[str, ...]:
    """Return the names of the arrays that hold a teacher's values; the first is its output."""
    return (output,) if encoding == "float16" else (output, "scale", "offset")


def row_arrays(encoding: Encoding, output: Output = "logits") -> tuple[str, ...]:
    """Return the names of all arrays over a teacher's rows; logits have their entropy as well."""
    return (*arrays_of(encoding, output), *(("entropy",) if output == "logits" else ()))


def row_bytes(width: int, encoding: Encoding) -> int:
    """Return the size of a row of `width` values in bytes."""
    return 2 * width if encoding == "float16" else (pca_components(encoding) or width) + 8


def storable(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which rows [n] of `values` [n, K] can be stored: all finite and within float16."""
    # The comparison is false for nan.
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(values) <= LARGEST).all(axis=-1))


def _int8(
    z: NDArray[np.float32], good: NDArray[np.bool_], output: Output
) -> dict[str, NDArray[Any]]:
    """Encode rows with a scale and an offset each; rows of `z` that are not `good` are NaN."""
    low, high = (
        z.min(axis=1, initial=np.inf).astype(np.float64),
        z.max(axis=1, initial=-np.inf).astype(np.float64),
    )
    scale = ((high - low) / 255).astype(np.float32)
    # The offset is computed from the rounded scale, so that the largest value, which has the most
    # weight among logits, is exact in spite of the rounding.
    offset = (high - 127 * scale.astype(np.float64)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint((z - offset[:, None]) / scale[:, None])
    # Where all values are equal the scale is 0, and the offset alone is exact.
    steps = np.where(scale[:, None] > 0, steps, np.where(good, 127, 0)[:, None])
    return {output: np.clip(steps, -128, 127).astype(np.int8), "scale": scale, "offset": offset}


@dataclass(frozen=True)
class Codec:
    """Encoding and width of the rows of one teacher.

    basis float32 [D, K], orthonormal rows, and mean float32 [K]: only for pca:D.
    """

    output: Output
    encoding: Encoding
    width: int
    basis: NDArray[np.float32] | None = field(default=None, compare=False)
    mean: NDArray[np.float32] | None = field(default=None, compare=False)

    def encode(self, values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Encode `values` [n, K] as the arrays of `arrays_of(encoding, output)`.

        Rows that cannot be stored become the fill value.
        """
        good = storable(values)
        z = values if good.all() else np.where(good[:, None], values, np.float32(np.nan))
        if self.encoding == "float16":
            return {self.output: z.astype(np.float16)}
        with np.errstate(invalid="ignore"):
            if self.basis is not None and self.mean is not None:
                # The order of summation depends on the number of rows and of threads. In float64
                # its effect is rounded away, so that a row has the same coefficients in any batch.
                z = ((z - self.mean) @ self.basis.T.astype(np.float64)).astype(np.float32)
            return _int8(z, good, self.output)

    def decode(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return values [n, K] in float32, in the teacher's space; NaN for fill."""
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

    def error(
        self, values: NDArray[np.float32], decoded: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the error of the encoding in each row [n]: KL of logits, cosine of features."""
        return (divergence if self.output == "logits" else cosine_error)(values, decoded)

    def rounding(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the largest error of a stored logit in each row [n]."""
        error = np.abs(self.decode(arrays)).max(axis=1, initial=0) * 2**-11
        # An export in int8 was float16 before, so both errors add up.
        if self.encoding != "float16":
            error = arrays["scale"] / 2 + error
        return np.asarray(error, np.float32)


def divergence(logits: NDArray[np.float32], decoded: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return KL(softmax(logits) ‖ softmax(decoded)) at τ = 1 in nats [n]: an encoding's error.

    With p = softmax(logits) and d = decoded − logits, KL = log Σ p exp d − Σ p d. After a shift
    that makes Σ p d = 0, this is log1p Σ p (exp d − 1 − d), a sum of small terms of one sign, so
    that float32 resolves even float16's 1e-6.
    """
    p = softmax(logits)
    d = decoded - logits
    d -= (p * d).sum(axis=-1, keepdims=True)
    # The series is several times faster than expm1.
    if np.abs(d).max(initial=0) < 0.5:
        excess = d * d * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120))))
    else:
        excess = np.expm1(d) - d
    return np.asarray(np.log1p((p * excess).sum(axis=-1)), np.float32)


def cosine_error(
    features: NDArray[np.float32], decoded: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return 1 − cos(features, decoded) of each row [n]: 0 where both are 0, 1 where one is.

    It is computed as half the squared distance of the unit vectors, which resolves float16's 1e-8.
    """
    a, b = (_unit(x.astype(np.float64)) for x in (features, decoded))
    error = ((a - b) ** 2).sum(axis=-1) / 2
    return np.asarray(np.where(a.any(-1) != b.any(-1), 1, error), np.float32)


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
    return np.asarray(x / np.where(length > 0, length, 1))


def error_record(
    values: NDArray[np.floating[Any]], output: Output = "logits"
) -> dict[str, float | None]:
    """Return the mean and 99th percentile of the errors of a commit's rows, as it records them.

    Both are None without rows.
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
    """Combine the errors of several commits, each as (number of rows, record).

    The mean is exact. The percentile is the largest of all, which is an upper bound: if at most 1 %
    of each commit's rows are above a value, at most 1 % of all rows are.
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
    """Sums over the rows of one shard from which a teacher's mean and scale are computed.

    rows: number of rows. total float64 [K]: sum of the rows. square: sum of all squared values.
    They are sums of the values as decoded from the store, not as the teacher returned them.
    """

    rows: int
    total: NDArray[np.float64]
    square: float

    @classmethod
    def of(cls, codec: Codec, stored: Mapping[str, NDArray[Any]]) -> Sums:
        """Sum stored rows of a teacher; memory does not grow with their number."""
        rows = len(stored[codec.output])
        total, square = np.zeros(codec.width), 0.0
        for start in range(0, rows, 1024):
            block = {name: array[start : start + 1024] for name, array in stored.items()}
            values = codec.decode(block).astype(np.float64)
            total += values.sum(axis=0)
            square += float((values * values).sum())
        return cls(rows, total, square)

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over the rows of both."""
        return Sums(self.rows + other.rows, self.total + other.total, self.square + other.square)

    def of_cells(self, cells: int) -> Sums:
        """Return the sums with each of a row's `cells` cells as a row; 0 leaves rows whole."""
        if not cells:
            return self
        return Sums(self.rows * cells, self.total.reshape(cells, -1).sum(axis=0), self.square)

    def record(self) -> dict[str, Any]:
        """Return the content of a node of statistics."""
        return {"rows": self.rows, "sum": self.total.tolist(), "square": self.square}


def mean_and_scale(sums: list[Sums], width: int) -> tuple[NDArray[np.float32], float]:
    """Return the mean [K] over all rows, and sqrt of the mean of (x − mean)² over rows and K."""
    combined = sum(sums, Sums(0, np.zeros(width), 0.0))
    mean = combined.total / max(combined.rows, 1)
    mean_square = combined.square / max(combined.rows * width, 1)
    variance = mean_square - float((mean * mean).mean()) if width else 0.0
    return mean.astype(np.float32), float(np.sqrt(max(variance, 0.0)))


# Cells of the feature map of a frame


def roi_average(cells: NDArray[np.float32], region: Region) -> NDArray[np.float32]:
    """Return the average [n, D] of cells [n, G, G, D], weighted by their overlap with `region`.

    region: in fractions of the picture that the cells cover.
    """
    row_shares = shares(region.top, region.bottom, cells.shape[1])
    column_shares = shares(region.left, region.right, cells.shape[2])
    weights = np.outer(row_shares, column_shares).astype(np.float32).ravel()
    flat = cells.reshape(len(cells), len(weights), -1)
    return np.asarray(np.matmul(weights, flat), np.float32)


def shares(first: float, end: float, count: int) -> NDArray[np.float64]:
    """Return the shares of the interval [first, end] in each of `count` equal parts of [0, 1].

    The part of the interval outside [0, 1] does not count; an interval that is entirely outside
    counts for the nearest part.
    """
    edges = np.arange(count + 1) / count
    overlap = np.clip(np.minimum(end, edges[1:]) - np.maximum(first, edges[:-1]), 0, None)
    if overlap.sum() <= 0:
        overlap[0 if end <= 0 else -1] = 1.0
    return np.asarray(overlap / overlap.sum())
