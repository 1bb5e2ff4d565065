"""Accuracies of the paper by row, and results of others that are shown next to them, in per cent.

They are part of a plan of ablations, stored in cells.json, and shown by a report next to our
results.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import Field, model_validator

from ..common.settings import Options


class Accuracies(Options):
    """The published accuracies of one row and data set, in per cent; a plain number is top 1.

    top1, per_clip and top5 are those of all splits of the table; split1 is top 1 of split 1 in a
    table of several splits.
    """

    top1: float | None = Field(None, ge=0, le=100)
    per_clip: float | None = Field(None, ge=0, le=100)
    top5: float | None = Field(None, ge=0, le=100)
    split1: float | None = Field(None, ge=0, le=100)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"top1": value} if is_number else value

    @model_validator(mode="after")
    def _require_number(self) -> Accuracies:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"no number; expected some of {', '.join(Accuracies.model_fields)}")
        return self


class Published(Options):
    """A result published by others.

    Attributes:
        name: Name of the method.
        network: Its network.
        frames: Frames per clip.
        pretraining: What the network was initialised from.
        numbers: Accuracies by data set.
        source: Source of the numbers; None for those that the paper quotes.
        year: Year of the publication; required with a source.
        splits_stated: Whether the source states the splits of the numbers.
    """

    name: str
    network: str | None = None
    frames: int | None = Field(None, ge=1)
    pretraining: str | None = None
    numbers: dict[str, Accuracies] = Field(min_length=1)
    source: str | None = None
    year: int | None = Field(None, ge=1900, le=2100)
    splits_stated: bool = True

    @model_validator(mode="after")
    def _source_and_year(self) -> Published:
        if (self.source is None) != (self.year is None):
            raise ValueError(f"{self.name}: expected source and year, or neither")
        return self

    @property
    def label(self) -> str:
        """Name and settings, such as `C3D, custom network, 16 frames, from scratch`.

        Results that the paper does not quote also have their year and source.
        """
        frames = (
            None if self.frames is None else f"{self.frames} frame{'s' if self.frames > 1 else ''}"
        )
        splits = None if self.splits_stated else "splits not stated"
        year = None if self.year is None else str(self.year)
        parts = (self.name, self.network, frames, self.pretraining, splits, year, self.source)
        return ", ".join(part for part in parts if part)


class PaperNumbers(Options):
    """The numbers of a table of the paper.

    Attributes:
        table: Name of the table.
        rows: Accuracies by name of a row, then by data set.
        published: Results of others, shown below our rows.
        splits: The splits of the numbers, by default those of the plan.
    """

    table: str
    rows: dict[str, dict[str, Accuracies]] = {}
    published: list[Published] = []
    splits: list[int] | None = Field(None, min_length=1)

    def for_splits(
        self, accuracies: Accuracies | None, splits: Collection[int]
    ) -> dict[str, float]:
        """Return the numbers that can be compared with a run of some splits, by measure.

        Args:
            accuracies: Numbers of a row, None if the paper does not have the row.
            splits: The splits of our run.
        """
        if accuracies is None:
            return {}
        numbers: dict[str, float] = accuracies.model_dump(exclude_none=True)
        published = set(splits) if self.splits is None else set(self.splits)
        if published == {1} and "top1" in numbers:
            numbers["split1"] = numbers["top1"]
        if published != set(splits):
            numbers = {name: value for name, value in numbers.items() if name == "split1"}
        if set(splits) == {1} and "split1" in numbers:
            numbers["top1"] = numbers["split1"]
        return numbers
