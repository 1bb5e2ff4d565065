"""Handle early ends of a training: SIGTERM, and videos on which loader processes die or hang."""

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

# A single crash may have another cause: an operator's signal, a stopped machine, a network.
CRASHES_TO_REFUSE = 2


@contextmanager
def on_sigterm(handle: Callable[[], object]) -> Iterator[None]:
    """Call `handle` at SIGTERM inside the block, instead of ending the process."""
    # Python delivers signals to the main thread alone, and no other thread may install handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: handle())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextmanager
def sigterm_noted() -> Iterator[Callable[[], bool]]:
    """Record SIGTERM inside the block; yield a function that returns whether it has arrived."""
    arrivals: list[None] = []
    with on_sigterm(lambda: arrivals.append(None)):
        yield lambda: bool(arrivals)


class _CrashRecord(Form):
    """The reasons why loader processes ended while they read a video, by the video's path."""

    noun: ClassVar[str] = "a record of crashes"
    videos: dict[str, list[str]] = {}


@contextmanager
def crashes_recorded(run_dir: Path, *, is_main: bool) -> Iterator[None]:
    """Refuse videos on which two loader processes of this run died or hung; record new crashes.

    A refused video counts as unreadable. Otherwise every resume would end at the same video.

    Args:
        run_dir: The folder of the run, which holds the record.
        is_main: Whether this process records the errors that all processes of the run raise.

    Raises:
        WorkerDied: The error of the block, and what a resume does about the video.
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
    except WorkerDied as error:
        hint = "--resume continues from the last checkpoint"
        if error.reason:
            crashes[error.path] = [*crashes.get(error.path, []), error.reason]
            if is_main or not error.shared:
                write_whole(path, json.dumps({"videos": crashes}, indent=1).encode())
            num_crashes = len(crashes[error.path])
            hint += " without this video" if num_crashes >= CRASHES_TO_REFUSE else ""
        with_hint = WorkerDied(f"{error}; {hint}")
        with_hint.__dict__.update(error.__dict__)
        raise with_hint from error
