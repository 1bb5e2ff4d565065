"""`finetune --dry-run`: log what would be trained and its size, and render its first batch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import yaml

from ..common.errors import TrainingError
from ..students.student import Student, count_parameters
from ..training.dry_run import PICTURE, log_memory
from ..training.loader import EpochBatchSampler, read_batches
from ..training.loop_options import LoopOptions
from ..training.preview import MOST_CLIPS, render_labels, save_preview
from .finetune_options import FinetuneConfig
from .labelled_clips import LabelledClips

log = logging.getLogger(__name__)


def dry_run(
    config: FinetuneConfig, options: LoopOptions, clips: LabelledClips, student: Student
) -> dict[str, Any]:
    """Log config, schedule, memory and computation of a step, and write RUN/first-batch.png.

    Args:
        config: The resolved config.
        options: Of the loop, with the schedule.
        clips: The training clips.
        student: The student.

    Returns:
        What --json prints. Nothing is trained; the picture is of the run's first batch.

    Raises:
        TrainingError: The clips of the batch cannot be read, or the picture cannot be written.
    """
    used = config.model_copy(update={"loop": options}).model_dump(mode="json")
    for line in yaml.safe_dump(used, sort_keys=False, width=100).splitlines():
        log.info(line)
    log.info(options.describe_epochs())
    log.info(f"{options.describe_steps(options.gpus)}; {options.describe_rate()}")
    size = log_memory(options, config.clips, student.options.channels, student)
    batch_size = min(options.step_clips, MOST_CLIPS)
    keys = EpochBatchSampler(batch_size=batch_size, steps_per_epoch=1, epochs=1)
    batch = next(read_batches(clips, keys, workers=0, device=torch.device("cpu")))
    for unreadable in batch["broken"]:
        for name, reason in unreadable:
            log.warning("%s: %s", name, reason)
    path = Path(config.out) / PICTURE
    try:
        save_preview(render_labels(batch, clips.labels.classes), path)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
    log.info(f"{path}: the first {batch_size} clips of {options.step_clips}, with their labels")
    return {
        "dry_run": True,
        "picture": str(path),
        "parameters": count_parameters(student),
        "epochs": options.epochs,
        "steps": options.total_steps,
        "clips": options.total_steps * options.step_clips,
        **size,
    }
