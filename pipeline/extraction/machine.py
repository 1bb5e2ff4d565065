"""What an extraction computes with here: teachers on their device, decoders, numerics."""

from __future__ import annotations

from typing import Any

import torch

from ..common.errors import UsageError
from ..common.processes import cores
from ..teachers.teacher import Teacher, load_teacher
from .extract_options import ExtractConfig


def load_teachers(config: ExtractConfig, device: torch.device) -> dict[str, Teacher]:
    """Load the teachers by their name in the store; UsageError if two have the same name."""
    teachers: dict[str, Teacher] = {}
    for spec in config.teachers:
        teacher = load_teacher(spec)
        if teacher.name in teachers:
            raise UsageError(f"--teacher: {teacher.name} is named twice")
        teachers[teacher.name] = teacher.to(device, config.precision)
    return teachers


def default_decoders(device: torch.device) -> int:
    """Return the number of decode processes.

    One per core next to a teacher on the CPU, since whichever is ahead waits; all cores but one
    next
    to a GPU.
    """
    return cores() if device.type == "cpu" else max(1, cores() - 1)


def run_record(batch_size: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Return what makes equal inputs give equal bits on this machine.

    It is recorded with the teacher and in every commit.
    """
    return {
        "batch_size": batch_size,
        "precision": precision,
        "torch": torch.__version__.split("+")[0],
        "device": device.type,
    }
