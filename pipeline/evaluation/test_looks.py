"""Count how often a run was tested: what is chosen by a test is no longer measured by it."""

from __future__ import annotations

from pathlib import Path

from ..common.documents import Form, read_json
from ..common.errors import SourceError
from ..common.run_dir import RESULT


def count_looks(run_dir: Path, *, again: bool = True) -> int:
    """Return the number of tests of a run, that which is about to be made included.

    Args:
        run_dir: The folder of the run, whose last result has the number before.
        again: Whether this test is another one than that of the result: a finished run that is
            resumed is not tested again.
    """
    try:
        before = read_json(run_dir / RESULT, Form).get("test_looks", 0)
    except SourceError:
        # A damaged result is about to be replaced.
        before = 0
    looks = before if isinstance(before, int) else 0
    return looks + 1 if again or not looks else looks
