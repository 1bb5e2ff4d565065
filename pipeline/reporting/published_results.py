"""What the paper has in a table's place: its numbers by row, and the published results that it
lists next to its own.

A plan of ablations gives them, cells.json carries them, a report prints them next to ours:
accuracies in per cent.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import Field, model_validator

from ..common.settings import Options


class Accuracies(Options):
    """What is known of one row and data set, per cent; a plain number is top 1.

    top1, per_clip and top5 are of the splits that the table is of; split1 is top 1 of split 1,
    where those are several.
    """

    top1: float | None = Field(None, ge=0, le=100)
    per_clip: float | None = Field(None, ge=0, le=100)
    top5: float | None = Field(None, ge=0, le=100)
    split1: float | None = Field(None, ge=0, le=100)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return (
            {"top1": given}
            if isinstance(given, int | float) and not isinstance(given, bool)
            else given
        )

    @model_validator(mode="after")
    def _some(self) -> Accuracies:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"no number; expected some of {', '.join(Accuracies.model_fields)}")
        return self


class Published(Options):
    """A result that the paper lists and does not run itself; `numbers` by data set."""

    name: str
    network: str | None = None
    frames: int | None = Field(None, ge=1)
    pretraining: str | None = None
    numbers: dict[str, Accuracies] = Field(min_length=1)

    @property
    def label(self) -> str:
        """`C3D, custom network, 16 frames, from scratch`, as far as it is known."""
        frames = (
            None if self.frames is None else f"{self.frames} frame{'s' if self.frames > 1 else ''}"
        )
        return ", ".join(
            part for part in (self.name, self.network, frames, self.pretraining) if part
        )


class PaperNumbers(Options):
    """Numbers to print next to ours: `rows` by name of a row, then by data set; `published` below
    our rows.

    splits: those that the numbers are of, by default the plan's.
    """

    table: str
    rows: dict[str, dict[str, Accuracies]] = {}
    published: list[Published] = []
    splits: list[int] | None = Field(None, min_length=1)

    def for_splits(self, found: Accuracies | None, ours: Collection[int]) -> dict[str, float]:
        """Measure → number, per cent, of those that stand for the splits `ours`; of other splits
        none is shown."""
        if found is None:
            return {}
        numbers: dict[str, float] = found.model_dump(exclude_none=True)
        theirs = set(ours) if self.splits is None else set(self.splits)
        if theirs == {1} and "top1" in numbers:
            numbers["split1"] = numbers["top1"]
        if theirs != set(ours):
            numbers = {name: value for name, value in numbers.items() if name == "split1"}
        if set(ours) == {1} and "split1" in numbers:
            numbers["top1"] = numbers["split1"]
        return numbers
