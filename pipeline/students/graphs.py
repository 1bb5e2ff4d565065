"""Export students as graphs that run without distinit: ONNX, torch.export and TorchScript.

A graph takes decoded clips, uint8 [B, 3, T, H, W] in RGB or float32 [B, 2, T, H, W] of optical flow
in pixels, and normalises them itself. It returns features [B, D], then the outputs [B, K] of each
head. B may vary; T, H and W are those of the student's training.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..clips.clip_options import NORMALIZATION
from ..clips.transforms import normalize_clip
from ..common.errors import CheckpointError, third_party
from ..common.onnx_export import export_onnx
from ..common.plugins import import_extra
from .student import Student

CLIPS, FEATURES = "clips", "features"
# Numbers of clips to export with and to check with. They differ, so that the check detects a fixed
# batch size.
EXAMPLES, PROBES = 2, 3


class Graph(nn.Module):
    """A student with its normalisation: from decoded clips to a tuple of outputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.names = tuple(student.classes)
        mean, std = NORMALIZATION[student.options.channels]
        scale = 255.0 if student.options.channels == 3 else 1.0
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1, 1) * scale)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1, 1) * scale)

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        """Return features [B, D] and the outputs [B, K] of each head."""
        features = self.student.features((clips.float() - self.mean) / self.std)
        return (features, *(self.student.head(name)(features) for name in self.names))


def output_names(student: Student) -> list[str]:
    """Return the names of a graph's outputs; a head named `features` or `clips` gets a prefix."""
    return [FEATURES, *(f"head.{n}" if n in (CLIPS, FEATURES) else n for n in student.classes)]


def probe_clips(student: Student, count: int) -> Tensor:
    """Return random clips [count, C, T, H, W] of a fixed seed."""
    shape = (
        count,
        student.options.channels,
        student.meta.clip_length,
        *2 * [student.meta.clip_size],
    )
    generator = torch.Generator().manual_seed(0)
    if student.options.channels == 3:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator)


def make_graph(student: Student, form: str) -> bytes:
    """Return the content of the exported file.

    Args:
        student: The student, in evaluation mode and on the CPU.
        form: One of onnx, torch-export and torchscript.

    Raises:
        UsageError: A package of the extra `onnx` is missing.
        CheckpointError: The student cannot be exported to this form.
    """
    if form == "onnx":
        require_onnx()
    graph, clips = Graph(student).eval(), probe_clips(student, EXAMPLES)
    with third_party(f"--to {form}: {student.options.describe()}", CheckpointError), _quiet():
        return _MAKERS[form](graph, clips)


def require_onnx() -> Any:
    """Return the module onnxruntime.

    Raises:
        UsageError: A package of the extra `onnx` is missing.
    """
    for module in ("onnx", "onnxscript"):
        import_extra(module, "onnx", "--to onnx")
    return import_extra("onnxruntime", "onnx", "--to onnx")


def _exported(graph: Graph, clips: Tensor) -> Any:
    batch = torch.export.Dim("batch")
    return torch.export.export(graph, (clips,), dynamic_shapes=({0: batch},))


def _onnx(graph: Graph, clips: Tensor) -> bytes:
    return export_onnx(graph, clips, input_name=CLIPS, output_names=output_names(graph.student))


def _torch_export(graph: Graph, clips: Tensor) -> bytes:
    data = io.BytesIO()
    torch.export.save(_exported(graph, clips), data)
    return data.getvalue()


def _torchscript(graph: Graph, clips: Tensor) -> bytes:
    data = io.BytesIO()
    torch.jit.save(torch.jit.trace(graph, clips), data)
    return data.getvalue()


_MAKERS: dict[str, Callable[[Graph, Tensor], bytes]] = {
    "onnx": _onnx,
    "torch-export": _torch_export,
    "torchscript": _torchscript,
}


def run_graph(content: bytes, form: str, clips: Tensor) -> list[np.ndarray]:
    """Run the content of a file of `make_graph` on clips, and return its outputs.

    Loading a file of torch.export or TorchScript may run code in it, so load only trusted files.
    """
    with third_party(f"--to {form}: the exported file does not run", CheckpointError), _quiet():
        if form == "onnx":
            session = require_onnx().InferenceSession(content, providers=["CPUExecutionProvider"])
            outputs: list[np.ndarray] = session.run(None, {CLIPS: clips.numpy()})
            return outputs
        data = io.BytesIO(content)
        module = (
            torch.export.load(data).module() if form == "torch-export" else torch.jit.load(data)
        )
        with torch.inference_mode():
            return [output.numpy() for output in module(clips)]


@torch.inference_mode()
def student_outputs(student: Student, clips: Tensor) -> list[np.ndarray]:
    """Return the outputs of the student itself, which a graph must reproduce."""
    features = student.features(normalize_clip(clips, torch.float32))
    heads = [student.head(name)(features) for name in student.classes]
    return [output.numpy() for output in (features, *heads)]


def largest_difference(
    outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float
) -> float:
    """Return the largest absolute difference between outputs of a graph and of the student.

    Raises:
        CheckpointError: The shapes differ, or the difference exceeds tolerance times the largest
            output.
    """
    shapes, expected_shapes = (
        [list(each.shape) for each in arrays] for arrays in (outputs, expected)
    )
    if shapes != expected_shapes:
        raise CheckpointError(
            f"the exported file has outputs {shapes}, the student has {expected_shapes}"
        )
    difference = max(float(np.abs(a - b).max()) for a, b in zip(outputs, expected, strict=True))
    largest = max(float(np.abs(each).max()) for each in expected)
    # The negated comparison is also true for NaN.
    if not difference <= tolerance * largest:
        raise CheckpointError(
            f"the outputs of the exported file differ by up to {difference:.2g} from the student's, which are up to "
            f"{largest:.2g}; accepted: tolerance={tolerance:g} of that"
        )
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the deprecation warning of TorchScript and warnings about traced modules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
