"""The targets of clips from one teacher: the store's outputs, or logits that a head makes of them.

A mirrored clip takes the outputs of the mirrored frames if the store has them. Outputs per cell are
averaged under the clip's crop.

The paper (equation 1) averages the picked frames' logits first and takes one softmax of the mean;
the mean of softmaxes is another target. Entropies are in nats and always at temperature 1, whatever
temperature the student's targets use. NumPy, float32 in and out; the loss has its own tensors.

Shapes: n rows (picked frames), K classes or features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..common.errors import UsageError
from ..common.numerics import entropy, softmax
from ..store.encoding import roi_average
from ..store.reader import TargetStore
from ..video.geometry import View
from ..video.region import Region
from .class_head import ClassHead


def mean_outputs(outputs: ArrayLike) -> NDArray[np.float32]:
    """Return the mean over frames of logits or features [..., n, K], [..., K] (eq. 1 before τ)."""
    given = np.asarray(outputs, dtype=np.float32)
    if given.shape[-2] == 1:
        return given[..., 0, :]
    return given.mean(axis=-2, dtype=np.float32)


def soft_targets(mean: ArrayLike, tau: float = 1.0) -> NDArray[np.float32]:
    """Return the distribution over classes of averaged logits [..., K] (eq. 1)."""
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return softmax(np.asarray(mean, dtype=np.float32) / np.float32(tau))


@dataclass(frozen=True)
class Seen:
    """What the student sees of the frames of one video.

    region: the rectangle of the displayed frame that a clip shows, None where it is not known.
    """

    video: int
    mirrored: bool = False
    region: Region | None = None


@dataclass(frozen=True)
class TeacherTargets:
    """The targets of one teacher of a store, through its head where it has one.

    Raises:
        UsageError: The head is for features, and the store has cells whose mean is another thing.
    """

    store: TargetStore
    teacher: str
    head: ClassHead | None = None

    def __post_init__(self) -> None:
        record = self.store.teacher(self.teacher)
        if self.head is not None and record.grid and not record.plain_mean:
            raise UsageError(
                f"--head {self.teacher}=…: {self.store.name} holds cells of it whose mean is not the "
                f"model's feature; a head requires features of view center"
            )

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

    @cached_property
    def has_cells(self) -> bool:
        """Whether targets depend on the crop of a clip."""
        return self.head is None and self.store.teachers[self.teacher].grid > 0

    @cached_property
    def _mirror(self) -> str | None:
        return self.store.mirror(self.teacher)

    @cached_property
    def _view(self) -> View:
        return View.model_validate(self.store.teachers[self.teacher].identity["view"])

    def read(self, rows: NDArray[np.int64], seen: Seen) -> NDArray[np.float32]:
        """Return the outputs of rows [n, K]."""
        name = self._row_of(seen)
        if self.has_cells and (region := self._in_map(seen)) is not None:
            is_mirrored = name != self.teacher
            return roi_average(
                self.store.cells(name, rows), region.mirrored() if is_mirrored else region
            )
        outputs = self.store.outputs(name, rows)
        return outputs if self.head is None else self.head(outputs)

    def mean_and_entropy(
        self, rows: NDArray[np.int64], seen: Seen
    ) -> tuple[NDArray[np.float32] | None, float]:
        """Return the mean logits [K], if they had to be read, and their entropy in nats.

        The entropy of a single frame is stored, from the teacher's own float32 logits. Features
        have none: it is NaN.
        """
        if self.output == "features":
            return None, float("nan")
        if len(rows) == 1 and self.head is None:
            return None, float(self.store.entropy(self._row_of(seen), rows)[0])
        mean = mean_outputs(self.read(rows, seen))
        return mean, float(entropy(mean))

    def _row_of(self, seen: Seen) -> str:
        """Return the teacher of the store whose rows a clip takes."""
        return self._mirror if seen.mirrored and self._mirror is not None else self.teacher

    def _in_map(self, seen: Seen) -> Region | None:
        """Return what a clip shows, in shares of the picture that the teacher saw.

        None where that is not known: then the mean of all cells is taken.
        """
        height, width = (int(self.store.column(n)[seen.video]) for n in ("height", "width"))
        if seen.region is None or not (height and width):
            return None
        return seen.region.inside(self._view.region(height, width))
