"""Engines that run a teacher's forward pass in place of torch without compilation.

An engine changes the last bits of the outputs, not what is computed, so that it belongs to the
numerics of a store and not to the identity of the teacher.
"""

from __future__ import annotations

import numpy as np
import torch

from ..common.errors import TeacherError, third_party
from .teacher import Engine, Teacher
from .teacher_options import EngineName

TORCH = "torch"
COMPILED = "torch.compile"


def use_engine(
    teacher: Teacher, asked: EngineName, recorded: str | None = None, *, batch_size: int = 0
) -> str:
    """Give a teacher that is on its device an engine; return the name that numerics record.

    Args:
        teacher: Loaded, on its device and in its precision.
        asked: `auto` takes the recorded engine, of a new store torch.
        recorded: The name of the engine that the store's rows were computed with.
        batch_size: Compilation is done for batches of this size; 0 leaves it to the first batch.

    Raises:
        TeacherError: The recorded engine is not known to this version, or the compilation failed.
    """
    if asked == "auto":
        asked = _by_name(teacher, recorded or TORCH)
    teacher.engine = None
    if asked == "compile":
        # Batches are padded to one size, so that nothing is gained by code for any size.
        teacher.engine = Engine(COMPILED, torch.compile(teacher.run, dynamic=False))
        with third_party(f"teacher {teacher.name!r}: --engine compile: fails", TeacherError):
            teacher.compute(np.zeros((batch_size, *teacher.input_shape, 3), np.uint8))
    return TORCH if teacher.engine is None else teacher.engine.name


def _by_name(teacher: Teacher, recorded: str) -> EngineName:
    known: dict[str, EngineName] = {TORCH: "torch", COMPILED: "compile"}
    engine = known.get(recorded)
    if engine is None:
        raise TeacherError(
            f"teacher {teacher.name!r}: the store's rows were computed by the engine {recorded!r}, which this "
            f"version does not have; allowed: {', '.join(known)}, or --engine with --allow-different-numerics"
        )
    return engine
