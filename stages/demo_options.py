"""What `distinit demo` can be told. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..pipeline.common.settings import CliOption, Options


class DemoConfig(Options):
    """`extract`, `train` and `finetune` are laid over the sections of preset `demo`."""

    out: Annotated[Path, CliOption(group="Output", metavar="DIR")] = Field(
        default=Path("demo-out"), description="the folder of store, runs and report"
    )
    extract: dict[str, Any] = {}
    train: dict[str, Any] = {}
    finetune: dict[str, Any] = {}
