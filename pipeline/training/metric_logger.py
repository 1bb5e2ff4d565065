"""Write metrics.jsonl and what `--logger` names; a resume cuts them back to the checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..common.errors import TrainingError
from ..common.files import write_whole
from ..common.run_dir import METRICS
from .loop_options import TrackerName
from .trackers import Tracker, numbers, open_trackers


class Metrics:
    """Append to RUN/metrics.jsonl and to trackers; a context manager.

    A record is one line: {"kind": "train" | "epoch", "step": steps done, …}; numbers that are not
    finite are null. Records after `step` (of a run that was killed after its last checkpoint) are
    removed.
    """

    def __init__(
        self, run_dir: Path, step: int, trackers: Sequence[TrackerName] = ("tensorboard",)
    ) -> None:
        self.path = run_dir / METRICS
        self._step = step
        self._names = trackers
        self._file: IO[str] | None = None
        self._trackers: list[Tracker] = []
        self._open = ExitStack()

    def __enter__(self) -> Metrics:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [
                line
                for line in self.path.read_text("utf-8").splitlines()
                if _step_of(line) <= self._step
            ]
            write_whole(self.path, "".join(line + "\n" for line in kept).encode())
        self._file = self._open.enter_context(open(self.path, "a", encoding="utf-8"))
        self._trackers = open_trackers(self._names, self.path.parent, self._step, self._open)
        return self

    def write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Append one record; its numbers also go to the trackers as `kind/name`."""
        if self._file is None:
            raise TrainingError("Metrics.write outside of its with block")
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
            for tracker in self._trackers:
                tracker.log(kind, step, numbers(values))
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror or error}") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._open.close()
        except OSError as failure:
            if error is None:
                raise TrainingError(
                    f"cannot write {self.path}: {failure.strerror or failure}"
                ) from failure


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for one that was not written whole."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
