"""SIGTERM during training: the step is finished, the checkpoint written, the exit code says so."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """While entered, SIGTERM is noted (`requested()`) instead of ending the process (main thread
    only)."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Interrupts:
        # Python delivers signals to the main thread alone and lets no other install handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._request)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(
                signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL
            )

    def requested(self) -> bool:
        """Whether SIGTERM has come."""
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
