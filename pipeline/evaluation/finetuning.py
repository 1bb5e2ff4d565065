"""The objective, the validation and the dry run of `finetune`.

Shapes: B clips, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..clips.clip_options import ClipView
from ..clips.transforms import normalize_clip
from ..common.distributed import SINGLE_PROCESS, Ranks
from ..common.errors import TrainingError
from ..common.numerics import softmax
from ..students.student import Student, count_parameters
from ..training.dry_run import log_config, log_memory, save_first_batch
from ..training.hardware import pick_workers
from ..training.loop import LossReport
from ..training.loop_options import LoopOptions
from ..training.preview import render_labels
from .evaluation_options import EvaluationOptions
from .finetune_options import FinetuneConfig
from .labelled_clips import EvaluationClips, LabelledClips
from .labels import Labels
from .predictions import LOGITS, Predictions
from .predictor import HEAD, predict

log = logging.getLogger(__name__)

# Keeps the loss of a video finite if its label has a probability of 0.
MIN_PROBABILITY = 1e-12


class Classification:
    """objective(model, batch, counts): cross-entropy of the labels, and accuracy of the clips."""

    def counts(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the number of clips, int64 [1]; every clip is part of the loss."""
        return torch.tensor([len(batch["label"])])

    def __call__(self, model: nn.Module, batch: dict[str, Any], counts: Tensor) -> LossReport:
        """Return the mean loss over `counts` clips, and the share of correctly classified clips."""
        logits = model(normalize_clip(batch["clip"], torch.float32))[HEAD].float()
        num_correct = (logits.detach().argmax(dim=1) == batch["label"]).sum()
        loss = functional.cross_entropy(logits, batch["label"], reduction="sum")
        return LossReport(loss / counts[0], {"accuracy": num_correct / counts[0]})


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
    """Return a function that validates the current weights of a student.

    It returns "loss", the mean cross-entropy of the scores of the videos, which are averages over
    their clips, and "accuracy", the top-1 accuracy of the videos. An unreadable video counts as
    wrong and is not part of the loss.

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
        return _loss_and_accuracy(predictions)

    return measure


def _loss_and_accuracy(predictions: Predictions) -> dict[str, float]:
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
    probabilities = scores[np.arange(len(labels)), labels]
    return {
        "loss": float(-np.log(np.maximum(probabilities, MIN_PROBABILITY)).mean()),
        "accuracy": float((scores.argmax(axis=1) == labels).sum() / len(readable)),
    }


def dry_run(
    config: FinetuneConfig, options: LoopOptions, clips: LabelledClips, student: Student
) -> dict[str, Any]:
    """Log config, schedule, memory and computation of a step, and write RUN/first-batch.png.

    Nothing is trained. The picture shows the first batch of the run.

    Args:
        config: The resolved config.
        options: Options of the loop, with the schedule.
        clips: The training clips.
        student: The student.

    Returns:
        The result for --json.

    Raises:
        TrainingError: The clips of the batch cannot be read, or the picture cannot be written.
    """
    log_config(config.model_copy(update={"loop": options}))
    log.info(options.describe_epochs())
    log.info(f"{options.describe_steps(options.gpus)}; {options.describe_rate()}")
    memory = log_memory(options, student)

    render = partial(render_labels, classes=clips.labels.classes)
    return {
        "dry_run": True,
        "picture": save_first_batch(clips, options, render, config.out, "labels"),
        "parameters": count_parameters(student),
        "epochs": options.epochs,
        "steps": options.total_steps,
        "clips": options.total_steps * options.step_clips,
        **memory,
    }
