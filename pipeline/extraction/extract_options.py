"""Options of `distinit extract-targets`. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ..common.settings import (
    DEVICE,
    DEVICE_HELP,
    MAX_HOURS,
    MAX_HOURS_HELP,
    CliOption,
    ClusterOptions,
    DecodingOptions,
)
from ..store.store_options import PlainEncoding
from ..teachers.teacher_options import EngineName, TeacherSpec, parse_teachers
from ..video.sampling import Sampling

PROBED_AT_ONCE = 10_000
"""Number of videos that are probed between two writes of the video table."""
TEACHERS = CliOption(
    "--teacher",
    "Teacher",
    "NAME",
    parse=parse_teachers,
    parts=(
        (
            "--teacher-option",
            "[NAME:]KEY=VALUE",
            "input_size, resize, interpolation, resize_backend (swscale or pil), mean, std, classes (a "
            "file), name (in the store), or an argument of the teacher's builder; repeatable",
        ),
        (
            "--teacher-weights",
            "[NAME=]FILE",
            "a checkpoint file for a teacher (.safetensors, .pt, .pth), read weights-only; repeatable",
        ),
        (
            "--teacher-sha256",
            "[NAME=]HEX",
            "the expected SHA-256 of a teacher's weights file; repeatable",
        ),
        (
            "--teacher-output",
            "[NAME=]OUTPUT",
            "outputs of a teacher to store: logits (default), features or logits,features; repeatable",
        ),
        (
            "--views",
            "[NAME=]VIEWS",
            "center (default), center,flip (also the mirrored frame, for mirrored clips), grid:G or "
            "center,grid:G (GxG cells of features, averaged under a clip's crop); repeatable",
        ),
    ),
)


class ExtractConfig(ClusterOptions, DecodingOptions):
    """Options of `distinit extract-targets`."""

    sources: Annotated[list[str], CliOption("SOURCE")] = []
    out: Annotated[Path, CliOption(group="Output", metavar="STORE")] = Field(
        description="the target store, which is created or continued"
    )
    part: Annotated[str | None, CliOption(metavar="I/N")] = Field(
        None,
        description="only the I-th of N parts of the videos, for machines that share nothing; see "
        "`targets merge`",
    )
    teachers: Annotated[list[TeacherSpec], TEACHERS] = Field(
        min_length=1,
        description="efficientnet_lite0 (1, 2), resnet50, resnet50-places365, "
        "torchvision:NAME[@WEIGHTS], timm:NAME, open_clip:ARCH[@WEIGHTS], hf:ORG/NAME or "
        "package.module:factory; repeatable; videos are decoded once for all teachers",
    )
    sampling: Annotated[Sampling | None, CliOption()] = None
    batch_size: Annotated[int, CliOption(group="Hardware", metavar="B")] = Field(
        32, ge=1, description="frames per batch of a teacher"
    )
    device: Annotated[str, DEVICE] = Field("auto", description=DEVICE_HELP)
    precision: Annotated[Literal["auto", "fp32", "bf16"], CliOption(group="Hardware")] = Field(
        "fp32",
        description="precision of the teachers; auto is that of an existing store's teachers, else bf16 "
        "on a GPU that supports it and fp32 on other devices",
    )
    engine: Annotated[EngineName, CliOption(group="Hardware")] = Field(
        "auto",
        description="engine of the teachers: torch, torch with compilation (faster on a GPU, after a "
        "minute), or ONNX Runtime on a CPU; auto is the engine of the store's first rows, for a new "
        "teacher on a CPU ONNX Runtime if it agrees with torch and is faster, else torch",
    )
    decoders: Annotated[
        int | None, CliOption(group="Hardware", metavar="N", shown="depending on the machine")
    ] = Field(None, ge=1, description="decoding processes")
    shard_rows: Annotated[
        int | None,
        CliOption(group="Output", metavar="R", shown="depending on the size, 512 to 16384"),
    ] = Field(None, description="rows per shard, a multiple of 256")
    encoding: Annotated[PlainEncoding | None, CliOption(group="Output", shown="float16")] = Field(
        None, description="how a new teacher's outputs are stored; int8 halves the store"
    )
    allow_different_numerics: Annotated[bool, CliOption(group="Hardware")] = Field(
        False,
        description="continue with another batch size, precision, engine, torch or device kind",
    )
    accept_teachers: Annotated[list[str], CliOption("--accept-teacher", "Teacher", "NAME")] = Field(
        [],
        description="accept a teacher as that of a store of version 0.1 if no video is left to check it "
        "with; repeatable",
    )
    retries: Annotated[int, CliOption(group="Hardware", metavar="N")] = Field(
        2, ge=0, description="attempts at a failed shard after the first"
    )
    max_hours: Annotated[float | None, MAX_HOURS] = Field(None, gt=0, description=MAX_HOURS_HELP)
    dry_run: Annotated[bool, CliOption(group="Output")] = Field(
        False, description="show rows, GB and hours; write nothing"
    )

    @field_validator("part")
    @classmethod
    def _check_part(cls, part: str | None) -> str | None:
        from ..corpus.sources import Part

        return None if part is None else str(Part.parse(part))
