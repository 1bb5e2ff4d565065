"""Shares of similar test cases; with `--hypothesis-profile=many` all of them run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from hypothesis import settings

T = TypeVar("T")


def is_thorough() -> bool:
    """Check whether the run has the profile `many`."""
    return settings.default is not None and settings.default.max_examples >= 1000


def some(cases: Iterable[T], every: int, first: int = 0) -> list[T]:
    """Return every n-th case from `first` on, or all cases in a thorough run."""
    return list(cases) if is_thorough() else list(cases)[first::every]
