"""The settings, results and curves of a run folder, as read by `run_folders` for a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.documents import Form, parse_json, require_form
from ..common.errors import CheckpointError
from ..common.run_dir import MODEL_FILE, STUDENT_FILE
from ..common.sealed import open_checked
from ..evaluation.listing import short_dataset
from ..evaluation.predictions import Predictions
from .charts import Line

KINDS = {"train-student": "student", "finetune": "finetune"}


class _Header(Form):
    """The part of an exported model's header that a report reads."""

    noun = "the header of a model"
    heads: dict[str, Any] = {}
    options: dict[str, Any] = {}
    meta: dict[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: Name in the report.
        path: The folder.
        kind: "student" or "finetune".
        config: The section of its command in config.yaml.
        result: The content of result.json, {} before the run is finished.
        metrics: Accuracies recomputed from the predictions, None if the run was not evaluated.
        predictions: The predictions, None if the run was not evaluated.
        history: Records of metrics.jsonl.
    """

    name: str
    path: Path
    kind: str
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: dict[str, Any] | None
    predictions: Predictions | None
    history: list[dict[str, Any]]

    @property
    def init(self) -> str:
        """Initialisation: `scratch`, `inflate:…`, `kinetics…`, or the name of a run or file."""
        init = str(self.config.get("init", "scratch"))
        kind, colon, location = init.partition(":")
        return (
            f"{kind}:{short_path(location)}"
            if colon and kind in ("inflate", "kinetics", "hf")
            else short_path(init)
        )

    @property
    def dataset(self) -> str:
        """Short name of the data set."""
        return short_dataset(str(self.config.get("dataset", "")))

    @property
    def split(self) -> str:
        """Split of the data set."""
        return str(self.result.get("split") or self.config.get("split") or 1)

    @property
    def num_unreadable(self) -> int:
        """Number of unreadable test videos."""
        return len(self.metrics["failed"]) if self.metrics else 0

    @property
    def test_looks(self) -> int:
        """Number of tests of the run; 1 for runs of version 0.1, which did not count them."""
        looks = self.result.get("test_looks")
        return looks if isinstance(looks, int) else 1

    @property
    def chosen_on_validation(self) -> bool:
        """Whether the run had a validation side, for its search or for its best checkpoint."""
        return bool(self.result.get("search") or self.result.get("validation"))

    @property
    def test_videos_seen(self) -> int:
        """Number of test videos that the initialisation of the run was trained on."""
        overlap = self.result.get("overlap")
        seen = overlap.get("test_videos_seen_by_init") if isinstance(overlap, dict) else 0
        return seen if isinstance(seen, int) else 0

    @property
    def model(self) -> Path:
        """File of the exported model; it exists once the run is finished."""
        return self.path / (STUDENT_FILE if self.kind == "student" else MODEL_FILE)

    @property
    def finished(self) -> bool:
        """Whether the run has its exported model."""
        return self.model.exists()

    @property
    def header(self) -> dict[str, Any]:
        """Metadata in the header of the exported model, {} before it is exported.

        Raises:
            CheckpointError: The file is damaged, or its header has another form.
        """
        if not self.finished:
            return {}
        with open_checked(self.model, "np") as file:
            text = (file.metadata() or {}).get("distinit", "{}")
        try:
            return require_form(parse_json(text), _Header, str(self.model), CheckpointError)
        except ValueError as error:
            raise CheckpointError(f"{self.model}: its header is not JSON ({error})") from None

    @property
    def heads(self) -> list[str]:
        """Names of the heads of the exported model, one per teacher after train-student."""
        return list(self.header.get("heads", {}))

    @property
    def hours(self) -> float | None:
        """Duration of a finished run in hours; for a resumed run, that of its last part."""
        seconds = self.result.get("seconds")
        return float(seconds) / 3600 if isinstance(seconds, int | float) else None

    @property
    def explained_fraction(self) -> float | None:
        """Explained fraction of a student, on held-out clips if there are any."""
        value = self.result.get("explained_fraction")
        return float(value) if isinstance(value, int | float) else None

    @property
    def clips(self) -> int:
        """Number of clips trained on so far: steps times batch size."""
        size = (self.config.get("loop") or {}).get("batch_size")
        return int(self.last("epoch").get("step", 0)) * int(size or 0)

    def last(self, kind: str) -> dict[str, Any]:
        """Return the last record of a kind in metrics.jsonl, `train` or `epoch`."""
        return next((record for record in reversed(self.history) if record.get("kind") == kind), {})

    @property
    def exported_step(self) -> int | None:
        """Step of the epoch whose weights are exported, None if it is not recorded."""
        epochs = [record for record in self.history if record.get("kind") == "epoch"]
        if self.result.get("exported") == "last":
            return int(epochs[-1]["step"]) if epochs else None
        if self.result.get("exported") != "best":
            return None
        measured = self.result.get("validation")
        best = measured.get("best_epoch") if isinstance(measured, dict) else None
        best = self.result.get("best_epoch") if best is None else best
        return next((int(record["step"]) for record in epochs if record.get("epoch") == best), None)

    def curve(self, key: str, kind: str = "train") -> Line:
        """Return the logged values of `key` by step.

        Args:
            key: Name of the value, such as `loss`, or `held_out/loss` for epochs.
            kind: `train` for the records during an epoch, `epoch` for those after one.
        """
        records = [record for record in self.history if record.get("kind") == kind]
        points = [
            (record["step"], record[key])
            for record in records
            if isinstance(record.get(key), int | float)
        ]
        values = np.array(points, dtype=np.float64).reshape(-1, 2)
        return Line(self.name, values[:, 0], values[:, 1])


def short_path(path: str) -> str:
    """Shorten a path to the part that identifies it: the folder of a run, not a file in it."""
    file = Path(path)
    is_model = file.suffix in (".safetensors", ".pt")
    if is_model and file.stem in ("student", "model", "last", "best"):
        return file.parent.name or path
    return file.name or path
