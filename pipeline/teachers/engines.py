"""Engines that run a teacher's forward pass in place of torch without compilation.

An engine changes the last bits of the outputs, not what is computed, so that it belongs to the
numerics of a store and not to the identity of the teacher.

ONNX Runtime is the engine on a CPU. Rows do not depend on the size of their batch there, nor on the
other images in it: that is checked to the bit on the probe images, whose outputs also have to agree
with torch's. An exported file is kept in the user's cache under a digest of what determines it, and
so is the reason why a teacher is left to torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import DistInitError, TeacherError, in_one_line, third_party
from ..common.files import write_whole
from ..store.cache import cache_folder
from .fingerprint import ALIKE, COUNT, Difference
from .loaded_model import MAP
from .probes import probe_images
from .teacher import Engine, Teacher
from .teacher_options import EngineName

TORCH = "torch"
COMPILED = "torch.compile"
ONNX = "onnxruntime"
FORM = 1
"""Of the exported files: another way of export has another number."""
CHEAP_S = 0.004
"""Seconds of a core per image below which decoding costs more than the teacher."""
GAIN = 1.1
"""Least ratio of the rates of ONNX Runtime and torch for which a new store takes it."""
ROUNDS = 3
AT_ONCE = 4
"""Images of one call: a layer's outputs of more of them do not fit the cache of a core."""

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
            teacher.engine = onnx_engine(teacher, if_faster=chosen == "auto")
            log.info(f"{who}: runs in {teacher.engine.name}")
        except TeacherError as error:
            if asked == "onnx":
                raise TeacherError(f"{who}: --engine onnx: {error}") from error
            why = str(error)[:300]
            log.info(f"{who}: runs in torch; ONNX Runtime is not used: {why}")
    return TORCH if teacher.engine is None else teacher.engine.name


def _by_name(teacher: Teacher, recorded: str) -> EngineName:
    known: dict[str, EngineName] = {TORCH: "torch", COMPILED: "compile", ONNX: "onnx"}
    engine = known.get(recorded.partition(" ")[0])
    if engine is None:
        raise TeacherError(
            f"teacher {teacher.name!r}: the store's rows were computed by the engine {recorded!r}, which this "
            f"version does not have; allowed: {', '.join(known)}, or --engine with --allow-different-numerics"
        )
    return engine


def onnx_version() -> str:
    """Return the engine's name as numerics record it, with its version.

    Raises:
        TeacherError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TeacherError(f"{error.name or error} is not installed") from error
    return f"{ONNX} {onnxruntime.__version__}"


def onnx_engine(teacher: Teacher, *, if_faster: bool) -> Engine:
    """Return ONNX Runtime as the engine of a teacher.

    Args:
        teacher: On its device, in its precision.
        if_faster: Only where it is faster than torch, and where the teacher is not cheap anyway.

    Raises:
        TeacherError: The reason why not.
    """
    if teacher.device.type != "cpu":
        raise TeacherError(f"it runs on a CPU only, not on {teacher.device.type}")
    if teacher.precision != "fp32":
        raise TeacherError(f"it computes in fp32, not in {teacher.precision}")
    name = onnx_version()
    images = probe_images(*teacher.input_shape)
    file = _file(teacher, name)
    verdict = _read_verdict(file)
    if if_faster and verdict is not None and verdict["reason"] is not None:
        raise TeacherError(str(verdict["reason"]))
    timed = if_faster and verdict is None
    torch_s = _seconds(lambda: teacher.run(torch.from_numpy(images))) if timed else 0.0
    if timed and torch_s < CHEAP_S * COUNT:
        raise TeacherError("the teacher costs less than decoding a frame")
    try:
        run, exported = _checked_run(teacher, images, file)
        if timed and torch_s < GAIN * _seconds(lambda: run(torch.from_numpy(images))):
            raise TeacherError("it is not faster than torch with this teacher")
    except TeacherError as error:
        _keep_verdict(file, str(error))
        raise
    if exported is not None:
        _keep(file, exported)
    if timed:
        _keep_verdict(file, None)
    return Engine(name, run)


_Run = Callable[..., Mapping[Any, Tensor]]


def _checked_run(teacher: Teacher, images: np.ndarray, file: Path) -> tuple[_Run, bytes | None]:
    """Return a forward pass that agrees with torch's, and the exported model where it is new."""
    # The code of a teacher may have changed since its file was written.
    with contextlib.suppress(OSError, TeacherError):
        run = _session(teacher, file.read_bytes())
        _check(teacher, images, run)
        return run, None
    model = _export(teacher)
    run = _session(teacher, model)
    _check(teacher, images, run)
    return run, model


def _check(teacher: Teacher, images: np.ndarray, run: _Run) -> None:
    """Raise TeacherError unless rows agree with torch's and do not depend on their batch."""
    with third_party("it fails on the probe images", TeacherError):
        expected, found = teacher.run(torch.from_numpy(images)), run(torch.from_numpy(images))
        # Earlier versions computed whole batches, and stores hold their rows.
        others = [run(torch.from_numpy(images), COUNT), run(torch.from_numpy(images[: COUNT // 2]))]
    for output in teacher.asked:
        apart = Difference.of(
            *(rows[output].float().flatten(1).numpy() for rows in (expected, found))
        )
        if not apart.within(ALIKE["fp32"]):
            raise TeacherError(
                f"its {output} of the probe images are off by up to {apart.largest:.2g} deviations"
            )
        if not all(
            torch.equal(rows[output], found[output][: len(rows[output])]) for rows in others
        ):
            raise TeacherError(f"its {output} depend on the size of the batch")


class _Exported(nn.Module):
    """A teacher's forward pass, from images uint8 [B, h, w, 3] to a tuple of its outputs."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.module = teacher.module
        self._teacher = (teacher,)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (teacher,) = self._teacher
        given = teacher.run(images)
        return tuple(given[output].float() for output in teacher.asked)


def _export(teacher: Teacher) -> bytes:
    """Return the teacher as ONNX, with a free batch size.

    Raises:
        TeacherError: It cannot be exported.
    """
    example = torch.zeros(2, *teacher.input_shape, 3, dtype=torch.uint8)
    began = time.monotonic()
    with third_party("it cannot be exported", TeacherError), _quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Exported(teacher).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=list(teacher.asked),
            verbose=False,
        )
        if program is None:
            raise TeacherError("it cannot be exported")
        model = program.model_proto.SerializeToString()
    log.info(
        f"teacher {teacher.name!r}: exported in {time.monotonic() - began:.0f} s, kept for the next time"
    )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter prints and warns from the screen; errors are raised anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _session(teacher: Teacher, model: bytes) -> _Run:
    """Open a model; each call runs on the calling thread alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with third_party("it cannot open the exported model", TeacherError):
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = teacher.asked

    def run(batch: Tensor, at_once: int = AT_ONCE) -> Mapping[Any, Tensor]:
        found = [
            session.run(list(outputs), {"images": images.numpy()})
            for images in batch.split(at_once)
        ]
        return {
            output: torch.from_numpy(np.concatenate(rows))
            for output, rows in zip(outputs, zip(*found, strict=True), strict=True)
        }

    return run


def _seconds(run: Callable[[], object]) -> float:
    """Return the least processor time of a call on this thread, with torch's own threads off."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            run()
            times = []
            for _ in range(ROUNDS):
                began = time.thread_time()
                run()
                times.append(time.thread_time() - began)
        return min(times)
    finally:
        torch.set_num_threads(before)


def _file(teacher: Teacher, name: str) -> Path:
    """Return where the exported teacher is kept: by all that determines it but its code."""
    made_of = {
        "form": FORM,
        "teacher": [teacher.identity(output=output) for output in teacher.asked if output != MAP],
        "map": MAP in teacher.asked,
        "torch": torch.__version__,
        "engine": name,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "onnx" / f"{digest[:32]}.onnx"


def _read_verdict(file: Path) -> dict[str, Any] | None:
    """Return `{"reason": why not, or null}` of an earlier run, None without one of this speed."""
    try:
        verdict = json.loads(file.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(verdict, dict) or verdict.get("at_once") != AT_ONCE:
        return None
    return verdict if "reason" in verdict else None


def _keep_verdict(file: Path, reason: str | None) -> None:
    _keep(file.with_suffix(".json"), json.dumps({"reason": reason, "at_once": AT_ONCE}).encode())


def _keep(file: Path, content: bytes) -> None:
    """Write a file of the cache; one that cannot be written costs the next run some time only."""
    try:
        write_whole(file, content)
    except DistInitError as error:
        log.warning(in_one_line(error))
