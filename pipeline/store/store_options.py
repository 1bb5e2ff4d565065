"""Options of the commands `distinit targets …`. This module does not import torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from ..common.errors import UsageError
from ..common.settings import (
    DEVICE,
    DEVICE_HELP,
    VIDEO_ROOTS,
    VIDEO_ROOTS_HELP,
    CliOption,
    Options,
    parse_pairs,
)
from ..common.urls import StoreAddress, public_url

Output = Literal["logits", "features"]
"""Output of a teacher for an image: one logit per class, or a feature vector."""
PlainEncoding = Literal["float16", "int8"]
"""Encodings in which extraction can store a teacher's rows."""
Encoding = str
"""Encoding of rows in a store: a PlainEncoding, or `pca:D` for features (see `pca_components`)."""
SEED = CliOption(metavar="S")


class InfoConfig(Options):
    """Options of `distinit targets info`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    list_failed: Annotated[bool, CliOption("--failed", "Output")] = Field(
        default=False, description="list the failed videos with their reasons"
    )


class BrowseConfig(Options):
    """Options of `distinit targets browse`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    out: Annotated[str, CliOption(group="Output", metavar="DIR")] = Field(
        description="the folder for browse.html"
    )
    sample: Annotated[int, CliOption(metavar="N")] = Field(
        default=12, ge=0, description="videos shown as strips of frames"
    )
    seed: Annotated[int, SEED] = Field(default=0, description="seed of the choice of these videos")
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )


class HashConfig(Options):
    """Options of `distinit targets hash`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder")
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )
    decoders: Annotated[
        int | None, CliOption(group="Hardware", metavar="N", shown="one per core")
    ] = Field(default=None, ge=1, description="decoding processes")


class VerifyConfig(Options):
    """Options of `distinit targets verify`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder")
    repair: Annotated[bool, CliOption(group="Output")] = Field(
        default=False,
        description="drop damaged shards, so that extract-targets (for hashes: targets hash) fills them again",
    )
    frames: Annotated[bool, CliOption()] = Field(
        default=False,
        description="compare the frames of all videos with their files; no teacher is run",
    )
    deep: Annotated[int, CliOption(metavar="N")] = Field(
        default=0, ge=0, description="decode N random videos again and run the teachers"
    )
    seed: Annotated[int, SEED] = Field(default=0, description="seed of the choice of these videos")
    video_roots: Annotated[dict[str, str], VIDEO_ROOTS] = Field(
        default={}, description=VIDEO_ROOTS_HELP
    )
    weights: Annotated[
        dict[str, str], CliOption("--teacher-weights", "Teacher", "NAME=FILE", parse=parse_pairs)
    ] = Field(
        default={},
        description="where the weights of a teacher of the store are located now; repeatable",
    )
    allow_teachers: Annotated[list[str], CliOption("--allow-teacher", "Teacher", "TEACHER")] = (
        Field(
            default=[],
            description="with --deep, run the code of package.module:factory or download the weights "
            "of a model that the store names; repeatable",
        )
    )
    device: Annotated[str, DEVICE] = Field(default="auto", description=DEVICE_HELP)

    @model_validator(mode="after")
    def _check_options(self) -> VerifyConfig:
        teachers = self.weights or self.allow_teachers
        if (self.video_roots and not (self.deep or self.frames)) or (teachers and not self.deep):
            raise UsageError(
                "--videos requires --frames or --deep N; --teacher-weights and --allow-teacher "
                "require --deep N"
            )
        return self


class MergeConfig(Options):
    """Options of `distinit targets merge`."""

    parts: Annotated[list[Annotated[str, PlainSerializer(public_url)]], CliOption("PART")] = Field(
        min_length=1, repr=False, description="finished stores of the same teachers and sampling"
    )
    out: Annotated[str, CliOption(group="Output", metavar="STORE")] = Field(
        description="the store to create or continue"
    )
    allow_different_numerics: Annotated[bool, CliOption(group="Hardware")] = Field(
        default=False,
        description="merge parts with different batch size, precision, torch or device kind",
    )


def pca_components(encoding: object) -> int:
    """Return D of the encoding `pca:D`, 0 for any other encoding."""
    match = re.fullmatch(r"pca:([1-9][0-9]{0,5})", encoding) if isinstance(encoding, str) else None
    return int(match[1]) if match else 0


def _check_encoding(value: str | None) -> str | None:
    """Return a valid encoding or None; UsageError for any other value."""
    plain = get_args(PlainEncoding)
    if value is None or value in plain or pca_components(value):
        return value
    raise UsageError(f"--encoding {value}: expected {', '.join(plain)} or pca:D (D components)")


class ExportConfig(Options):
    """Options of `distinit targets export`."""

    store: Annotated[StoreAddress, CliOption("STORE")] = Field(description="a folder or a URL")
    out: Annotated[str, CliOption(group="Output", metavar="OUT")] = Field(
        description="NAME.h5: one HDF5 file; NAME.zarr: a store"
    )
    teachers: Annotated[list[str], CliOption("--teacher", "Teacher", "NAME")] = Field(
        default=[], description="only this teacher; repeatable"
    )
    corpora: Annotated[list[str], CliOption("--corpus", metavar="NAME")] = Field(
        default=[], description="only this corpus; repeatable"
    )
    videos_from: Annotated[str | None, CliOption(metavar="LIST")] = Field(
        default=None,
        description="only the videos of a text file: one path in its corpus, CORPUS=PATH or absolute "
        "path per line",
    )
    encoding: Annotated[
        str | None,
        AfterValidator(_check_encoding),
        CliOption(group="Output", metavar="ENCODING", shown="as they are stored"),
    ] = Field(
        default=None,
        description="encoding of the rows of a new store: float16, int8, or pca:D, which stores D "
        "components of features in D + 8 bytes",
    )
    shard_rows: Annotated[
        int | None,
        CliOption(group="Output", metavar="R", shown="depending on the size, 512 to 16384"),
    ] = Field(default=None, description="rows per shard of a new store")


class VocabularyConfig(Options):
    """Options of `distinit targets vocabulary`."""

    classes: Annotated[str, CliOption("CLASSES", metavar="FILE")] = Field(
        description="a text file with one class name per line"
    )
    out: Annotated[str, CliOption(group="Output", metavar="FILE")] = Field(
        description="the head to write, NAME.safetensors"
    )
    teacher: Annotated[str, CliOption(group="Teacher", metavar="NAME")] = Field(
        description="open_clip:ARCH@WEIGHTS, the teacher whose features are in the store"
    )
    weights: Annotated[str | None, CliOption("--teacher-weights", "Teacher", "FILE")] = Field(
        default=None, description="weights of the teacher, a safetensors file"
    )
    prompts: Annotated[list[str], CliOption("--prompt", "Inputs", "TEXT")] = Field(
        default=["a photo of {}."],
        min_length=1,
        description="a text in which {} is replaced by the class; the embeddings of several are averaged; "
        "repeatable",
    )

    @model_validator(mode="after")
    def _check_values(self) -> VocabularyConfig:
        for text in self.prompts:
            if text.count("{}") != 1:
                raise ValueError(f"prompts: expected {{}} once, for the class, got {text!r}")
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out: expected NAME.safetensors, got {self.out!r}")
        return self
