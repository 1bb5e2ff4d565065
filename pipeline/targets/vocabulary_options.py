"""Options of `distinit targets vocabulary`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ..common.settings import CliOption, Options


class VocabularyOptions(Options):
    """Options of `distinit targets vocabulary`."""

    classes: Annotated[str, CliOption("CLASSES", metavar="FILE")] = Field(
        description="a text file with the name of a class per line"
    )
    out: Annotated[str, CliOption(group="Output", metavar="FILE")] = Field(
        description="the head to write, NAME.safetensors"
    )
    teacher: Annotated[str, CliOption(group="Teacher", metavar="NAME")] = Field(
        description="open_clip:ARCH@WEIGHTS, the teacher whose features are in the store"
    )
    weights: Annotated[str | None, CliOption("--teacher-weights", "Teacher", "FILE")] = Field(
        default=None, description="its weights, a safetensors file"
    )
    prompts: Annotated[list[str], CliOption("--prompt", "Inputs", "TEXT")] = Field(
        default=["a photo of {}."],
        min_length=1,
        description="a text in which {} is the class; the embeddings of several are averaged; "
        "repeatable",
    )

    @model_validator(mode="after")
    def _check(self) -> VocabularyOptions:
        for text in self.prompts:
            if text.count("{}") != 1:
                raise ValueError(f"prompts: expected {{}} once, for the class, got {text!r}")
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out: expected NAME.safetensors, got {self.out!r}")
        return self
