"""What a teacher computes: its outputs on a few pictures that every machine makes alike.

The identity of a teacher names its code and hashes its weights; what the code does with them only
its outputs tell. A store keeps them (docs/store-format.md), and a teacher whose outputs are others
adds no rows to it.

Shapes: P probe images, K classes or features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import StoreError, StoreMismatchError
from ..store.store_options import Output

PROBES = 1
"""Version of the probe images: another set of pictures has another number."""
COUNT = 6

# How far two sets of outputs of the probe images may be apart, as `Difference` measures it: (root
# mean square, largest), by the precision that they show. Under the same torch on the same
# processor only the order of sums changes, with the number of threads and of rows; elsewhere the
# kernels do too, and fp32 may be tf32 (docs/benchmarks.md).
ALIKE = {"fp32": (2e-4, 1e-3), "fp16": (5e-3, 0.05), "bf16": (0.05, 0.25)}
ELSEWHERE = {"fp32": (0.05, 0.3), "fp16": (0.05, 0.3), "bf16": (0.6, 3.0)}
ROUNDED = {"bf16": 0xFFFF, "fp16": 0x1FFF}
"""Bits of a float32 that are zero in a number of this precision."""


@dataclass(frozen=True)
class Difference:
    """How far outputs differ, for the row that differs most.

    Root mean square and largest difference, in standard deviations of that row.
    """

    rms: float
    largest: float

    @classmethod
    def of(cls, first: NDArray[np.float32], other: NDArray[np.float32]) -> Difference:
        """Compare two arrays of logits or features [P, K].

        Infinite where one is finite and the other is not, or is not finite in another way.
        """
        a, b = first.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(a)
        if (finite != np.isfinite(b)).any() or not np.array_equal(
            a[~finite], b[~finite], equal_nan=True
        ):
            return cls(math.inf, math.inf)
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        # Over the classes, and from what the classes get of the other images: the smaller, for a
        # large constant of each class hides what an image does. The rest is for a row without
        # either: its last bits are no difference.
        spread = np.stack([a.std(axis=1), _root(a - np.median(a, axis=0))])
        scale = np.maximum(spread.min(axis=0), 0.05 * spread.max(axis=0))
        scale = np.maximum(
            scale,
            np.maximum(0.01 * np.abs(a).max(axis=1, initial=0), 1e-3 * np.abs(a).max() + 1e-12),
        )
        off = np.abs(a - b)
        return cls(
            float((_root(off) / scale).max()), float((off.max(axis=1, initial=0) / scale).max())
        )

    def within(self, tolerance: tuple[float, float]) -> bool:
        """Return whether both numbers are within their bounds."""
        return self.rms <= tolerance[0] and self.largest <= tolerance[1]


@dataclass(frozen=True)
class Fingerprint:
    """One output [P, K] of the probe images, computed in float32, and what computed it.

    `basis` is the reason why a store trusts that its rows are of this teacher: `new` (recorded
    before the first row), `rows` (a sample of them was computed again) or `accepted` (by the user),
    with their counts.
    """

    values: NDArray[np.float32]
    torch: str
    device: str
    basis: dict[str, Any] = field(default_factory=lambda: {"kind": "new"})
    output: Output = "logits"

    def record(self) -> dict[str, Any]:
        """Return the JSON-able form that a node stores, exact to the bit."""
        return {
            "probes": PROBES,
            "torch": self.torch,
            "device": self.device,
            "basis": self.basis,
            self.output: [[_number(v) for v in row] for row in self.values],
        }

    @classmethod
    def parse(cls, node: Mapping[str, Any], where: str) -> Fingerprint:
        """Read what `record` returned.

        Raises:
            StoreError: It is not a fingerprint, or one of other probe images; the message names
                `where`.
        """
        if node.get("probes") != PROBES:
            raise StoreError(
                f"{where}: its fingerprint is of version {node.get('probes')!r} of the probe images, "
                f"this distinit has version {PROBES}"
            )
        output: Output = "features" if "features" in node else "logits"
        try:
            values = np.array([[float(v) for v in row] for row in node[output]], np.float32)
            parsed = cls(
                values, str(node["torch"]), str(node["device"]), dict(node["basis"]), output
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError(
                f"{where}: not a readable fingerprint ({type(error).__name__}: {error})"
            ) from error
        if values.ndim != 2 or len(values) != COUNT:
            raise StoreError(f"{where}: not a readable fingerprint (of shape {list(values.shape)})")
        return parsed

    def tolerance(self, other: Fingerprint) -> tuple[float, float]:
        """Return how far two fingerprints of one teacher may differ.

        The bound is smaller if both were computed by the same processor and torch.
        """
        alike = (self.torch, self.device) == (other.torch, other.device)
        bits = self.values.view(np.uint32) | other.values.view(np.uint32)
        precision = next(
            (name for name, mask in ROUNDED.items() if not (bits & mask).any()), "fp32"
        )
        return (ALIKE if alike else ELSEWHERE)[precision]

    def differs(self, other: Fingerprint) -> str | None:
        """Describe how another fingerprint exceeds the tolerance; None if it does not."""
        if self.output != other.output:
            return f"{other.output} in place of {self.output}"
        if self.values.shape != other.values.shape:
            return f"{other.values.shape[1]} {self.output} in place of {self.values.shape[1]}"
        off, allowed = Difference.of(self.values, other.values), self.tolerance(other)
        if off.within(allowed):
            return None
        return (
            f"on {COUNT} probe images its {self.output} are off by {off.rms:.2g} (root mean square) and up to "
            f"{off.largest:.2g} of their standard deviation, allowed are {allowed[0]:g} and {allowed[1]:g}"
        )

    def check(self, other: Fingerprint, name: str, place: str) -> None:
        """Raise StoreMismatchError if `other` is not of the teacher `name`, stored in `place`."""
        if how := self.differs(other):
            raise StoreMismatchError(
                f"teacher {name!r} computes other {self.output} than the one of {place}: {how}; its code or a library "
                f"has changed: give it another name (--teacher-option name=NEW), or use the code of that time"
            )


def _number(value: np.float32) -> float | str:
    """Return the shortest digits that give the float32 again.

    Values that JSON does not have become a word that float() reads.
    """
    return float(str(value)) if np.isfinite(value) else str(value)


def _root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square of each row."""
    return np.asarray(np.sqrt(np.square(values).mean(axis=1)))
