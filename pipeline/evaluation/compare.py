"""`evaluate --fuse` and `--compare`: from saved predictions alone, nothing is decoded again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.documents import is_regular_file
from ..common.errors import UsageError
from ..common.locks import folder_lock
from ..common.run_dir import PREDICTIONS
from ..common.tables import Column, Table
from .ensemble import Comparison, compare_predictions, fuse_predictions
from .metrics import MEASURES, signed
from .predictions import Predictions, PredictionsError, metrics_from_file
from .protocol import intervals_note, refuse_other, show_metrics, write_result
from .splits import split_folders

log = logging.getLogger(__name__)

SHOWN = 10  # classes of the largest gains and losses in the table; all are in the result


def fuse(runs: Sequence[str], weights: Sequence[float] | None, out: str | None) -> dict[str, Any]:
    """Late fusion: writes `out`/predictions.h5 and result.json, which `--compare` and `--fuse` take
    again.

    Raises UsageError (no `out`, wrong weights), PredictionsError, CheckpointError, LabelsError.
    """
    if out is None:
        raise UsageError("--fuse needs --out DIR, where the fused predictions go")
    parts = [_finished(run) for run in runs]
    used = list(weights) if weights is not None else [1.0] * len(parts)
    fused = fuse_predictions(parts, list(runs), used)
    folder = Path(out)
    refuse_other(folder, {"fused": list(runs)})
    with folder_lock(folder):
        fused.write(folder / PREDICTIONS)
        metrics = metrics_from_file(folder / PREDICTIONS)
        named = ", ".join(
            f"{weight:g} × {Path(run).name}" for run, weight in zip(runs, used, strict=True)
        )
        show_metrics(f"late fusion of {named}", len(fused.classes), metrics)
        result = {
            "fused": list(runs),
            "weights": used,
            "predictions": str(folder / PREDICTIONS),
            "metrics": metrics,
        }
        write_result(folder, result)
    return result


def compare(a: str, b: str, out: str | None) -> dict[str, Any]:
    """What A gains over B: in all and by class, paired, with intervals and p-values;
    `out`/result.json if asked for.

    Raises PredictionsError, CheckpointError, LabelsError.
    """
    if out is not None:
        refuse_other(Path(out), {"a": a, "b": b})
    parts = _finished(a), _finished(b)
    found = compare_predictions(*parts, (a, b))
    protocols = [single for part in parts for single in part.protocol.get("fused", [part.protocol])]
    if any(protocol != protocols[0] for protocol in protocols):
        log.warning(
            f"{a} and {b} were tested by other protocols: see `protocol` in each result.json"
        )
    _show(found, parts[0], a, b)
    result = {
        "a": a,
        "b": b,
        "videos": len(parts[0].videos),
        "intervals": parts[0].resampled,
        "measures": {name: gain.as_dict() for name, gain in found.measures.items()},
        "classes": {
            name: {"videos": found.videos[name], **gain.as_dict()}
            for name, gain in found.classes.items()
        },
    }
    if out is not None:
        with folder_lock(out):
            write_result(Path(out), result)
    return result


def _finished(run: str) -> Predictions:
    """The predictions of a run folder or a file. UsageError for a folder of `--split all`, which
    has several."""
    parts = split_folders(Path(run))
    if parts and not (Path(run) / PREDICTIONS).exists():
        raise UsageError(
            f"{run} holds a run for each split; name one: {', '.join(map(str, parts.values()))}"
        )
    path = Path(run) / PREDICTIONS if Path(run).is_dir() else Path(run)
    if path != Path(run):
        is_regular_file(path, Path(run))
    found = Predictions.read(path)
    if found.pending:
        raise PredictionsError(
            f"{path}: the evaluation is not finished, {len(found.pending)} videos are pending"
        )
    return found


def _show(found: Comparison, part: Predictions, a: str, b: str) -> None:
    columns = [
        Column("accuracy, %"),
        *(Column(name, True) for name in ("A", "B", "A − B", "95 % interval", "p")),
    ]
    table = Table(f"A = {a}, B = {b}: {len(part.videos)} test videos", columns)
    for name, shown in MEASURES.items():
        if name in found.measures:
            g = found.measures[name]
            ends = f"{signed(g.estimate.low)} – {signed(g.estimate.high)}"
            table.add(
                shown,
                f"{100 * g.a:.1f}",
                f"{100 * g.b:.1f}",
                signed(g.estimate.value),
                ends,
                f"{g.p:.4f}",
            )
    table.notes.append(intervals_note(part.resampled))
    log.info(table)
    columns = [
        Column("class"),
        *(Column(name, True) for name in ("videos", "A", "B", "A − B", "p")),
    ]
    classes = Table("top 1 of each class, %", columns)
    names = list(found.classes)
    if len(names) > 2 * SHOWN:
        classes.notes.append(
            f"The {SHOWN} largest gains and losses of {len(names)} classes; --json gives all."
        )
        names = names[:SHOWN] + names[-SHOWN:]
    for name in names:
        g = found.classes[name]
        cells = (f"{100 * g.a:.1f}", f"{100 * g.b:.1f}", signed(g.estimate.value), f"{g.p:.4f}")
        classes.add(name, str(found.videos[name]), *cells)
    classes.notes.append(
        "Each p is of its class alone: among many classes some are small by chance."
    )
    log.info(classes)
