"""Progress of long work: reported by engines, shown by a console.

Like a logger, `progress_bar` is independent of screens. The display that was installed last shows
the bar; without a display nothing is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class ProgressBar:
    """The progress of one task. This base class shows nothing, those of a console do."""

    def advance(self, n: float = 1, **fields: object) -> None:
        """Add n completed units; `fields` replace the text behind the bar, as in loss=0.52."""

    def update(self, text: str) -> None:
        """Replace the text behind the bar."""

    def set_total(self, total: float | None) -> None:
        """Set the total once it is known."""


Display = Callable[[str, float | None, str], AbstractContextManager[ProgressBar]]
"""Opens a bar for a description, a total and a unit."""

_displays: list[Display] = []


def progress_bar(
    description: str, total: float | None = None, unit: str = ""
) -> AbstractContextManager[ProgressBar]:
    """Open a progress bar; it is closed when the `with` block ends.

    Args:
        description: Name of the task, as in "probing".
        total: Number of units; None while it is not known.
        unit: Name of the units, as in "videos".

    Example:
        with progress_bar("probing", len(paths), "videos") as bar:
            for path in paths:
                probe(path)
                bar.advance()
    """
    return _displays[-1](description, total, unit) if _displays else nullcontext(ProgressBar())


@contextmanager
def show_progress(display: Display) -> Iterator[None]:
    """Show bars that are opened in the block with this display."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)
