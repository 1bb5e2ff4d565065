"""Engines that run a teacher's forward pass in place of torch without compilation.

An engine changes the last bits of the outputs, not what is computed, so that it belongs to the
numerics of a store and not to the identity of the teacher.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from ..common.errors import TeacherError, third_party
from . import onnx_engine
from .teacher import Engine, Teacher
from .teacher_options import EngineName

TORCH = "torch"
COMPILED = "torch.compile"

log = logging.getLogger(__name__)


def use_engine(
    teacher: Teacher, asked: EngineName, recorded: str | None = None, *, batch_size: int = 0
) -> str:
    """Give a teacher that is on its device an engine; return the name that numerics record.

    Args:
        teacher: Loaded, on its device and in its precision.
        asked: `auto` takes the recorded engine; without one ONNX Runtime where it is faster, else
            torch.
        recorded: The name of the engine that the store's rows were computed with.
        batch_size: Compilation is done for batches of this size; 0 leaves it to the first batch.

    Raises:
        TeacherError: The recorded engine is not known to this version, or the engine asked for
            does not run the teacher.
    """
    teacher.engine = None
    who = f"teacher {teacher.name!r}"
    chosen = _by_name(teacher, recorded) if asked == "auto" and recorded is not None else asked
    if chosen == "compile":
        # Batches are padded to one size, so that nothing is gained by code for any size.
        teacher.engine = Engine(COMPILED, torch.compile(teacher.run, dynamic=False))
        with third_party(f"{who}: --engine compile: fails", TeacherError):
            teacher.compute(np.zeros((batch_size, *teacher.input_shape, 3), np.uint8))
    elif chosen == "onnx" or (chosen == "auto" and teacher.device.type == "cpu"):
        try:
            teacher.engine = onnx_engine.onnx_engine(teacher, if_faster=chosen == "auto")
            log.info(f"{who}: runs in {teacher.engine.name}")
        except TeacherError as error:
            if asked == "onnx":
                raise TeacherError(f"{who}: --engine onnx: {error}") from error
            why = str(error)[:300]
            log.info(f"{who}: runs in torch; ONNX Runtime is not used: {why}")
    return TORCH if teacher.engine is None else teacher.engine.name


def _by_name(teacher: Teacher, recorded: str) -> EngineName:
    known: dict[str, EngineName] = {TORCH: "torch", COMPILED: "compile", onnx_engine.NAME: "onnx"}
    engine = known.get(recorded.partition(" ")[0])
    if engine is None:
        raise TeacherError(
            f"teacher {teacher.name!r}: the store's rows were computed by the engine {recorded!r}, which this "
            f"version does not have; allowed: {', '.join(known)}, or --engine with --allow-different-numerics"
        )
    return engine
