"""`train-student --dry-run`: log what would be trained and its size, and render its first batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from PIL.Image import Image

from ..common.devices import resolve_device
from ..common.errors import TrainingError
from ..common.settings import Options
from ..common.streams import counted
from ..common.urls import check_local
from ..students.student import Student, count_parameters
from ..targets.dataset import StudentClips
from .distillation_options import TrainConfig
from .footprint import footprint
from .loader import EpochBatchSampler, KeyedDataset, read_batches
from .loop_options import LoopOptions
from .preview import MOST_CLIPS, render_batch, save_preview

log = logging.getLogger(__name__)

PICTURE = "first-batch.png"


class ClipSize(Protocol):
    """Frames and side of a clip, which are options of training and finetuning."""

    @property
    def clip_frames(self) -> int:
        """Frames per clip."""
        ...

    @property
    def size(self) -> int:
        """Pixels per side."""
        ...


def dry_run(config: TrainConfig, clips: StudentClips, student: Student) -> dict[str, Any]:
    """Log config, parameters, memory and computation of a step, and write RUN/first-batch.png.

    Returns:
        What --json prints. Nothing is trained; the picture is of the run's first batch.

    Raises:
        TrainingError: The clips of the batch cannot be read, or the picture cannot be written.
    """
    check_local(config.out)
    options = config.loop.for_videos(len(clips.sampler.videos))
    log_config(config)
    heads = {name: count_parameters(student.head(name)) for name in student.classes}
    backbone = count_parameters(student.backbone)
    log.info(f"{config.student.describe()}: {_count(backbone)} parameters in the backbone")
    for name, count in heads.items():
        log.info(f"head {name}: {student.classes[name]} classes, {_count(count)} parameters")
    log.info(f"{counted(len(clips.sampler.videos), 'video')}, {options.describe_epochs()}")
    log.info(f"{options.describe_steps(config.loop.gpus)}; {options.describe_rate()}")
    size = log_memory(config.loop, config.clips, config.student.channels, student)
    targets = clips.sampler.targets
    classes = {name: each.classes for name, each in targets.items() if each.classes}

    def render(batch: dict[str, Any]) -> Image:
        return render_batch(batch, classes, tau=config.targets.tau)

    return {
        "dry_run": True,
        "picture": save_first_batch(clips, options, render, config.out, "targets"),
        "backbone_parameters": backbone,
        "head_parameters": heads,
        **size,
    }


def log_config(config: Options) -> None:
    """Log a config as YAML, as it is written next to a result."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)
    for line in text.splitlines():
        log.info(line)


def save_first_batch(
    clips: KeyedDataset,
    options: LoopOptions,
    render: Callable[[dict[str, Any]], Image],
    run_dir: str,
    shown: str,
) -> str:
    """Write the first clips of a training as a picture, RUN/first-batch.png, and return its path.

    Args:
        clips: What is trained on.
        options: Of the loop.
        render: Makes the picture of a batch.
        run_dir: RUN.
        shown: What is next to each clip in the picture.

    Raises:
        TrainingError: The clips cannot be read, or the picture cannot be written.
    """
    count = min(options.step_clips, MOST_CLIPS)
    keys = EpochBatchSampler(batch_size=count, steps_per_epoch=1, epochs=1)
    batch = next(read_batches(clips, keys, workers=0, device=torch.device("cpu")))
    for unreadable in batch["unreadable"]:
        for name, reason in unreadable:
            log.warning("%s: %s", name, reason)
    path = Path(run_dir) / PICTURE
    try:
        save_preview(render(batch), path)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
    log.info(f"{path}: the first {count} clips of {options.step_clips}, with their {shown}")
    return str(path)


def log_memory(
    options: LoopOptions, view: ClipSize, channels: int, student: Student
) -> dict[str, Any]:
    """Log and return bytes and FLOPs of a micro batch on one device."""
    clips = options.clips_at_once(options.gpus)
    shape = (clips, channels, view.clip_frames, view.size, view.size)
    found = footprint(student, shape, precision=options.precision, copies=options.weight_copies)
    if found is None:
        log.info("memory: unknown, the student cannot run without data")
        return {}
    device = resolve_device(options.device)
    has = (
        f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f}"
        if device.type == "cuda"
        else ""
    )
    log.info(
        f"estimated memory of a micro batch of {clips} clips: {found.total / 1e9:.2f}{has} GB, "
        f"{found.weights / 1e9:.2f} for weights, gradients and optimizer, {found.activations / 1e9:.2f} for activations"
    )
    log.info(f"computation: {found.flops / clips / 1e9:.1f} GFLOP per clip, forward and backward")
    return {"memory_bytes": found.total, "flops_per_clip": found.flops / clips}


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")
