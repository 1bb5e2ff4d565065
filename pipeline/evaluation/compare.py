"""`evaluate --fuse` and `--compare`, computed from saved predictions; no video is decoded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.documents import is_regular_file
from ..common.errors import UsageError
from ..common.locks import folder_lock
from ..common.run_dir import PREDICTIONS
from ..common.tables import Table, columns
from .ensemble import Comparison, compare_predictions, fuse_predictions
from .metrics import MEASURES, signed, signed_brackets
from .predictions import Predictions, metrics_from_file, read_finished
from .protocol import check_result_dir, intervals_note, show_metrics, write_result
from .splits import split_folders

log = logging.getLogger(__name__)

# Rows of the largest gains, and of the largest losses, in the table; the result has all classes.
NUM_SHOWN = 10


def fuse(runs: Sequence[str], weights: Sequence[float] | None, out: str | None) -> dict[str, Any]:
    """Fuse the predictions of several runs into OUT/predictions.h5 and OUT/result.json.

    Args:
        runs: Run folders or predictions files.
        weights: Weight of each run, by default equal.
        out: The folder to write; `--compare` and `--fuse` accept it as a run.

    Returns:
        The content of result.json.

    Raises:
        UsageError: `out` is missing, or weights are not one per run.
        PredictionsError: Predictions are missing, damaged or unfinished.
        CheckpointError: Class lists differ.
        LabelsError: Videos or labels differ.
    """
    if out is None:
        raise UsageError("--fuse requires --out DIR, where the fused predictions are written")
    parts = [_read_run(run) for run in runs]
    run_weights = list(weights) if weights is not None else [1.0] * len(parts)
    fused = fuse_predictions(parts, list(runs), run_weights)
    folder = Path(out)
    check_result_dir(folder, {"fused": list(runs)})
    with folder_lock(folder):
        fused.write(folder / PREDICTIONS)
        metrics = metrics_from_file(folder / PREDICTIONS)
        terms = ", ".join(
            f"{weight:g} × {Path(run).name}" for run, weight in zip(runs, run_weights, strict=True)
        )
        show_metrics(f"late fusion of {terms}", len(fused.classes), metrics)
        result = {
            "fused": list(runs),
            "weights": run_weights,
            "predictions": str(folder / PREDICTIONS),
            "metrics": metrics,
        }
        write_result(folder, result)
    return result


def compare(a: str, b: str, out: str | None) -> dict[str, Any]:
    """Compute the gain of run A over run B, in total and per class, with intervals and p-values.

    Args:
        a: Run folder or predictions file.
        b: Another one, tested on the same videos.
        out: Folder for result.json, None to write nothing.

    Returns:
        The content of result.json.

    Raises:
        PredictionsError: Predictions are missing, damaged or unfinished.
        CheckpointError: Class lists differ.
        LabelsError: Videos or labels differ.
    """
    if out is not None:
        check_result_dir(Path(out), {"a": a, "b": b})
    parts = _read_run(a), _read_run(b)
    comparison = compare_predictions(*parts, (a, b))
    protocols = [each for part in parts for each in part.protocol.get("fused", [part.protocol])]
    if any(protocol != protocols[0] for protocol in protocols):
        log.warning(
            f"{a} and {b} were tested with different protocols: see `protocol` in each result.json"
        )
    _show_measures(comparison, parts[0], a, b)
    _show_classes(comparison)
    result = {
        "a": a,
        "b": b,
        "videos": len(parts[0].videos),
        "intervals": parts[0].resampled,
        "measures": {name: gain.as_dict() for name, gain in comparison.measures.items()},
        "classes": {
            name: {"videos": comparison.videos[name], **gain.as_dict()}
            for name, gain in comparison.classes.items()
        },
    }
    if out is not None:
        with folder_lock(out):
            write_result(Path(out), result)
    return result


def _read_run(run: str) -> Predictions:
    """Load the predictions of a run folder or a file.

    Raises:
        UsageError: The folder is that of `--split all`, which has one run per split.
    """
    splits = split_folders(Path(run))
    if splits and not (Path(run) / PREDICTIONS).exists():
        names = ", ".join(map(str, splits.values()))
        raise UsageError(f"{run} has a run per split, expected one of: {names}")
    if not Path(run).is_dir():
        return read_finished(run)
    is_regular_file(Path(run) / PREDICTIONS, Path(run))
    return read_finished(Path(run) / PREDICTIONS)


def _show_measures(comparison: Comparison, part: Predictions, a: str, b: str) -> None:
    table = Table(
        f"A = {a}, B = {b}: {len(part.videos)} test videos",
        columns("accuracy, %", ">A", ">B", ">A − B", ">95 % interval", ">p"),
    )
    for name, label in MEASURES.items():
        if name in comparison.measures:
            gain = comparison.measures[name]
            table.add(
                label,
                f"{100 * gain.a:.1f}",
                f"{100 * gain.b:.1f}",
                signed(gain.estimate.value),
                signed_brackets(gain.estimate.low, gain.estimate.high),
                f"{gain.p:.4f}",
            )
    table.notes.append(intervals_note(part.resampled))
    log.info(table)


def _show_classes(comparison: Comparison) -> None:
    classes = Table(
        "top 1 of each class, %", columns("class", ">videos", ">A", ">B", ">A − B", ">p")
    )
    names = list(comparison.classes)
    if len(names) > 2 * NUM_SHOWN:
        classes.notes.append(
            f"The {NUM_SHOWN} largest gains and losses of {len(names)} classes; --json lists all."
        )
        names = names[:NUM_SHOWN] + names[-NUM_SHOWN:]
    for name in names:
        gain = comparison.classes[name]
        cells = (
            f"{100 * gain.a:.1f}",
            f"{100 * gain.b:.1f}",
            signed(gain.estimate.value),
            f"{gain.p:.4f}",
        )
        classes.add(name, str(comparison.videos[name]), *cells)
    classes.notes.append(
        "p is not corrected for the number of classes: among many, some are small by chance."
    )
    log.info(classes)
