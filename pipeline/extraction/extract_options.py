"""What `distinit extract-targets` can be told, and what follows from it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from ..common.errors import UsageError
from ..common.processes import cores
from ..common.settings import Options
from ..corpus.parts import Part
from ..store.encoding import Encoding
from ..teachers.teacher import Teacher, TeacherSpec, load_teacher
from ..video.sampling import Sampling


class ExtractConfig(Options):
    """Everything `distinit extract-targets` can be told."""

    sources: list[str] = []
    part: str | None = None
    out: Path
    teachers: list[TeacherSpec] = Field(min_length=1)
    sampling: Sampling | None = None
    batch_size: int = Field(32, ge=1)
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    decoders: int | None = Field(None, ge=1)
    timeout_s: float = Field(120, gt=0)
    memory_gb: float = Field(4.0, ge=0.1)
    max_failures: int = Field(100, ge=0, le=10_000)
    shard_rows: int | None = None
    encoding: Encoding | None = None
    retry_failed: bool = False
    accept_run: bool = False
    accept_teachers: list[str] = []
    workers: int | None = Field(None, ge=1)
    scheduler: str | None = None
    retries: int = Field(2, ge=0)
    dry_run: bool = False

    @field_validator("part")
    @classmethod
    def _a_part(cls, part: str | None) -> str | None:
        return None if part is None else str(Part.parse(part))

    @model_validator(mode="after")
    def _one_cluster(self) -> ExtractConfig:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError(
                "give --workers (a local cluster) or --scheduler (an existing one), not both"
            )
        return self


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
