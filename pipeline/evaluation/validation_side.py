"""Measure a student on the validation side of labels, as the test does on the test side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..clips.clip_options import ClipView
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import TrainingError
from ..common.numerics import softmax
from ..students.student import Student
from ..training.precision import pick_workers
from .evaluation_options import EvaluationOptions
from .labelled_clips import EvaluationClips
from .labels import Labels
from .predictions import LOGITS, Predictions
from .predictor import predict

TINY = 1e-12


def validation(
    student: Student,
    labels: Labels,
    *,
    view: ClipView,
    clip_frames: int,
    clips: int,
    options: EvaluationOptions,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> Callable[[], dict[str, float]]:
    """Return a function that measures the student as it is then.

    Its "loss" is the mean cross-entropy of the scores of the videos, averaged over their clips, and
    its "accuracy" their top-1 accuracy. Unreadable videos are wrong, and not part of the loss.

    Args:
        student: The model, which may be trained between two calls.
        labels: Data set; its validation side is used.
        view: Resizing and cropping of clips.
        clip_frames: Frames per clip.
        clips: Clips per video.
        options: Crops, scores and sizes of the test.
        device: Where to compute.
        ranks: The processes of a distributed training; each scores a share of the videos.
    """
    dataset = EvaluationClips(
        labels,
        labels.val,
        view,
        clip_frames=clip_frames,
        clips=clips,
        crops=options.crops,
        channels=student.options.channels,
    )
    share = list(range(len(labels.val)))[ranks.rank :: ranks.world]

    def measure() -> dict[str, float]:
        predictions = Predictions.empty(
            labels.classes,
            [video.path for video in labels.val],
            [video.label for video in labels.val],
            clips * options.crops,
            protocol=options.protocol(),
            identity={},
        )
        ranks.on_all_ranks(
            lambda: predict(
                student,
                dataset,
                predictions,
                videos=share,
                batch_size=options.batch_size,
                workers=pick_workers(options.workers, device),
                device=device,
            )
        )
        for rows in ranks.gather(predictions.export_rows(share)) if ranks.world > 1 else ():
            predictions.merge_rows(rows)
        return _measures(predictions)

    return measure


def _measures(predictions: Predictions) -> dict[str, float]:
    """Return loss and accuracy of finished predictions."""
    scores = predictions.video_scores.astype(np.float64)
    readable = np.isfinite(scores).all(axis=1)
    if not readable.any():
        first = predictions.failures()[0]
        raise TrainingError(
            f"none of the {len(readable)} validation videos can be read; the first, {first['video']}: {first['reason']}"
        )
    scores, labels = scores[readable], predictions.labels[readable]
    if predictions.protocol.get("scores") == LOGITS:
        scores = softmax(scores)
    of_label = scores[np.arange(len(labels)), labels]
    return {
        "loss": float(-np.log(np.maximum(of_label, TINY)).mean()),
        "accuracy": float((scores.argmax(axis=1) == labels).sum() / len(readable)),
    }
