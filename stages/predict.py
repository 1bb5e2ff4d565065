"""The classes of one's own videos, by a finetuned student."""

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
from ..pipeline.training.precision import pick_workers, torch_threads


def predict(config: PredictConfig, console: Console) -> dict[str, Any]:
    """Show the best classes of every video with their probabilities.

    `ok` is False where a video cannot be read. The clips are those of a test: `test.clips` uniform
    ones of the length and size that the model was trained with.

    Raises:
        CheckpointError: No model, or none of finetune.
        SourceError: No videos.
        DeviceError: This machine has no such device.
    """
    student = load_student(config.model, factory=config.factory)
    classes = student.meta.classes.get(HEAD)
    if not classes:
        heads = ", ".join(student.classes)
        raise CheckpointError(
            f"{config.model}: no model of distinit finetune, for it has no labels (heads: {heads})"
        )
    # Each source by itself: two folders of one name are no matter here, where corpora have no use.
    lists = [list_videos([source]) for source in config.sources]
    paths = dict.fromkeys(
        os.path.normpath(listed.absolute(i)) for listed in lists for i in range(len(listed))
    )
    device = resolve_device(config.device)
    videos = [Labelled(path, -1) for path in paths]
    meta, options = student.meta, config.test
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
        length=meta.clip_length,
        clips=options.clips,
        crops=options.crops,
        order=options.frames,
        channels=student.options.channels,
    )
    workers = min(
        pick_workers(options.workers, device), len(videos) - 1
    )  # one video needs no process of its own
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
    found = _best(predictions, min(config.top, len(classes)))
    _show(found, predictions, console)
    failed = predictions.failures()
    return {
        "ok": not failed,
        "model": str(Path(config.model)),
        "protocol": predictions.protocol,
        "videos": found,
        "failed": failed,
    }


def _best(predictions: Predictions, top: int) -> list[dict[str, Any]]:
    """Return the frames and the `top` classes of each video that was read.

    The best class is first; among equals the one with the lower number.
    """
    scores = probabilities(predictions)
    found = []
    for i, video in enumerate(predictions.videos):
        if predictions.status[i] != OK:
            continue
        order = np.argsort(-scores[i], kind="stable")[:top]
        best = [
            {"class": predictions.classes[k], "probability": float(scores[i, k])} for k in order
        ]
        row = {"video": escape_path(video), "frames": int(predictions.frames[i]), "top": best}
        found.append(row | ({"note": predictions.reasons[i]} if predictions.reasons[i] else {}))
    return found


def _show(found: list[dict[str, Any]], predictions: Predictions, console: Console) -> None:
    if found:
        # What all paths begin with stands once, above: long ones leave no room for the classes.
        above = os.path.commonpath([os.path.dirname(row["video"]) for row in found])
        columns = [Column("video"), Column("class"), Column("%", True), Column("then")]
        table = Table(f"{len(found)} of {len(predictions.videos)} videos, in {above}", columns)
        for row in found:
            first, *others = row["top"]
            then = ", ".join(f"{each['class']} {100 * each['probability']:.1f}" for each in others)
            table.add(
                os.path.relpath(row["video"], above),
                first["class"],
                f"{100 * first['probability']:.1f}",
                then,
            )
        console.table(table.to_rich())
    for each in predictions.failures():
        console.warn(f"could not be read: {each['video']}: {each['reason']}")
    for each in predictions.damaged():
        console.warn(f"read, but damaged: {each['video']}: {each['reason']}")
