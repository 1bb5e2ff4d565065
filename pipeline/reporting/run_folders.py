"""Read run folders for a report: config, result, predictions and training history.

A run folder has `config.yaml` (one section, named after its command), `metrics.jsonl` (training)
and, once its command is finished, `result.json`; a finetuned run also has `predictions.h5`.
Accuracies are recomputed from the predictions; only numbers that cannot be recomputed are read from
result.json.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from ..common.config import current_keys
from ..common.documents import (
    Form,
    is_regular_file,
    load_yaml,
    parse_json,
    plain_data,
    read_bytes,
    read_json,
    require_form,
)
from ..common.errors import CheckpointError, DistInitError, SourceError, UsageError
from ..common.run_dir import CONFIG, METRICS, RESULT, START, STEP_FOLDERS
from ..common.sealed import check_seal
from ..common.urls import public_url
from ..evaluation.predictions import Predictions, metrics_from_file
from ..targets.picks import PickRule
from .runs import KINDS, Run

Size = Annotated[int, Field(ge=0, lt=2**53)]


class _Student(Form):
    architecture: str = ""
    variant: str = ""
    width: float = 1.0


class _Loop(Form):
    batch_size: Size = 0


class _Targets(Form):
    picks: str = "random"

    @field_validator("picks")
    @classmethod
    def _rule(cls, text: str) -> str:
        try:
            return str(PickRule.parse(text))
        except UsageError as error:
            raise ValueError(str(error)) from None


class _Config(Form):
    """The part of a run's config.yaml that a report reads."""

    noun = "the config of a run"

    store: str | None = None
    init: str | None = None
    dataset: str | None = None
    split: int | str | None = None
    student: _Student | None = None
    loop: _Loop | None = None
    targets: _Targets | None = None


class _Result(Form):
    """The part of result.json that a report reads."""

    noun = "the result of a run"

    split: int | str | None = None
    seconds: float | None = None
    clips_per_second: float | None = None
    explained_fraction: float | None = None
    explained_by: str | None = None
    max_entropy: dict[str, float] | None = None


# Keys of version 0.1 in result.json → their names now.
RENAMED_RESULTS = {
    "loss_of_a_constant": "baseline_loss",
    "loss_of_the_targets": "loss_lower_bound",
    "learned": "explained_fraction",
    "learned_by": "explained_by",
    "left_out_videos": "excluded_videos",
    "thresholds_nats": "max_entropy",
    "broken": "unreadable",
}


class _LogRecord(Form):
    """The required members of a line of metrics.jsonl; other numbers may be missing or null."""

    noun = "a record of a training"

    kind: str
    step: Size


def find_runs(
    folders: Sequence[str | os.PathLike[str]],
    names: Mapping[Path, str] | None = None,
    ablations: Collection[Path] = (),
    problems: list[str] | None = None,
) -> list[Run]:
    """Read the runs in these folders, in the order of the folders, then by name.

    Args:
        folders: Run folders, or folders that contain them.
        names: Resolved run folder → name; these runs come last, in this order.
        ablations: Resolved folders of ablations, which may have no run. Their steps without a name
            belong to an earlier plan and are skipped.
        problems: Receives a line for each run that is skipped because it cannot be read. Without
            this list, or if no run can be read, the first error is raised.

    Raises:
        SourceError: A folder does not exist, or has no run and is not that of an ablation.
        DistInitError: A run cannot be read, see `read_run`.
    """
    roots: dict[Path, Path] = {}
    for folder in folders:
        root = Path(folder)
        if not root.is_dir():
            raise SourceError(f"{folder}: no such folder of runs")
        paths = [Path(path).resolve() for path in _run_paths(root)]
        if not paths and root.resolve() not in ablations:
            raise SourceError(
                f"{folder}: has no run (a run folder has the config.yaml of train-student or finetune)"
            )
        roots.update(dict.fromkeys(paths, root))
    named = {path: name for path, name in (names or {}).items() if path in roots}
    steps = {folder / inner for folder in ablations for inner in STEP_FOLDERS.values()}
    unnamed = [path for path in roots if path not in named and path.parent not in steps]
    names_by_path = dict(zip(unnamed, _distinct_names(unnamed), strict=True)) | named
    runs: list[Run] = []
    errors: dict[str, DistInitError] = {}
    for path, name in names_by_path.items():
        try:
            runs.append(read_run(path, name, roots[path]))
        except DistInitError as error:
            errors[name] = error
    if errors and (problems is None or not runs):
        raise next(iter(errors.values()))
    if problems is not None:
        problems += [f"{name}: skipped: {reason}" for name, reason in errors.items()]
    return runs


def _run_paths(root: Path) -> list[str]:
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.endswith(".zarr"))
        if CONFIG in files and _kind(Path(folder), root) is not None:
            paths.append(folder)
            # A run contains no other runs.
            folders.clear()
    return paths


def _kind(path: Path, inside: Path) -> str | None:
    config = _read_config(path, inside)
    return next((kind for command, kind in KINDS.items() if command in config), None)


def _read_config(path: Path, inside: Path) -> dict[str, Any]:
    file = path / CONFIG
    try:
        content = load_yaml(read_bytes(file, inside).decode("utf-8"))
        return plain_data(content) if isinstance(content, dict) else {}
    except (SourceError, ValueError, yaml.YAMLError):
        # This is the config.yaml of another program.
        return {}


def _distinct_names(paths: list[Path]) -> list[str]:
    """Return folder names, with as many parents as make them distinct."""
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
        depth += 1


def read_run(path: Path, name: str, inside: Path | None = None) -> Run:
    """Read one run folder.

    Args:
        path: The run folder.
        name: Its name in the report.
        inside: The folder that links must not lead out of, by default `path`.

    Raises:
        PredictionsError: predictions.h5 is damaged.
        CheckpointError: Weights are damaged.
        SourceError: Another file is damaged.
    """
    inside = inside or path
    config = _read_config(path, inside)
    command, kind = next(item for item in KINDS.items() if item[0] in config)
    section = require_form(config[command] or {}, _Config, f"{path / 'config.yaml'}: {command}")
    section = current_keys(section)
    # Version 0.1 recorded URLs with their passwords.
    if "store" in section:
        section = {**section, "store": public_url(str(section["store"]))}
    result, predictions, metrics = _read_result(path / RESULT, inside), None, None
    file = path / "predictions.h5"
    if kind == "finetune" and result and is_regular_file(file, inside):
        metrics, predictions = metrics_from_file(file), Predictions.read(file)
    run = Run(
        name,
        path,
        kind,
        section,
        result,
        metrics,
        predictions,
        _read_history(path / METRICS, inside),
    )
    for weights in (run.model, path / START):
        if is_regular_file(weights, inside):
            check_seal(weights, CheckpointError)
    _ = run.header
    return run


def _read_result(file: Path, inside: Path) -> dict[str, Any]:
    """Return the content of result.json under the current names, {} if there is no file."""
    stored = read_json(file, Form, inside)
    result = {RENAMED_RESULTS.get(key, key): value for key, value in stored.items()}
    return require_form(result, _Result, str(file))


def _read_history(file: Path, inside: Path) -> list[dict[str, Any]]:
    """Return kind, step and numbers of each line of metrics.jsonl before the first invalid one."""
    records = []
    for number, line in enumerate(read_bytes(file, inside).splitlines(), start=1):
        try:
            content = parse_json(line)
        except ValueError:
            break
        record = require_form(content, _LogRecord, f"{file}: line {number}")
        numbers = {
            key: value
            for key, value in record.items()
            if isinstance(value, int | float) and _drawable(value)
        }
        records.append({**numbers, "kind": record["kind"]})
    return records


def _drawable(value: float) -> bool:
    """Check whether a number can be drawn: axes overflow with a loss that diverged."""
    return math.isfinite(value) and abs(value) < 1e30
