"""Make a prepared copy: small, quick to seek, with a map to the frames of its source.

The frames come from this package's own reader and go down a pipe into the encoder one by one, so
that copy frame k is the k-th frame that the reader gave: the map is a record of what was done, not
a comparison of timestamps afterwards.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..common.errors import VideoError
from ..common.files import replacing
from ..common.sealed import sha256_of
from ..video.container import digest, open_container, reason, video_stream
from ..video.decoder import VideoReader
from ..video.encode import write_video
from ..video.geometry import View
from ..video.packets import Timeline
from .copies import decode_copy
from .flow_files import FlowMap, write_flow
from .frame_map import FrameMap, SourceRecord
from .prepare_options import CopyOptions, FlowOptions
from .quality import psnr, ssim

NOT_WRITTEN = "the copy cannot be written"
_COLOURS = {
    "colorspace": "smpte170m",
    "color_range": "tv",
    "color_primaries": "smpte170m",
    "color_trc": "smpte170m",
}


Record = Callable[[], SourceRecord]
M = TypeVar("M", FrameMap, FlowMap)


def make_copy(
    source: str,
    part: str,
    target: str,
    options: CopyOptions,
    progress: Callable[[], None] | None = None,
) -> FrameMap:
    """Write the copy of `source` to `part` and rename it to `target`, on the same disk.

    The copy is read back before that: its packets, its map, and `quality_frames` frames whose PSNR
    and SSIM against the scaled frames of the source are put into the map.

    Returns:
        The map.

    Raises:
        VideoError: With the reason; `target` is then what it was.
    """

    def write(reader: VideoReader, record: Record) -> FrameMap:
        made = _encode(reader, part, options)
        copy = _read_back(part, made, record(), options)
        copy = replace(copy, sha256=sha256_of(part))
        with open(part, "ab") as file:
            file.write(copy.pack())
        return copy

    return _make(source, part, target, write, progress)


def make_flow(
    source: str,
    part: str,
    target: str,
    options: FlowOptions,
    progress: Callable[[], None] | None = None,
) -> FlowMap:
    """Write the optical flow of `source` as `make_copy` writes its copy; see `flow_files`."""
    return _make(
        source,
        part,
        target,
        lambda reader, record: write_flow(reader, part, options, record),
        progress,
    )


def _make(
    source: str,
    part: str,
    target: str,
    write: Callable[[VideoReader, Record], M],
    progress: Callable[[], None] | None,
) -> M:
    """Let `write` make a file from a reader and a record of the source, whole or not at all."""
    try:
        before = _stat(source)
        identity = digest(source)
        with (
            replacing(Path(target), Path(part)),
            VideoReader(source, progress=progress) as reader,
        ):

            def record() -> SourceRecord:
                """Asked for when the video has been read."""
                after = _stat(source)
                if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                    raise VideoError("the file changed while it was copied")
                timeline = reader.timeline()
                return SourceRecord(
                    digest=identity,
                    size=before.st_size,
                    mtime_ns=before.st_mtime_ns,
                    frames=len(timeline),
                    width=reader.info.width,
                    height=reader.info.height,
                    time_base=timeline.time_base,
                    clock=timeline.clock,
                    note=reader.truncated,
                )

            made = write(reader, record)
    except OSError as error:
        raise VideoError(f"{NOT_WRITTEN}: {reason(error)}") from error
    return made


def _stat(source: str) -> os.stat_result:
    try:
        return os.stat(source)
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error


class _Made:
    """What the encoder received: index and pts of each frame, and the sampled pictures."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.index: list[int] = []
        self.pts: list[int] = []
        self.sample: dict[int, np.ndarray] = {}


def _encode(reader: VideoReader, part: str, options: CopyOptions) -> _Made:
    timeline, info = reader.timeline(), reader.info
    display = (info.height, info.width)
    made = _Made(options.picture(*display))
    view, renderer = View(resize=made.size), info.renderer()
    # Seeded by the number of frames: the same frames whenever and wherever the copy is made again.
    chosen = np.random.default_rng(len(timeline)).choice(len(timeline), options.quality_frames)
    sampled = set(chosen.tolist())

    def frames() -> Iterator[np.ndarray]:
        picture: np.ndarray | None = None
        for index, pts, frame in reader.decode_plain():
            picture = renderer.render(frame, view, display=display)
            del frame  # see VideoReader
            if index in sampled:
                made.sample[len(made.index)] = picture
            made.index.append(index)
            made.pts.append(pts)
            yield _even(picture)
        if picture is None:
            raise VideoError(f"none of its frames could be decoded: {reader.damage}")
        if not made.sample:  # those chosen are damaged
            made.sample[len(made.index) - 1] = picture

    # Players shall show the shape of the source.
    shape = Fraction(info.width * made.size[0], info.height * made.size[1]).limit_denominator(1000)
    filters = f"scale=out_color_matrix=bt601:out_range=tv,setsar={max(shape, Fraction(1, 1000))}"
    write_video(
        part,
        frames(),
        fps=_rate(timeline),
        gop=options.gop,
        bframes=0,
        crf=options.crf,
        extra={
            "vf": filters,
            "f": "mp4",
            "fps_mode": "passthrough",
            "tune": "fastdecode",
            "fflags": "+bitexact",
            "map_metadata": -1,
            **_COLOURS,
        },
    )
    return made


def _even(picture: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of [h, w, 3] if their number is odd, for 4:2:0."""
    more = [side % 2 for side in picture.shape[:2]]
    return (
        np.pad(picture, ((0, more[0]), (0, more[1]), (0, 0)), mode="edge") if any(more) else picture
    )


def _rate(timeline: Timeline) -> float:
    """Return the frame rate for players: the source's average, within sensible limits."""
    span = float((int(timeline.pts[-1]) - int(timeline.pts[0])) * timeline.time_base)
    rate = (len(timeline) - 1) / span if span > 0 else 25.0
    return min(1000.0, max(0.1, rate)) if math.isfinite(rate) else 25.0


def _read_back(part: str, made: _Made, record: SourceRecord, options: CopyOptions) -> FrameMap:
    """Return the map, with positions and checksums of the packets as they are in the file."""
    offset, keys, crc, codec, extradata = _packets(part)
    if len(crc) != len(made.index) or not keys[0]:
        raise VideoError(f"the encoder made {len(crc)} frames of {len(made.index)}")
    copy = FrameMap(
        source=record,
        index=np.array(made.index, np.int64),
        pts=np.array(made.pts, np.int64),
        offset=offset,
        key=keys,
        crc=crc,
        width=made.size[1],
        height=made.size[0],
        codec=codec,
        extradata=extradata,
        options=options.model_dump(mode="json"),
    )
    return replace(copy, quality=_quality(part, copy, made.sample))


def _packets(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, bytes]:
    """Read the packets: offset int64 [N + 1], key bool [N], crc uint32 [N], codec, extradata.

    The packets must follow each other.
    """
    offset, last = [0], -1
    keys: list[bool] = []
    crc: list[int] = []
    with open_container(part) as container:
        stream = video_stream(container)
        codec, extradata = (
            stream.codec_context.codec.canonical_name,
            bytes(stream.codec_context.extradata or b""),
        )
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if not crc:
                offset[0] = packet.pos or 0
            if packet.pos != offset[-1] or packet.pts is None or packet.pts <= last:
                raise VideoError(
                    f"the encoder's packet {len(crc)} does not follow the one before it"
                )
            last = packet.pts
            offset.append(packet.pos + packet.size)
            keys.append(packet.is_keyframe)
            crc.append(zlib.crc32(bytes(packet)))
    if not crc:
        raise VideoError("the encoder made no frame")
    return (
        np.array(offset, np.int64),
        np.array(keys, bool),
        np.array(crc, np.uint32),
        codec,
        extradata,
    )


def _quality(part: str, copy: FrameMap, sample: dict[int, np.ndarray]) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of the sampled frames, read as a loader reads them."""
    positions = np.array(sorted(sample), np.int64)
    size = (copy.height, copy.width)
    picture = np.empty((*size, 3), np.uint8)
    values: list[tuple[float, float]] = []
    descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for position, (frame, decoder) in zip(
            positions.tolist(), decode_copy(descriptor, copy, positions), strict=True
        ):
            decoder.render(frame, copy, None, size, picture)
            values.append((psnr(picture, sample[position]), ssim(picture, sample[position])))
    finally:
        os.close(descriptor)
    means = np.mean(values, axis=0)
    return {
        "psnr": round(float(means[0]), 3),
        "ssim": round(float(means[1]), 5),
        "frames": len(values),
    }


def copy_job(message: dict[str, Any], progress: Callable[[], None]) -> dict[str, Any]:
    """Run one job of a decode worker and return its row.

    message: {"source", "part", "target", "flow", "options"}.
    """
    source, part, target = message["source"], message["part"], message["target"]
    made: FrameMap | FlowMap
    if message["flow"]:
        made = make_flow(
            source, part, target, FlowOptions.model_validate(message["options"]), progress
        )
    else:
        made = make_copy(
            source, part, target, CopyOptions.model_validate(message["options"]), progress
        )
    return copy_row(made, os.stat(target).st_size)


def copy_row(copy: FrameMap | FlowMap, size: int) -> dict[str, Any]:
    """Return the row of the report for a copy or flow file."""
    source = copy.source
    row = {
        "frames": len(copy),
        "seconds": round(source.seconds(copy.pts), 3),
        "source_bytes": source.size,
        "source_mtime_ns": source.mtime_ns,
        "copy_bytes": size,
        "note": source.note,
    }
    if isinstance(copy, FlowMap):
        return row | {
            "width": copy.size[1],
            "height": copy.size[0],
            "clipped": f"{copy.clipped:.6f}",
        }
    quality = {name: copy.quality.get(name) for name in ("psnr", "ssim")}
    return row | {"width": copy.width, "height": copy.height} | quality
