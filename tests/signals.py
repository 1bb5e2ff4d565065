"""Signals that a test sends to its own process."""

from __future__ import annotations

import faulthandler
import os


def die_by(number: int) -> None:
    """Send a signal to this process, which must be a forked one.

    The traceback of pytest's fault handler on SIGSEGV is switched off, because it looks like a
    crash of the tests.
    """
    faulthandler.disable()
    os.kill(os.getpid(), number)
