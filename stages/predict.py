"""Predict the classes of videos with a finetuned student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..pipeline.common.console import Console, plain
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.errors import CheckpointError
from ..pipeline.common.files import write_page
from ..pipeline.common.numerics import best_classes
from ..pipeline.common.streams import as_json
from ..pipeline.common.tables import Table, columns
from ..pipeline.corpus.sources import escape_path
from ..pipeline.evaluation.ensemble import probabilities
from ..pipeline.evaluation.evaluation_options import PredictConfig
from ..pipeline.evaluation.own_videos import (
    claim_file,
    list_paths,
    log_problems,
    make_clips,
    require_parquet,
    write_rows,
)
from ..pipeline.evaluation.predictions import OK, Predictions
from ..pipeline.evaluation.predictor import HEAD
from ..pipeline.evaluation.predictor import predict as fill_predictions
from ..pipeline.students.student import Student
from ..pipeline.students.student_files import load_student
from ..pipeline.training.hardware import pick_workers, torch_threads

ENDINGS = {".csv": "a row per video", ".json": "as --json", ".parquet": "as .csv, with types"}


def predict(config: PredictConfig, console: Console) -> dict[str, Any]:
    """Show the best classes of each video with their probabilities.

    The clips are those of a test: `test.clips` evenly spread clips with the frames and size of the
    model's training.

    Returns:
        Videos with their best classes; `ok` is False if a video is unreadable.

    Raises:
        CheckpointError: There is no model, or it has no labels.
        UsageError: `out` cannot be written.
        SourceError: A source has no videos.
        DeviceError: The device is missing.
    """
    student = load_student(config.model, factory=config.factory)
    if not student.meta.classes.get(HEAD):
        heads = ", ".join(student.classes)
        raise CheckpointError(
            f"{config.model}: expected a model of distinit finetune, this one has no labels (heads: {heads})"
        )
    paths = list_paths(config.sources)
    out = None if config.out is None else claim_file(config.out, ENDINGS, "predict", config)
    if out is not None and out.suffix == ".parquet":
        # Check it now instead of after the predictions.
        require_parquet()
    predictions = _score(student, paths, config, console)
    videos = _best(predictions, min(config.top, len(predictions.classes)))
    failed = predictions.failures()
    result = {
        "ok": not failed,
        "model": str(Path(config.model)),
        "protocol": predictions.protocol,
        "videos": videos,
        "failed": failed,
    }
    _show(videos, predictions, console)
    if out is not None:
        result["out"] = str(out)
        _write(out, result, predictions, config.top)
        console.info(f"predictions of {len(predictions.videos)} videos: {out}")
    return result


def _score(
    student: Student, paths: list[str], config: PredictConfig, console: Console
) -> Predictions:
    """Score the clips of all videos."""
    device = resolve_device(config.device)
    options = config.test
    predictions = Predictions.empty(
        student.meta.classes[HEAD],
        paths,
        [-1] * len(paths),
        options.clips * options.crops,
        protocol=options.protocol(),
        identity={},
    )
    clips = make_clips(
        student, paths, clips=options.clips, crops=options.crops, order=options.frames
    )
    # A single video is read without a loader process.
    workers = min(pick_workers(options.workers, device), len(paths) - 1)
    with (
        torch_threads(None, workers, device),
        console.progress("predicting", len(paths), "videos") as bar,
    ):
        fill_predictions(
            student,
            clips,
            predictions,
            batch_size=options.batch_size,
            workers=workers,
            device=device,
            advance=bar.advance,
        )
    return predictions


def _best(predictions: Predictions, top: int) -> list[dict[str, Any]]:
    """Return the number of frames and the `top` best classes of each readable video."""
    scores = probabilities(predictions)
    rows = []
    for i, video in enumerate(predictions.videos):
        if predictions.status[i] != OK:
            continue
        best = [
            {"class": name, "probability": share}
            for name, share in best_classes(scores[i], predictions.classes, top)
        ]
        row = {"video": escape_path(video), "frames": int(predictions.frames[i]), "top": best}
        rows.append(row | ({"note": predictions.reasons[i]} if predictions.reasons[i] else {}))
    return rows


def _show(rows: list[dict[str, Any]], predictions: Predictions, console: Console) -> None:
    if rows:
        # The common part of all paths is in the title, to leave room for the classes.
        common = os.path.commonpath([os.path.dirname(row["video"]) for row in rows])
        title = f"{len(rows)} of {len(predictions.videos)} videos, in {common}"
        table = Table(title, columns("video", "class", ">%", "then"))
        for row in rows:
            first, *others = row["top"]
            others_text = ", ".join(
                f"{each['class']} {100 * each['probability']:.1f}" for each in others
            )
            table.add(
                os.path.relpath(row["video"], common),
                first["class"],
                f"{100 * first['probability']:.1f}",
                others_text,
            )
        console.table(table.to_rich())
    log_problems(predictions.failures(), predictions.truncated())


def _write(out: Path, result: dict[str, Any], predictions: Predictions, top: int) -> None:
    """Write the result as JSON, or a row per video as csv or parquet."""
    if out.suffix == ".json":
        write_page(out, as_json(plain(result)) + "\n")
        return
    top = min(top, len(predictions.classes))
    types = {"video": "string", "status": "string", "reason": "string", "frames": "int64"}
    for k in range(1, top + 1):
        types |= {f"class{k}": "string", f"probability{k}": "float64"}
    ranked = {row["video"]: row["top"] for row in result["videos"]}
    rows = []
    for i, video in enumerate(map(escape_path, predictions.videos)):
        classes = [each[key] for each in ranked.get(video, ()) for key in ("class", "probability")]
        row = [video, predictions.status[i], predictions.reasons[i], int(predictions.frames[i])]
        rows.append([*row, *(classes or [None] * 2 * top)])
    write_rows(out, types, rows)
