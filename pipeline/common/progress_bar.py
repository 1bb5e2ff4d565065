"""Progress of long work: reported by engines, shown by a console.

Like a logger, `progress_bar` knows nothing of screens. The display that was installed last shows
it; without a display nothing is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class ProgressBar:
    """The progress of one piece of work; this one shows nothing, a console's do."""

    def advance(self, n: float = 1, **fields: object) -> None:
        """Count n more units; `fields` replace the text behind the bar, as in loss=0.52."""

    def update(self, text: str) -> None:
        """Replace the text behind the bar."""

    def set_total(self, total: float | None) -> None:
        """Correct the total once it is known."""


Display = Callable[[str, float | None, str], AbstractContextManager[ProgressBar]]
"""Opens a bar for a description, a total and a unit."""

_displays: list[Display] = []


def progress_bar(
    description: str, total: float | None = None, unit: str = ""
) -> AbstractContextManager[ProgressBar]:
    """Open a progress bar; it is closed when the `with` block ends.

    Args:
        description: What is done, as in "probing".
        total: Number of units; None while it is not known.
        unit: Name of what is counted, as in "videos".

    Example:
        with progress_bar("probing", len(paths), "videos") as bar:
            for path in paths:
                probe(path)
                bar.advance()
    """
    return _displays[-1](description, total, unit) if _displays else nullcontext(ProgressBar())


@contextmanager
def show_progress(display: Display) -> Iterator[None]:
    """Show the bars that are opened meanwhile by this display."""
    _displays.append(display)
    try:
        yield
    finally:
        _displays.remove(display)
