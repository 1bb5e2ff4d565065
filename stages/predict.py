"""Predict the classes of videos with a finetuned student."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..pipeline.clips.clip_options import ClipView
from ..pipeline.common.console import Console
from ..pipeline.common.devices import resolve_device
from ..pipeline.common.errors import CheckpointError
from ..pipeline.common.tables import Column, Table
from ..pipeline.corpus.sources import escape_path, list_videos
from ..pipeline.evaluation.classification import HEAD
from ..pipeline.evaluation.ensemble import probabilities
from ..pipeline.evaluation.evaluation_options import PredictConfig
from ..pipeline.evaluation.labelled_clips import EvaluationClips
from ..pipeline.evaluation.labels import Labelled, Labels
from ..pipeline.evaluation.predictions import OK, Predictions
from ..pipeline.evaluation.predictor import predict as fill_in
from ..pipeline.students.export import load_student
from ..pipeline.students.student import Student
from ..pipeline.training.precision import pick_workers, torch_threads


def predict(config: PredictConfig, console: Console) -> dict[str, Any]:
    """Show the best classes of each video with their probabilities.

    The clips are those of a test: `test.clips` clips, evenly spread, with the frames and size that
    the model was trained with.

    Returns:
        Videos with their best classes; `ok` is False if a video is unreadable.

    Raises:
        CheckpointError: There is no model, or one without labels.
        SourceError: A source has no videos.
        DeviceError: The device is missing.
    """
    student = load_student(config.model, factory=config.factory)
    if not student.meta.classes.get(HEAD):
        heads = ", ".join(student.classes)
        raise CheckpointError(
            f"{config.model}: expected a model of distinit finetune, this one has no labels (heads: {heads})"
        )
    # Each source separately: unlike corpora, two folders may have the same name.
    lists = [list_videos([source]) for source in config.sources]
    paths = dict.fromkeys(
        os.path.normpath(listed.absolute(i)) for listed in lists for i in range(len(listed))
    )
    predictions = _score(student, [Labelled(path, -1) for path in paths], config, console)
    videos = _best(predictions, min(config.top, len(predictions.classes)))
    _show(videos, predictions, console)
    failed = predictions.failures()
    return {
        "ok": not failed,
        "model": str(Path(config.model)),
        "protocol": predictions.protocol,
        "videos": videos,
        "failed": failed,
    }


def _score(
    student: Student, videos: list[Labelled], config: PredictConfig, console: Console
) -> Predictions:
    """Score the clips of all videos."""
    device = resolve_device(config.device)
    meta, options = student.meta, config.test
    classes = meta.classes[HEAD]
    predictions = Predictions.empty(
        classes,
        [video.path for video in videos],
        [video.label for video in videos],
        options.clips * options.crops,
        protocol=options.protocol(),
        identity={},
    )
    clips = EvaluationClips(
        Labels("", 1, "", tuple(classes), (), tuple(videos)),
        videos,
        ClipView(size=meta.clip_size, resize=meta.resize),
        clip_frames=meta.clip_length,
        clips=options.clips,
        crops=options.crops,
        order=options.frames,
        channels=student.options.channels,
    )
    # A single video is read without a loader process.
    workers = min(pick_workers(options.workers, device), len(videos) - 1)
    with (
        torch_threads(None, workers, device),
        console.progress("predicting", len(videos), "video") as bar,
    ):
        fill_in(
            student,
            clips,
            predictions,
            batch_size=options.batch_size,
            workers=workers,
            device=device,
            done=bar.advance,
        )
    return predictions


def _best(predictions: Predictions, top: int) -> list[dict[str, Any]]:
    """Return frames and `top` classes of each readable video, the best class first."""
    scores = probabilities(predictions)
    rows = []
    for i, video in enumerate(predictions.videos):
        if predictions.status[i] != OK:
            continue
        order = np.argsort(-scores[i], kind="stable")[:top]
        best = [
            {"class": predictions.classes[k], "probability": float(scores[i, k])} for k in order
        ]
        row = {"video": escape_path(video), "frames": int(predictions.frames[i]), "top": best}
        rows.append(row | ({"note": predictions.reasons[i]} if predictions.reasons[i] else {}))
    return rows


def _show(rows: list[dict[str, Any]], predictions: Predictions, console: Console) -> None:
    if rows:
        # The common part of all paths is in the title, to leave room for the classes.
        common = os.path.commonpath([os.path.dirname(row["video"]) for row in rows])
        columns = [Column("video"), Column("class"), Column("%", True), Column("then")]
        table = Table(f"{len(rows)} of {len(predictions.videos)} videos, in {common}", columns)
        for row in rows:
            first, *others = row["top"]
            then = ", ".join(f"{each['class']} {100 * each['probability']:.1f}" for each in others)
            table.add(
                os.path.relpath(row["video"], common),
                first["class"],
                f"{100 * first['probability']:.1f}",
                then,
            )
        console.table(table.to_rich())
    for each in predictions.failures():
        console.warn(f"unreadable: {each['video']}: {each['reason']}")
    for each in predictions.damaged():
        console.warn(f"truncated: {each['video']}: {each['reason']}")
