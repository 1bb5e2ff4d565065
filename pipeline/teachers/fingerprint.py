"""Fingerprint a teacher by its outputs of a few pictures that are the same on every machine.

The identity of a teacher names its code and hashes its weights, but a change of the code shows only
in the outputs. A store records them (docs/store-format.md), and refuses rows of a teacher whose
outputs differ.

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

PROBES_VERSION = 1
"""Version of the probe images; it changes with the pictures."""
NUM_PROBES = 6
"""Number of probe images."""

# Allowed differences between two sets of outputs of the probe images, as `Difference` measures
# them: (root mean square, largest), by the precision of the numbers. With the same torch on the
# same processor only the order of sums changes, with the number of threads and of rows. With
# another torch or processor the kernels change too, and fp32 may be tf32 (docs/benchmarks.md).
SAME_MACHINE = {"fp32": (2e-4, 1e-3), "fp16": (5e-3, 0.05), "bf16": (0.05, 0.25)}
OTHER_MACHINE = {"fp32": (0.05, 0.3), "fp16": (0.05, 0.3), "bf16": (0.6, 3.0)}
ZERO_BITS = {"bf16": 0xFFFF, "fp16": 0x1FFF}
"""Bits of a float32 that are zero in a number of this precision."""


@dataclass(frozen=True)
class Difference:
    """The difference of two sets of outputs, in the row that differs most.

    It is the root mean square and the largest difference, in standard deviations of that row.
    """

    rms: float
    largest: float

    @classmethod
    def of(cls, first: NDArray[np.float32], other: NDArray[np.float32]) -> Difference:
        """Compare two arrays of logits or features [P, K].

        The difference is infinite if a number is finite in one array only, or if two numbers that
        are not finite differ.
        """
        a, b = first.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(a)
        if (finite != np.isfinite(b)).any() or not np.array_equal(
            a[~finite], b[~finite], equal_nan=True
        ):
            return cls(math.inf, math.inf)
        a, b = np.where(finite, a, 0), np.where(finite, b, 0)
        # The scale of a row is its spread over the classes, or from the medians of the classes over
        # the images, whichever is smaller: a large constant of each class would hide the influence
        # of the image. The lower bounds are for rows with hardly any spread, whose last bits must
        # not count as differences.
        spread = np.stack([a.std(axis=1), _root(a - np.median(a, axis=0))])
        scale = np.maximum(spread.min(axis=0), 0.05 * spread.max(axis=0))
        scale = np.maximum(
            scale,
            np.maximum(0.01 * np.abs(a).max(axis=1, initial=0), 1e-3 * np.abs(a).max() + 1e-12),
        )
        absolute = np.abs(a - b)
        return cls(
            float((_root(absolute) / scale).max()),
            float((absolute.max(axis=1, initial=0) / scale).max()),
        )

    def within(self, tolerance: tuple[float, float]) -> bool:
        """Return whether both numbers are within their bounds."""
        return self.rms <= tolerance[0] and self.largest <= tolerance[1]


@dataclass(frozen=True)
class Fingerprint:
    """One output of the probe images.

    Args:
        values: The output [P, K], computed in float32.
        torch: The version of torch that computed it.
        device: The kind and model of the processor that computed it.
        basis: The reason why a store trusts that its rows are of this teacher. Its `kind` is `new`
            (recorded before the first row), `rows` (a sample of the rows was computed again; with
            their number) or `accepted` (by the user).
        output: The kind of output.
    """

    values: NDArray[np.float32]
    torch: str
    device: str
    basis: dict[str, Any] = field(default_factory=lambda: {"kind": "new"})
    output: Output = "logits"

    def record(self) -> dict[str, Any]:
        """Return the JSON-able form that a node stores, exact to the bit."""
        return {
            "probes": PROBES_VERSION,
            "torch": self.torch,
            "device": self.device,
            "basis": self.basis,
            self.output: [[_number(v) for v in row] for row in self.values],
        }

    @classmethod
    def parse(cls, node: Mapping[str, Any], where: str) -> Fingerprint:
        """Parse the form that `record` returns.

        Args:
            node: The stored form.
            where: The name of the node in messages.

        Raises:
            StoreError: The node is not a fingerprint, or one of other probe images.
        """
        if node.get("probes") != PROBES_VERSION:
            raise StoreError(
                f"{where}: its fingerprint is of version {node.get('probes')!r} of the probe images, "
                f"this distinit has version {PROBES_VERSION}"
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
        if values.ndim != 2 or len(values) != NUM_PROBES:
            raise StoreError(f"{where}: not a readable fingerprint (of shape {list(values.shape)})")
        return parsed

    def tolerance(self, other: Fingerprint) -> tuple[float, float]:
        """Return the allowed difference of two fingerprints of one teacher.

        It is smaller if both were computed by the same processor and torch.
        """
        same_machine = (self.torch, self.device) == (other.torch, other.device)
        bits = self.values.view(np.uint32) | other.values.view(np.uint32)
        precision = next(
            (name for name, mask in ZERO_BITS.items() if not (bits & mask).any()), "fp32"
        )
        return (SAME_MACHINE if same_machine else OTHER_MACHINE)[precision]

    def differs(self, other: Fingerprint) -> str | None:
        """Describe how another fingerprint exceeds the tolerance; None if it does not."""
        if self.output != other.output:
            return f"{other.output} in place of {self.output}"
        if self.values.shape != other.values.shape:
            return f"{other.values.shape[1]} {self.output} in place of {self.values.shape[1]}"
        difference, allowed = Difference.of(self.values, other.values), self.tolerance(other)
        if difference.within(allowed):
            return None
        return (
            f"on {NUM_PROBES} probe images its {self.output} are off by {difference.rms:.2g} (root mean square) and "
            f"up to {difference.largest:.2g} of their standard deviation, allowed are {allowed[0]:g} and {allowed[1]:g}"
        )

    def check(self, other: Fingerprint, name: str, place: str) -> None:
        """Raise StoreMismatchError if `other` is not of the teacher `name` of the store `place`."""
        if difference := self.differs(other):
            raise StoreMismatchError(
                f"teacher {name!r} computes other {self.output} than the one of {place}: {difference}; its code or a "
                f"library has changed: give it another name (--teacher-option name=NEW), or use the former code"
            )


def _number(value: np.float32) -> float | str:
    """Return the number with the fewest digits that give the same float32.

    Numbers that JSON does not have become a word that `float` parses.
    """
    return float(str(value)) if np.isfinite(value) else str(value)


def _root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the root mean square of each row."""
    return np.asarray(np.sqrt(np.square(values).mean(axis=1)))
