"""Options of `distinit demo` and `distinit report`. This module does not import torch."""

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
        default=Path("demo-out"), description="folder for the store, the runs and the report"
    )
    extract: dict[str, Any] = {}
    train: dict[str, Any] = {}
    finetune: dict[str, Any] = {}


class ReportConfig(Options):
    """All options of `distinit report`."""

    folders: Annotated[list[str], CliOption("DIR")] = Field(
        min_length=1, description="run folders, folders of runs, or folders of distinit ablate"
    )
    out: Annotated[str, CliOption(group="Output", metavar="DIR")] = Field(
        description="folder for report.html, report.md, CSV files and figures/"
    )
    kinetics: Annotated[str | None, CliOption(metavar="FILE")] = Field(
        default=None,
        description="weights of R(2+1)D whose first filters are shown next to a student's",
    )
    features: Annotated[list[str], CliOption(metavar="FILE", repeated=True)] = Field(
        default=[],
        max_length=4,
        description="features of training videos by distinit embed (.h5), for Figure 5; repeatable",
    )
    pair: Annotated[tuple[str, str] | None, CliOption(metavar="A B", shown="the largest gain")] = (
        Field(
            default=None,
            description="names of two runs or rows of an ablation that Figures 5 and 7 compare",
        )
    )
    open_urls: Annotated[bool, CliOption()] = Field(
        default=False, description="also read stores at URLs that are recorded in the runs"
    )
    examples: Annotated[int, CliOption(metavar="N")] = Field(
        default=8,
        ge=0,
        le=100,
        description="number of wrong test videos to show per run; 0 opens no video",
    )
    root: Annotated[str | None, CliOption(metavar="DIR", shown="that of the test")] = Field(
        default=None, description="folder that the paths of test videos are relative to now"
    )
