"""What clips are given as targets by one teacher: the store's outputs, or a head's logits of them.

Shapes: n rows, K classes or features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.numerics import entropy
from ..store.reader import TargetStore
from .class_head import ClassHead
from .soft_targets import mean_outputs


@dataclass(frozen=True)
class TeacherTargets:
    """The targets of one teacher of a store, through its head where it has one."""

    store: TargetStore
    teacher: str
    head: ClassHead | None = None

    @property
    def output(self) -> str:
        """Either logits or features."""
        return "logits" if self.head is not None else self.store.teachers[self.teacher].output

    @property
    def width(self) -> int:
        """Numbers of a target, K."""
        if self.head is not None:
            return len(self.head.classes)
        return self.store.teachers[self.teacher].width

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes [K]; () of features."""
        if self.head is not None:
            return self.head.classes
        return self.store.teachers[self.teacher].classes

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the outputs of rows [n, K]."""
        outputs = self.store.outputs(self.teacher, rows)
        return outputs if self.head is None else self.head(outputs)

    def mean_and_entropy(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32] | None, float]:
        """Return the mean logits [K], if they had to be read, and their entropy in nats.

        The entropy of a single frame is in the store, from the teacher's own float32 logits. That
        of features is NaN: there is none.
        """
        if self.output == "features":
            return None, float("nan")
        if len(rows) == 1 and self.head is None:
            return None, float(self.store.entropy(self.teacher, rows)[0])
        mean = mean_outputs(self.read(rows))
        return mean, float(entropy(mean))
