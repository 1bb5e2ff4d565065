"""Write metrics.jsonl and TensorBoard files; a resume cuts both back to the checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch.utils.tensorboard import SummaryWriter

from ..common.errors import TrainingError
from ..common.files import write_whole
from ..common.run_dir import METRICS
from ..common.streams import printable


class Metrics:
    """Append to RUN/metrics.jsonl and RUN/tensorboard; a context manager.

    A record is one line: {"kind": "train" | "epoch", "step": steps done, …}; numbers that are not
    finite are null. Records after `step` (of a run that was killed after its last checkpoint) are
    removed.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / METRICS
        self._tensorboard_dir = run_dir / "tensorboard"
        self._step = step
        self._file: IO[str] | None = None
        self._tensorboard: SummaryWriter | None = None

    def __enter__(self) -> Metrics:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [
                line
                for line in self.path.read_text("utf-8").splitlines()
                if _step_of(line) <= self._step
            ]
            write_whole(self.path, "".join(line + "\n" for line in kept).encode())
        self._file = open(self.path, "a", encoding="utf-8")
        purge = self._step + 1 if self._step else None
        self._tensorboard = SummaryWriter(str(self._tensorboard_dir), purge_step=purge)
        return self

    def write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Append one record; its numbers also go to TensorBoard as `kind/name`."""
        if self._file is None or self._tensorboard is None:
            raise TrainingError("Metrics.write outside of its with block")
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(printable(f"{kind}/{name}"), value, step)
        except OSError as error:
            raise TrainingError(f"cannot write {self.path}: {error.strerror or error}") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
            if self._file is not None:
                self._file.close()
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
