"""Describe estimated hours, and warn of what takes long before it starts."""

from __future__ import annotations

import logging

from .errors import UsageError

log = logging.getLogger(__name__)

# What takes longer than a day is more often a mistake than meant: without a limit it is warned of.
LONG_HOURS = 24.0


def describe_hours(hours: float) -> str:
    """Return a duration in the unit that reads best.

    Example:
        >>> describe_hours(0.5), describe_hours(30), describe_hours(72)
        ('30.0 min', '30.0 hours', '3.0 days')
    """
    if hours >= 2 * 365 * 24:
        return f"{hours / 24 / 365:,.0f} years"
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} min"


def limit_of(max_hours: float | None) -> float:
    """Return the hours that something may take: the limit given, or those that are no surprise."""
    return LONG_HOURS if max_hours is None else max_hours


def check_hours(hours: float, max_hours: float | None, what: str, remedy: str) -> None:
    """Refuse what is estimated to take more than `max_hours`; without a limit warn of LONG_HOURS.

    Args:
        hours: The estimate.
        max_hours: The limit of the user.
        what: The subject of the message.
        remedy: What to type for less.

    Raises:
        UsageError: It takes more than `max_hours`.
    """
    if hours <= limit_of(max_hours):
        return
    takes = f"{what} takes about {describe_hours(hours)}"
    if max_hours is not None:
        raise UsageError(
            f"--max-hours {max_hours:g}: {takes}; {remedy}; a larger --max-hours allows it"
        )
    log.warning(
        f"{takes}, more than {LONG_HOURS:g} hours; {remedy}; --max-hours H refuses what takes longer"
    )
