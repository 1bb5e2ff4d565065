"""Options of `distinit prepare`, and what copies and flow files are like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ..common.settings import CliOption, DecodingOptions, Options, parse_size

LONGEST_SIDE = 8192  # of a copy
Side = Annotated[int, Field(ge=16, le=4096)]


class CopyOptions(Options):
    """How copies are encoded.

    The defaults were the quickest to read per byte (docs/benchmarks.md): H.264 without B-frames,
    CABAC and deblocking filter, at the size that clips of 112 pixels are cropped from, so that
    reading them needs no resize.

    size: (height, width), whatever the source's shape; or short_side: pixels, the shape is kept and
    smaller sources keep their size. gop: most frames between key frames. crf: x264's quality, lower
    is better and larger. quality_frames: frames per video that are read back and compared.
    """

    size: Annotated[
        tuple[Side, Side] | None,
        CliOption(
            group="Output",
            metavar="HxW",
            shown="128x171, for clips of 112",
            parse=parse_size,
            repeated=False,
            replaces=("short_side",),
        ),
    ] = Field(
        default=(128, 171),
        description="size of copies: what clips are resized to, before the crop",
    )
    short_side: Annotated[
        Side | None, CliOption(group="Output", metavar="PX", replaces=("size",))
    ] = Field(
        default=None,
        description="keep the shape instead, with this short side, at most the source's",
    )
    gop: Annotated[int, CliOption(group="Output", metavar="N")] = Field(
        default=12, ge=1, le=1000, description="most frames between key frames"
    )
    crf: Annotated[int, CliOption(group="Output", metavar="Q")] = Field(
        default=20, ge=0, le=51, description="x264's quality: lower is better, larger"
    )
    quality_frames: int = Field(default=2, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _short_side_alone(cls, data: object) -> object:
        """Let a short side replace the default size."""
        if isinstance(data, dict) and data.get("short_side") is not None and "size" not in data:
            return {**data, "size": None}
        return data

    @model_validator(mode="after")
    def _one_of(self) -> CopyOptions:
        if (self.size is None) == (self.short_side is None):
            raise ValueError("give size (height and width) or short_side, one of the two")
        return self

    def picture(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the copy of a picture of that size; even with a short side."""
        if self.size is not None:
            return self.size
        short = self.short_side or 1
        scale = min(1.0, short / min(height, width), LONGEST_SIDE / max(height, width))
        rows, columns = (max(2, 2 * round(side * scale / 2)) for side in (height, width))
        return rows, columns


class FlowOptions(Options):
    """How flow files are written.

    size: (height, width) that frames are resized to. bound: pixels; faster motion is stored as
    this, and the step between stored values is bound / 127. On the videos that were measured, a
    bound of 16 at 128x171 cuts off fewer than 0.1 % of the values.
    """

    size: tuple[int, int] = (128, 171)
    bound: float = Field(default=16.0, gt=0)


class PrepareConfig(DecodingOptions):
    """Options of `distinit prepare`."""

    sources: Annotated[list[str], CliOption("SOURCE")] = Field(min_length=1)
    out: Annotated[Path, CliOption(group="Output", metavar="DIR")] = Field(
        description="the folder of copies: made, or continued"
    )
    copies: Annotated[CopyOptions, CliOption()] = CopyOptions()
    flow: Annotated[bool, CliOption(group="Output")] = Field(
        False,
        description="optical flow of frames of --size in place of copies, for students of flow",
    )
    flow_bound: Annotated[float, CliOption(group="Output", metavar="PX")] = Field(
        16.0, gt=0, description="faster motion is stored as this"
    )
    workers: Annotated[
        int | None, CliOption(group="Hardware", metavar="N", shown="one per core")
    ] = Field(None, ge=1, description="processes, each with an encoder")
    replace: Annotated[bool, CliOption(group="Output")] = Field(
        False, description="make copies again that were made with other options"
    )
