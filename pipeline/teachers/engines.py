"""Choose the engine that runs a teacher's forward pass: torch, compiled torch or ONNX Runtime.

Another engine changes only the last bits of the outputs. It is therefore part of the numerics of a
store, and not of the identity of the teacher.

ONNX Runtime runs on a CPU. It is used if its outputs of the probe images agree with torch's, and if
the rows do not depend, to the bit, on the size of their batch and the other images in it. The
exported model is cached in the user's cache folder, under a digest of all that determines it. If
ONNX Runtime is not used, the reason is cached too.
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
from ..common.onnx_export import export_onnx
from ..store.cache import cache_folder
from .fingerprint import NUM_PROBES, SAME_MACHINE, Difference
from .loaded_model import MAP
from .probes import probe_images
from .teacher import Engine, Teacher
from .teacher_options import EngineName

TORCH = "torch"
COMPILED = "torch.compile"
ONNX = "onnxruntime"
EXPORT_VERSION = 1
"""Version of the exported files; it changes with the way of export."""
CHEAP_S = 0.004
"""Core seconds per image below which decoding costs more than the teacher."""
MIN_SPEEDUP = 1.1
"""Smallest ratio of the rates of ONNX Runtime and torch for which a new store uses the former."""
NUM_TIMED = 3
"""Number of timed calls."""
AT_ONCE = 4
"""Images per call. The outputs of a layer for more images exceed the cache of a core."""

log = logging.getLogger(__name__)


def use_engine(
    teacher: Teacher, engine: EngineName, recorded: str | None = None, *, batch_size: int = 0
) -> str:
    """Set the engine of a teacher; return the name that the numerics record.

    Args:
        teacher: The teacher, on its device and in its precision.
        engine: The engine that the user chose. `auto` is the recorded engine; without one it is
            ONNX Runtime if that is faster, else torch.
        recorded: The recorded name of the engine that computed the store's rows.
        batch_size: Compile for batches of this size; 0 compiles for the first batch.

    Raises:
        TeacherError: This version does not have the recorded engine, or the chosen engine cannot
            run the teacher.
    """
    teacher.engine = None
    who = f"teacher {teacher.name!r}"
    chosen = engine
    if engine == "auto" and recorded is not None:
        chosen = _recorded_engine(teacher, recorded)
    if chosen == "compile":
        # All batches are padded to one size, so that code for other sizes is not required.
        teacher.engine = Engine(COMPILED, torch.compile(teacher.run, dynamic=False))
        with third_party(f"{who}: --engine compile: fails", TeacherError):
            teacher.compute(np.zeros((batch_size, *teacher.input_shape, 3), np.uint8))
    elif chosen == "onnx" or (chosen == "auto" and teacher.device.type == "cpu"):
        try:
            teacher.engine = onnx_engine(teacher, if_faster=chosen == "auto")
            log.info(f"{who}: runs in {teacher.engine.name}")
        except TeacherError as error:
            if engine == "onnx":
                raise TeacherError(f"{who}: --engine onnx: {error}") from error
            reason = str(error)[:300]
            log.info(f"{who}: runs in torch; ONNX Runtime is not used: {reason}")
    return TORCH if teacher.engine is None else teacher.engine.name


def _recorded_engine(teacher: Teacher, recorded: str) -> EngineName:
    """Return the option value of a recorded engine, whose name may end with a version."""
    engines: dict[str, EngineName] = {TORCH: "torch", COMPILED: "compile", ONNX: "onnx"}
    engine = engines.get(recorded.partition(" ")[0])
    if engine is None:
        raise TeacherError(
            f"teacher {teacher.name!r}: the store's rows were computed by the engine {recorded!r}, which this "
            f"version does not have; allowed: {', '.join(engines)}, or --engine with --allow-different-numerics"
        )
    return engine


def onnx_version() -> str:
    """Return the name and version of ONNX Runtime as the numerics record them.

    Raises:
        TeacherError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise TeacherError(f"{error.name or error} is not installed") from error
    return f"{ONNX} {onnxruntime.__version__}"


def onnx_engine(teacher: Teacher, *, if_faster: bool) -> Engine:
    """Return ONNX Runtime as the engine of a teacher.

    Args:
        teacher: The teacher, on its device and in its precision.
        if_faster: Whether to refuse a teacher that is cheap, or not faster than in torch.

    Raises:
        TeacherError: ONNX Runtime cannot run the teacher, or is refused; the message is the reason.
    """
    if teacher.device.type != "cpu":
        raise TeacherError(f"it runs on a CPU only, not on {teacher.device.type}")
    if teacher.precision != "fp32":
        raise TeacherError(f"it computes in fp32, not in {teacher.precision}")
    name = onnx_version()
    images = probe_images(*teacher.input_shape)
    file = _cached_file(teacher, name)
    verdict = _read_verdict(file)
    if if_faster and verdict is not None and verdict["reason"] is not None:
        raise TeacherError(str(verdict["reason"]))
    timed = if_faster and verdict is None
    torch_s = _seconds(lambda: teacher.run(torch.from_numpy(images))) if timed else 0.0
    if timed and torch_s < CHEAP_S * NUM_PROBES:
        raise TeacherError("the teacher costs less than decoding a frame")
    try:
        run, exported = _checked_run(teacher, images, file)
        if timed and torch_s < MIN_SPEEDUP * _seconds(lambda: run(torch.from_numpy(images))):
            raise TeacherError("it is not faster than torch with this teacher")
    except TeacherError as error:
        _write_verdict(file, str(error))
        raise
    if exported is not None:
        _write_cached(file, exported)
    if timed:
        _write_verdict(file, None)
    return Engine(name, run)


_Run = Callable[..., Mapping[Any, Tensor]]


def _checked_run(teacher: Teacher, images: np.ndarray, file: Path) -> tuple[_Run, bytes | None]:
    """Return a forward pass that agrees with torch's, and the exported model if it is new."""
    # The cached model is checked, since the code of the teacher may have changed.
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
        pixels = torch.from_numpy(images)
        expected, computed = teacher.run(pixels), run(pixels)
        # All images in one call as well: earlier versions computed whole batches, and stores hold
        # their rows.
        other_batches = [run(pixels, NUM_PROBES), run(pixels[: NUM_PROBES // 2])]
    for output in teacher.forward_outputs:
        difference = Difference.of(
            *(rows[output].float().flatten(1).numpy() for rows in (expected, computed))
        )
        if not difference.within(SAME_MACHINE["fp32"]):
            raise TeacherError(
                f"its {output} of the probe images are off by up to {difference.largest:.2g} deviations"
            )
        if not all(
            torch.equal(rows[output], computed[output][: len(rows[output])])
            for rows in other_batches
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
        outputs = teacher.run(images)
        return tuple(outputs[output].float() for output in teacher.forward_outputs)


def _export(teacher: Teacher) -> bytes:
    """Return the teacher as ONNX, with a free batch size.

    Raises:
        TeacherError: The teacher cannot be exported.
    """
    example = torch.zeros(2, *teacher.input_shape, 3, dtype=torch.uint8)
    start_s = time.monotonic()
    with third_party("it cannot be exported", TeacherError), _quiet(), torch.no_grad():
        model = export_onnx(
            _Exported(teacher).eval(),
            example,
            input_name="images",
            output_names=teacher.forward_outputs,
        )
    log.info(
        f"teacher {teacher.name!r}: exported in {time.monotonic() - start_s:.0f} s, cached for later runs"
    )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the output, warnings and log lines of the exporter; its errors are raised."""
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
    outputs = teacher.forward_outputs

    def run(batch: Tensor, at_once: int = AT_ONCE) -> Mapping[Any, Tensor]:
        parts = [
            session.run(list(outputs), {"images": images.numpy()})
            for images in batch.split(at_once)
        ]
        return {
            output: torch.from_numpy(np.concatenate(rows))
            for output, rows in zip(outputs, zip(*parts, strict=True), strict=True)
        }

    return run


def _seconds(run: Callable[[], object]) -> float:
    """Return the smallest processor time of a call, on this thread alone."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            run()
            times = []
            for _ in range(NUM_TIMED):
                start_s = time.thread_time()
                run()
                times.append(time.thread_time() - start_s)
        return min(times)
    finally:
        torch.set_num_threads(torch_threads)


def _cached_file(teacher: Teacher, name: str) -> Path:
    """Return the path of the exported teacher in the cache.

    Its name is a digest of all that determines the file, except the code of the teacher.
    """
    inputs = {
        "form": EXPORT_VERSION,
        "teacher": [
            teacher.identity(output=output) for output in teacher.forward_outputs if output != MAP
        ],
        "map": MAP in teacher.forward_outputs,
        "torch": torch.__version__,
        "engine": name,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "onnx" / f"{digest[:32]}.onnx"


def _read_verdict(file: Path) -> dict[str, Any] | None:
    """Return `{"reason": text or null}` of an earlier run with as many images per call, or None.

    The reason is why ONNX Runtime is not used, null if it is used.
    """
    try:
        verdict = json.loads(file.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(verdict, dict) or verdict.get("at_once") != AT_ONCE:
        return None
    return verdict if "reason" in verdict else None


def _write_verdict(file: Path, reason: str | None) -> None:
    content = json.dumps({"reason": reason, "at_once": AT_ONCE}).encode()
    _write_cached(file.with_suffix(".json"), content)


def _write_cached(file: Path, content: bytes) -> None:
    """Write a file of the cache; if that fails, only the next run takes longer."""
    try:
        write_whole(file, content)
    except DistInitError as error:
        log.warning(in_one_line(error))
