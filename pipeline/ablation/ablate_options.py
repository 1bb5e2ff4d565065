"""What `distinit ablate` can be told. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ..common.settings import VIDEO_ROOTS, VIDEO_ROOTS_HELP, CliOption, Options
from ..common.urls import StoreAddress


class AblateConfig(Options):
    """Everything `distinit ablate` can be told; what is left open is the plan's."""

    plan: Annotated[str, CliOption("PLAN")] = Field(
        description="a YAML file, or the name of a plan that ships with the package"
    )
    store: Annotated[StoreAddress, CliOption("--store", metavar="STORE")] = Field(
        description="the target store of extract-targets: a folder or a URL"
    )
    out: Annotated[str, CliOption(group="Output", metavar="DIR")] = Field(
        description="the folder of all runs: made, or continued"
    )
    datasets: Annotated[
        list[str] | None, CliOption("--dataset", metavar="KIND[:PATH][=ROOT]", shown="the plan's")
    ] = Field(
        default=None,
        description="what to finetune on, as `finetune --dataset`; after = its --root; repeatable",
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
        default_factory=dict, description="sections laid over the plan's base"
    )
    workers: Annotated[int | None, CliOption(group="Hardware", metavar="N")] = Field(
        default=None, ge=1, description="N runs at the same time, with a GPU each where there are"
    )
    scheduler: Annotated[str | None, CliOption(group="Hardware", metavar="ADDRESS")] = Field(
        default=None, description="runs on an existing dask.distributed cluster"
    )
    dry_run: Annotated[bool, CliOption(group="Output")] = Field(
        default=False,
        description="list the cells, which are done, and the hours left; run nothing",
    )

    @model_validator(mode="after")
    def _one_cluster(self) -> AblateConfig:
        if self.workers is not None and self.scheduler is not None:
            raise ValueError(
                "give --workers (a local cluster) or --scheduler (an existing one), not both"
            )
        return self
