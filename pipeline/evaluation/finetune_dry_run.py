"""`finetune --dry-run`: log what would be trained and its size, and render its first batch."""

from __future__ import annotations

import logging
from typing import Any

from PIL.Image import Image

from ..students.student import Student, count_parameters
from ..training.dry_run import log_config, log_memory, save_first_batch
from ..training.loop_options import LoopOptions
from ..training.preview import render_labels
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
    log_config(config.model_copy(update={"loop": options}))
    log.info(options.describe_epochs())
    log.info(f"{options.describe_steps(options.gpus)}; {options.describe_rate()}")
    size = log_memory(options, config.clips, student.options.channels, student)

    def render(batch: dict[str, Any]) -> Image:
        return render_labels(batch, clips.labels.classes)

    return {
        "dry_run": True,
        "picture": save_first_batch(clips, options, render, config.out, "labels"),
        "parameters": count_parameters(student),
        "epochs": options.epochs,
        "steps": options.total_steps,
        "clips": options.total_steps * options.step_clips,
        **size,
    }
