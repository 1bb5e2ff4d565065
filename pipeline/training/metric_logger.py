"""Log the metrics of a run to metrics.jsonl and to TensorBoard, Weights & Biases or trackio.

A resume repeats steps that a killed run has already logged. In metrics.jsonl and TensorBoard the
old records are dropped. The other trackers cannot delete records, so RUN/trackers.json stores the
last step of each kind that they have logged.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from ..common.config import current_keys
from ..common.documents import load_yaml, read_bytes
from ..common.errors import TrainingError, third_party
from ..common.files import write_whole
from ..common.plugins import import_extra
from ..common.run_dir import CONFIG, METRICS, TRACKERS
from ..common.streams import printable
from .loop_options import TrackerName

PROJECT = "distinit"
FINAL = "final"


class Metrics:
    """A context manager that appends records to RUN/metrics.jsonl and to trackers.

    A record is one line: {"kind": "train" | "epoch", "step": finished steps, …}; numbers that are
    not finite are null. Records after `step`, of a run that was killed after its last checkpoint,
    are removed.
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
            lines = [
                line
                for line in self.path.read_text("utf-8").splitlines()
                if _step_of(line) <= self._step
            ]
            write_whole(self.path, "".join(line + "\n" for line in lines).encode())
        self._file = self._open.enter_context(open(self.path, "a", encoding="utf-8"))
        self._trackers = open_trackers(self._names, self.path.parent, self._step, self._open)
        return self

    def write(self, kind: str, step: int, record: Mapping[str, Any]) -> None:
        """Append a record, and log its numbers to the trackers as `kind/name`."""
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
    """Return the step of a line, or infinity for an incomplete line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


class Tracker(Protocol):
    """Logs the numbers of a run under printable names."""

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step; `kind` is train, epoch or final."""
        ...

    def close(self) -> None:
        """Write buffered numbers."""
        ...


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Check that the packages of trackers are installed, before a long job starts.

    Raises:
        UsageError: A package is missing; the error names the extra.
    """
    for name in names:
        import_extra(name, name, f"--logger {name}")


def open_trackers(
    names: Sequence[TrackerName], run_dir: Path, step: int, stack: ExitStack
) -> list[Tracker]:
    """Open the trackers of a run, to be closed by `stack`.

    Args:
        names: Names of the trackers.
        run_dir: The folder of the run, which holds its config.
        step: Number of finished steps. Records of later steps are replaced or not logged again.
        stack: Closes the trackers.

    Raises:
        TrainingError: A tracker cannot be started, for example without a login.
    """
    trackers: list[Tracker] = []
    for name in names:
        with third_party(f"--logger {name}", TrainingError):
            tracker = _KINDS[name](run_dir, step)
        stack.callback(tracker.close)
        trackers.append(tracker)
    return trackers


def log_final(
    names: Sequence[TrackerName], run_dir: Path, step: int, values: Mapping[str, Any]
) -> None:
    """Log the final numbers of a finished run, unless they have been logged before."""
    progress = _LoggedSteps(run_dir, FINAL)
    if not names or progress.includes(FINAL, step):
        return
    with ExitStack() as stack:
        for tracker in open_trackers(names, run_dir, step, stack):
            tracker.log(FINAL, step, numbers(values))
    progress.record(FINAL, step)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return those values that are numbers, under printable names."""
    return {
        printable(name): float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def flat_config(run_dir: Path) -> dict[str, str | int | float | bool]:
    """Return the options of RUN/config.yaml by dotted key; lists and empty mappings become JSON."""
    content = load_yaml(read_bytes(run_dir / CONFIG, run_dir).decode("utf-8", "replace"))
    sections = content if isinstance(content, dict) else {}
    flat: dict[str, str | int | float | bool] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                add(f"{prefix}.{name}" if prefix else str(name), inner)
        elif value is not None:
            scalar = value if isinstance(value, str | int | float | bool) else json.dumps(value)
            flat[printable(prefix)] = printable(scalar) if isinstance(scalar, str) else scalar

    for section in sections.values():
        add("", current_keys(section) if isinstance(section, dict) else None)
    return flat


class _LoggedSteps:
    """RUN/trackers.json: the last step of each kind that a tracker has logged, and its run's id."""

    def __init__(self, run_dir: Path, tracker: str) -> None:
        self._path, self._tracker = run_dir / TRACKERS, tracker
        self.id = self._read().get(tracker, {}).get("id") or uuid.uuid4().hex[:8]
        # Steps of earlier processes. In this process several records may have the same step.
        self._earlier = dict(self._read().get(tracker, {}).get("steps", {}))

    def includes(self, kind: str, step: int) -> bool:
        return step <= self._earlier.get(kind, 0)

    def record(self, kind: str, step: int) -> None:
        content = self._read()
        entry = content.setdefault(self._tracker, {"id": self.id, "steps": {}})
        entry["steps"][kind] = max(step, entry["steps"].get(kind, 0))
        write_whole(self._path, json.dumps(content, indent=1).encode())

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}


class _TensorBoard:
    """Event files in RUN/tensorboard, with the config for TensorBoard's tab of hyperparameters."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        self._config = flat_config(run_dir)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        if kind == FINAL and self._config:
            from torch.utils.tensorboard.summary import hparams

            # Written to this run, while `add_hparams` would create another one next to it.
            tags = {f"{kind}/{name}": value for name, value in values.items()}
            writer: Any = self._writer._get_file_writer()
            for summary in hparams(self._config, tags):
                writer.add_summary(summary, step)

    def close(self) -> None:
        self._writer.close()


class _AppendOnly:
    """A tracker that cannot delete records."""

    _run: Any

    def __init__(self, run_dir: Path, name: str) -> None:
        self._progress = _LoggedSteps(run_dir, name)

    def log(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if not self._progress.includes(kind, step):
            # Another process may log the final numbers, so W&B continues its own count of steps.
            logged_step = None if kind == FINAL else step
            numbers_by_name = {f"{kind}/{name}": value for name, value in values.items()}
            self._run.log(numbers_by_name, step=logged_step)
            self._progress.record(kind, step)

    def close(self) -> None:
        self._run.finish()


class _WandB(_AppendOnly):
    """A run of W&B, offline with WANDB_MODE=offline; WANDB_PROJECT names the project."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(run_dir, "wandb")
        wandb = import_extra("wandb", "wandb", "--logger wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_dir.resolve().name,
            id=self._progress.id,
            dir=str(run_dir),
            config=flat_config(run_dir),
            resume="allow",
            settings=wandb.Settings(console="off"),
        )


class _Trackio(_AppendOnly):
    """A run of trackio, which stores all runs in TRACKIO_DIR."""

    def __init__(self, run_dir: Path, step: int) -> None:
        super().__init__(run_dir, "trackio")
        trackio = import_extra("trackio", "trackio", "--logger trackio")
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            # trackio identifies a run by its name.
            name=f"{run_dir.resolve().name}-{self._progress.id}",
            config=flat_config(run_dir),
            resume="allow",
            auto_log_gpu=False,
        )


_KINDS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}
