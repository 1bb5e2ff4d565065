"""Options of `distinit ablate`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ..common.settings import (
    MAX_HOURS,
    MAX_HOURS_HELP,
    VIDEO_ROOTS,
    VIDEO_ROOTS_HELP,
    CliOption,
    ClusterOptions,
)
from ..common.urls import StoreAddress


class AblateConfig(ClusterOptions):
    """All options of `distinit ablate`; missing ones are taken from the plan."""

    plan: Annotated[str, CliOption("PLAN")] = Field(
        description="a YAML file, or the name of a plan that ships with the package"
    )
    store: Annotated[StoreAddress, CliOption("--store", metavar="STORE")] = Field(
        description="the target store of extract-targets: a folder or a URL"
    )
    out: Annotated[str, CliOption(group="Output", metavar="DIR")] = Field(
        description="the folder of all runs, created or continued"
    )
    datasets: Annotated[
        list[str] | None, CliOption("--dataset", metavar="KIND[:PATH][=ROOT]", shown="the plan's")
    ] = Field(
        default=None,
        description="data set as for `finetune --dataset`; after = its --root; repeatable",
    )
    splits: Annotated[list[int] | None, CliOption("--split", metavar="N", shown="the plan's")] = (
        Field(default=None, description="which split; repeatable")
    )
    seeds: Annotated[list[int] | None, CliOption("--seed", "Training", "N", shown="the plan's")] = (
        Field(default=None, description="seed of every random draw; repeatable")
    )
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default_factory=dict, description=VIDEO_ROOTS_HELP
    )
    base: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="sections that are merged over the base of the plan"
    )
    max_hours: Annotated[float | None, MAX_HOURS] = Field(
        default=None, gt=0, description=MAX_HOURS_HELP + "; for all cells together, on one device"
    )
    dry_run: Annotated[bool, CliOption(group="Output")] = Field(
        default=False,
        description="list the cells, the finished runs and the hours left; run nothing",
    )
