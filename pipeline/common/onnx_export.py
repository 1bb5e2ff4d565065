"""Export a torch module to ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def export_onnx(
    module: nn.Module, example: Tensor, *, input_name: str, output_names: Sequence[str]
) -> bytes:
    """Return a module as the content of an ONNX file with a free batch size.

    Args:
        module: Takes one tensor [B, ...] and returns a tuple of tensors; in evaluation mode.
        example: Inputs [B, ...] with B > 1, for which the module is traced.
        input_name: The name of the input in the graph.
        output_names: The names of the outputs in the graph.

    Raises:
        Exception: Whatever the exporter raises; RuntimeError if it returns no graph.
    """
    # Imported on the first call, since torch takes seconds to import.
    import torch

    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[input_name],
        output_names=list(output_names),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("the exporter returned no graph")
    content: bytes = program.model_proto.SerializeToString()
    return content
