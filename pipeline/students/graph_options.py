"""Options of `distinit export`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..common.settings import CliOption, Options

ExportForm = Literal["onnx", "torch-export", "torchscript", "hub"]
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt"}


class GraphConfig(Options):
    """All options of `distinit export`."""

    model: Annotated[str, CliOption("MODEL")] = Field(
        description="a run folder or a safetensors file of train-student or finetune"
    )
    to: Annotated[ExportForm, CliOption(group="Output")] = Field(description="what to write")
    out: Annotated[str, CliOption(group="Output", metavar="PATH")] = Field(
        description="the file to write (.onnx, .pt2, .pt), or the folder of hub"
    )
    tolerance: float = Field(
        default=1e-3,
        gt=0,
        description="largest difference from the student that is accepted, in units of the largest "
        "output",
    )
    factory: str | None = Field(
        default=None, description="package.module:factory that the model's file may run"
    )
