"""Options of `distinit prepare`, of copies and of flow files."""

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
    CABAC and deblocking filter. Clips of 112 pixels are cropped from pictures of this size, so that
    reading them needs no resize.

    size: (height, width), whatever the source's shape. short_side: Pixels, in place of a size; the
        shape is kept, and smaller sources keep their size. gop: Maximum number of frames between
        key frames. crf: x264's quality; lower values give better and larger copies.
        quality_frames: Frames per video that are read back and compared.
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
        description="size of copies: the size to which clips are resized before the crop",
    )
    short_side: Annotated[
        Side | None, CliOption(group="Output", metavar="PX", replaces=("size",))
    ] = Field(
        default=None,
        description="keep the source's shape instead, with this short side or the source's if smaller",
    )
    gop: Annotated[int, CliOption(group="Output", metavar="N")] = Field(
        default=12, ge=1, le=1000, description="maximum number of frames between key frames"
    )
    crf: Annotated[int, CliOption(group="Output", metavar="Q")] = Field(
        default=20, ge=0, le=51, description="x264's quality: lower gives better and larger copies"
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

    size: (height, width) to which frames are resized. bound: The largest stored motion in pixels;
        faster motion is clipped to it, and the step between stored values is bound / 127. On the
        measured videos, a bound of 16 at 128x171 clips fewer than 0.1 % of the values.
    """

    size: tuple[int, int] = (128, 171)
    bound: float = Field(default=16.0, gt=0)


class PrepareConfig(DecodingOptions):
    """Options of `distinit prepare`."""

    sources: Annotated[list[str], CliOption("SOURCE")] = Field(min_length=1)
    out: Annotated[Path, CliOption(group="Output", metavar="DIR")] = Field(
        description="folder of copies, created or continued"
    )
    copies: Annotated[CopyOptions, CliOption()] = CopyOptions()
    flow: Annotated[bool, CliOption(group="Output")] = Field(
        False,
        description="write optical flow of frames of --size instead of copies, for flow students",
    )
    flow_bound: Annotated[float, CliOption(group="Output", metavar="PX")] = Field(
        16.0, gt=0, description="largest stored motion: faster motion is clipped to it"
    )
    workers: Annotated[
        int | None, CliOption(group="Hardware", metavar="N", shown="one per core")
    ] = Field(None, ge=1, description="worker processes, each with an encoder")
    replace: Annotated[bool, CliOption(group="Output")] = Field(
        False, description="make existing copies again if they were made with other options"
    )
