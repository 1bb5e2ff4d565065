"""Options of `distinit demo`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..pipeline.common.settings import CliOption, Options


class DemoConfig(Options):
    """All options of `distinit demo`.

    `extract`, `train` and `finetune` are merged over the sections of preset `demo`.
    """

    out: Annotated[Path, CliOption(group="Output", metavar="DIR")] = Field(
        default=Path("demo-out"), description="the folder of store, runs and report"
    )
    extract: dict[str, Any] = {}
    train: dict[str, Any] = {}
    finetune: dict[str, Any] = {}
