"""`train-student --dry-run`: log the config and size of a training, and render its first batch.

Memory and computation are estimated from shapes alone: nothing is allocated.

Shapes: B clips, C channels, T frames, H W pixels.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..common.devices import resolve_device
from ..common.errors import TrainingError
from ..common.settings import Options
from ..common.streams import counted
from ..common.urls import check_local
from ..students.student import Student, count_parameters
from ..targets.dataset import StudentClips
from .distillation_options import TrainConfig
from .loader import EpochBatchSampler, KeyedDataset, read_batches
from .loop_options import LoopOptions
from .preview import MAX_CLIPS, render_batch

log = logging.getLogger(__name__)

PICTURE = "first-batch.png"


def dry_run(config: TrainConfig, clips: StudentClips, student: Student) -> dict[str, Any]:
    """Log config, parameters, memory and computation of a step, and write RUN/first-batch.png.

    Nothing is trained.

    Returns:
        The result that --json prints.

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
    size = log_memory(config.loop, student)
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
    """Log a config as YAML, in the form that is written next to a result."""
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
        clips: The training clips.
        options: Options of the loop.
        render: Makes the picture of a batch.
        run_dir: The folder of the run.
        shown: Name of the text next to each clip in the picture, for the log.

    Raises:
        TrainingError: The clips cannot be read, or the picture cannot be written.
    """
    count = min(options.step_clips, MAX_CLIPS)
    keys = EpochBatchSampler(batch_size=count, steps_per_epoch=1, epochs=1)
    batch = next(read_batches(clips, keys, workers=0, device=torch.device("cpu")))
    for unreadable in batch["unreadable"]:
        for name, reason in unreadable:
            log.warning("%s: %s", name, reason)
    path = Path(run_dir) / PICTURE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        render(batch).save(path, format="PNG")
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
    log.info(f"{path}: the first {count} clips of {options.step_clips}, with their {shown}")
    return str(path)


def log_memory(options: LoopOptions, student: Student) -> dict[str, Any]:
    """Log and return bytes and FLOPs of a micro batch on one device."""
    clips = options.clips_at_once(options.gpus)
    frames, size = student.clip
    shape = (clips, student.options.channels, frames, size, size)
    need = footprint(student, shape, precision=options.precision, copies=options.weight_copies)
    if need is None:
        log.info("memory: unknown, the student cannot run without data")
        return {}
    device = resolve_device(options.device)
    available = (
        f" of {torch.cuda.get_device_properties(device).total_memory / 1e9:.1f}"
        if device.type == "cuda"
        else ""
    )
    log.info(
        f"estimated memory of a micro batch of {clips} clips: {need.total / 1e9:.2f}{available} GB, "
        f"{need.weights / 1e9:.2f} for weights, gradients and optimizer, {need.activations / 1e9:.2f} for activations"
    )
    log.info(f"computation: {need.flops / clips / 1e9:.1f} GFLOP per clip, forward and backward")
    return {"memory_bytes": need.total, "flops_per_clip": need.flops / clips}


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


@dataclass(frozen=True)
class Footprint:
    """Bytes and FLOPs of a step on one device.

    Attributes:
        weights: Bytes of parameters, their gradients, the state of the optimizer, and buffers.
        activations: Bytes that the forward pass stores for the backward pass.
        flops: FLOPs of forward and backward pass; a multiply-add counts as two.
    """

    weights: int
    activations: int
    flops: int

    @property
    def total(self) -> int:
        """Bytes of weights and activations, without workspaces of convolutions or fragmentation."""
        return self.weights + self.activations


def footprint(
    model: nn.Module,
    shape: tuple[int, int, int, int, int],
    *,
    precision: str = "fp32",
    copies: int = 3,
) -> Footprint | None:
    """Return the footprint of a training step, or None if a module cannot run without data.

    Args:
        model: The model; its weights are not changed.
        shape: Shape of the clips, [B, C, T, H, W].
        precision: With bf16 the activations count half; the weights do not.
        copies: Number of tensors of the size of the weights in a training, see
            `LoopOptions.weight_copies`.
    """
    weights = sum(
        copies * p.numel() * p.element_size() if p.requires_grad else p.nbytes
        for p in model.parameters()
    )
    weights += sum(buffer.nbytes for buffer in model.buffers())
    # The values keep the tensors alive, because an address is unique only for so long.
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    try:
        shadow = copy.deepcopy(model).to("meta").train()
        model_storages = {
            tensor.untyped_storage()._cdata for tensor in (*shadow.parameters(), *shadow.buffers())
        }
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                outputs: Any = shadow(torch.zeros(shape, device="meta"))
            torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    # A user's module may read values of its input, which a meta tensor does not have.
    except Exception:
        return None
    activations = sum(
        tensor.untyped_storage().nbytes()
        for key, tensor in saved.items()
        if key not in model_storages
    )
    return Footprint(
        weights, activations // 2 if precision == "bf16" else activations, counter.get_total_flops()
    )
