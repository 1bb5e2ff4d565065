"""What ends a training early: SIGTERM, and videos on which loader processes die or hang."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from ..common.documents import Form, read_json
from ..common.errors import WorkerDied
from ..common.files import write_whole
from ..common.run_dir import LOADER_CRASHES
from ..common.worker_status import refusing

# The first may come from outside: an operator's signal, a stopped machine, a network.
CRASHES_TO_REFUSE = 2


@contextmanager
def on_sigterm(handle: Callable[[], object]) -> Iterator[None]:
    """Call `handle` at SIGTERM inside the block, instead of ending the process."""
    # Python delivers signals to the main thread alone and lets no other install handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM inside the block; yields a function that returns whether it has come."""
    came: list[None] = []
    with on_sigterm(lambda: came.append(None)):
        yield lambda: bool(came)


class _CrashRecord(Form):
    """By path of a video, the reason of each end of a loader process that was reading it."""

    noun: ClassVar[str] = "a record of crashes"
    videos: dict[str, list[str]] = {}


@contextmanager
def crashes_recorded(run_dir: Path, *, is_main: bool) -> Iterator[None]:
    """Refuse the videos on which two loader processes of this run died or hung, and record others.

    Such a video counts as unreadable, so that a resume continues where the run would end at the
    same video again and again.

    Args:
        run_dir: The folder of the run, which holds the record.
        is_main: Whether this process records what all processes of the run raise alike.

    Raises:
        WorkerDied: As in the block, with what a resume will do.
    """
    path = run_dir / LOADER_CRASHES
    crashes: dict[str, list[str]] = read_json(path, _CrashRecord, run_dir).get("videos", {})
    refused = {
        video: reasons[-1]
        for video, reasons in crashes.items()
        if len(reasons) >= CRASHES_TO_REFUSE
    }
    try:
        with refusing(refused):
            yield
    except WorkerDied as died:
        hint = "--resume continues from the last checkpoint"
        if died.reason:
            crashes[died.path] = [*crashes.get(died.path, []), died.reason]
            if is_main or not died.shared:
                write_whole(path, json.dumps({"videos": crashes}, indent=1).encode())
            count = len(crashes[died.path])
            hint += " without this video" if count >= CRASHES_TO_REFUSE else ""
        error = WorkerDied(f"{died}; {hint}")
        error.__dict__.update(died.__dict__)
        raise error from died
