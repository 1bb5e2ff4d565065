"""Teachers on their device, number of decoders and numerics of an extraction on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..common.errors import UsageError
from ..common.processes import cores
from ..store.reader import TargetStore
from ..teachers.engines import use_engine
from ..teachers.teacher import Teacher, TeacherOutput, load_teacher
from ..teachers.teacher_options import EngineName
from ..video.geometry import View
from .extract_options import ExtractConfig


def load_teachers(config: ExtractConfig, device: torch.device) -> list[Teacher]:
    """Load the teachers, in the order of the command line.

    Raises:
        UsageError: Two outputs would have one name in the store.
    """
    teachers = []
    names: set[str] = set()
    for spec in config.teachers:
        teacher = load_teacher(spec)
        for name in teacher.store_names.values():
            if name in names:
                raise UsageError(f"--teacher: {name} is named twice")
            names.add(name)
        teachers.append(teacher.to(device, config.precision))
    return teachers


def with_precision(config: ExtractConfig, device: torch.device) -> ExtractConfig:
    """Return the config with fp32 or bf16 in place of `--precision auto`."""
    if config.precision != "auto":
        return config
    stored: set[str] = set()
    if (config.out / "zarr.json").exists():
        stored = {
            str(t.run.get("precision")) for t in TargetStore.open(config.out).teachers.values()
        }
    if stored == {"fp32"} or stored == {"bf16"}:
        precision = stored.pop()
    else:
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return config.model_copy(update={"precision": precision})


def use_engines(
    teachers: Sequence[Teacher],
    engine: EngineName,
    stored: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
) -> dict[str, str]:
    """Give the teachers their engines; return the engines by their outputs' names in the store.

    Args:
        teachers: The teachers, on their device.
        engine: The engine that the user chose; see `use_engine`.
        stored: The numerics of the teachers that the store holds.
        run: The numerics of this command; its workers may be on another kind of device.
    """
    engines = {}
    for teacher in teachers:
        names = teacher.store_names.values()
        recorded = next(
            (stored[name].get("engine", "torch") for name in names if name in stored), None
        )
        if recorded is None and run["device"] != teacher.device.type:
            recorded = "torch"
        engines.update(
            dict.fromkeys(
                names, use_engine(teacher, engine, recorded, batch_size=run["batch_size"])
            )
        )
    return engines


def views_of(teachers: Sequence[Teacher]) -> list[View]:
    """Return the distinct views of the teachers, in their order."""
    return list(dict.fromkeys(teacher.view for teacher in teachers))


def outputs_of(teachers: Sequence[Teacher]) -> dict[str, TeacherOutput]:
    """Return the outputs of all teachers by their name in the store."""
    outputs = [TeacherOutput(teacher, key) for teacher in teachers for key in teacher.outputs]
    return {output.name: output for output in outputs}


def default_decoders(device: torch.device) -> int:
    """Return the number of decoding processes.

    With teachers on the CPU it is one per core: decoders that are ahead of the teachers wait, and
    leave them the cores. With teachers on a GPU it is one less than the number of cores.
    """
    return cores() if device.type == "cpu" else max(1, cores() - 1)


def run_record(batch_size: int, precision: str, device: torch.device) -> dict[str, Any]:
    """Return the numerics of this machine: what must match for equal bits of equal inputs.

    They are recorded with the teacher and in every commit.
    """
    return {
        "batch_size": batch_size,
        "precision": precision,
        "torch": torch.__version__.split("+")[0],
        "device": device.type,
    }
