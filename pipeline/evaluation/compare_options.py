"""Options of `distinit targets compare`. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..common.settings import VIDEO_ROOTS, VIDEO_ROOTS_HELP, CliOption, Options
from ..common.urls import StoreAddress


class CompareConfig(Options):
    """Options of `distinit targets compare`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    out: Annotated[str | None, CliOption(group="Output", metavar="DIR")] = Field(
        default=None, description="the folder for compare.html, a page with pictures"
    )
    teachers: Annotated[
        tuple[str, ...] | None, CliOption("--teacher", "Teacher", "NAME", shown="all")
    ] = Field(default=None, description="compare this teacher of the store; repeatable")
    videos: Annotated[int, CliOption("--disputed", "Output", "N")] = Field(
        default=10, ge=0, description="videos listed on which the teachers disagree most"
    )
    sample: Annotated[int, CliOption(group="Sampling", metavar="N")] = Field(
        default=5000, ge=3, description="most cached frames used"
    )
    seed: Annotated[int, CliOption(group="Sampling", metavar="S")] = Field(
        default=0, ge=0, description="seed of the sample"
    )
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )
