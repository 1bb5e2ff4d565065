"""Make a prepared copy: small, quick to seek, with a map to the frames of its source.

This package's reader decodes the frames, and they are piped into the encoder one by one. Copy frame
k is therefore the k-th frame that the reader returned. The map records this order; it does not rely
on a comparison of timestamps afterwards.
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


RecordSource = Callable[[], SourceRecord]
"""Returns the record of the source, once the source has been read to its end."""
MapType = TypeVar("MapType", FrameMap, FlowMap)


def make_copy(
    source: str,
    part: str,
    target: str,
    options: CopyOptions,
    progress: Callable[[], None] | None = None,
) -> FrameMap:
    """Write the copy of `source` to `part` and rename it to `target`, on the same disk.

    Before the renaming, the packets, the map and `quality_frames` frames of the copy are read back.
    The map stores the PSNR and SSIM of these frames against the scaled frames of the source.

    Returns:
        The map.

    Raises:
        VideoError: With the reason; `target` is then unchanged.
    """

    def write(reader: VideoReader, record_source: RecordSource) -> FrameMap:
        encoded = _encode(reader, part, options)
        copy = _read_back(part, encoded, record_source(), options)
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
        lambda reader, record_source: write_flow(reader, part, options, record_source),
        progress,
    )


def _make(
    source: str,
    part: str,
    target: str,
    write: Callable[[VideoReader, RecordSource], MapType],
    progress: Callable[[], None] | None,
) -> MapType:
    """Let `write` make a file from a reader and the record of the source, whole or not at all."""
    try:
        initial_status = _stat(source)
        identity = digest(source)
        with (
            replacing(Path(target), Path(part)),
            VideoReader(source, progress=progress) as reader,
        ):

            def record_source() -> SourceRecord:
                """Return the record of the source, if the file did not change."""
                final_status = _stat(source)
                if (initial_status.st_size, initial_status.st_mtime_ns) != (
                    final_status.st_size,
                    final_status.st_mtime_ns,
                ):
                    raise VideoError("the file changed while it was copied")
                timeline = reader.timeline()
                return SourceRecord(
                    digest=identity,
                    size=initial_status.st_size,
                    mtime_ns=initial_status.st_mtime_ns,
                    frames=len(timeline),
                    width=reader.info.width,
                    height=reader.info.height,
                    time_base=timeline.time_base,
                    clock=timeline.clock,
                    note=reader.truncated,
                )

            result = write(reader, record_source)
    except OSError as error:
        raise VideoError(f"{NOT_WRITTEN}: {reason(error)}") from error
    return result


def _stat(source: str) -> os.stat_result:
    try:
        return os.stat(source)
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error


class _EncodedFrames:
    """The frames passed to the encoder: index and pts of each, and the sampled pictures."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.index: list[int] = []
        self.pts: list[int] = []
        self.sample: dict[int, np.ndarray] = {}


def _encode(reader: VideoReader, part: str, options: CopyOptions) -> _EncodedFrames:
    timeline, info = reader.timeline(), reader.info
    display = (info.height, info.width)
    encoded = _EncodedFrames(options.picture(*display))
    view, renderer = View(resize=encoded.size), info.renderer()
    # Seeded with the number of frames, so that a copy made again samples the same frames.
    chosen = np.random.default_rng(len(timeline)).choice(len(timeline), options.quality_frames)
    sampled = set(chosen.tolist())

    def frames() -> Iterator[np.ndarray]:
        picture: np.ndarray | None = None
        for index, pts, frame in reader.decode_plain():
            picture = renderer.render(frame, view, display=display)
            del frame  # see VideoReader
            if index in sampled:
                encoded.sample[len(encoded.index)] = picture
            encoded.index.append(index)
            encoded.pts.append(pts)
            yield _pad_to_even(picture)
        if picture is None:
            raise VideoError(f"none of its frames could be decoded: {reader.damage}")
        # All chosen frames are damaged: sample the last one that was decoded.
        if not encoded.sample:
            encoded.sample[len(encoded.index) - 1] = picture

    # With this aspect ratio of a pixel, players show the shape of the source.
    aspect = Fraction(
        info.width * encoded.size[0], info.height * encoded.size[1]
    ).limit_denominator(1000)
    filters = f"scale=out_color_matrix=bt601:out_range=tv,setsar={max(aspect, Fraction(1, 1000))}"
    write_video(
        part,
        frames(),
        fps=_frame_rate(timeline),
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
    return encoded


def _pad_to_even(picture: np.ndarray) -> np.ndarray:
    """Repeat the last row or column of [h, w, 3] if their number is odd, for 4:2:0."""
    padding = [side % 2 for side in picture.shape[:2]]
    return (
        np.pad(picture, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="edge")
        if any(padding)
        else picture
    )


def _frame_rate(timeline: Timeline) -> float:
    """Return the frame rate for players: the source's average, within sensible limits."""
    span = float((int(timeline.pts[-1]) - int(timeline.pts[0])) * timeline.time_base)
    rate = (len(timeline) - 1) / span if span > 0 else 25.0
    return min(1000.0, max(0.1, rate)) if math.isfinite(rate) else 25.0


def _read_back(
    part: str, encoded: _EncodedFrames, record: SourceRecord, options: CopyOptions
) -> FrameMap:
    """Return the map, with the positions and checksums of the packets in the file."""
    offset, key, crc, codec, extradata = _packets(part)
    if len(crc) != len(encoded.index) or not key[0]:
        raise VideoError(f"the encoder wrote {len(crc)} of {len(encoded.index)} frames")
    copy = FrameMap(
        source=record,
        index=np.array(encoded.index, np.int64),
        pts=np.array(encoded.pts, np.int64),
        offset=offset,
        key=key,
        crc=crc,
        width=encoded.size[1],
        height=encoded.size[0],
        codec=codec,
        extradata=extradata,
        options=options.model_dump(mode="json"),
    )
    return replace(copy, quality=_quality(part, copy, encoded.sample))


def _packets(part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, bytes]:
    """Read the packets: offset int64 [N + 1], key bool [N], crc uint32 [N], codec, extradata.

    Raises:
        VideoError: The packets are not contiguous, or their pts do not ascend.
    """
    offset, last_pts = [0], -1
    key: list[bool] = []
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
            if packet.pos != offset[-1] or packet.pts is None or packet.pts <= last_pts:
                raise VideoError(
                    f"the encoder's packet {len(crc)} does not follow the one before it"
                )
            last_pts = packet.pts
            offset.append(packet.pos + packet.size)
            key.append(packet.is_keyframe)
            crc.append(zlib.crc32(bytes(packet)))
    if not crc:
        raise VideoError("the encoder wrote no frame")
    return (
        np.array(offset, np.int64),
        np.array(key, bool),
        np.array(crc, np.uint32),
        codec,
        extradata,
    )


def _quality(part: str, copy: FrameMap, sample: dict[int, np.ndarray]) -> dict[str, float]:
    """Return mean PSNR (dB) and SSIM of the sampled frames, read as a loader reads them."""
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

    message: A dictionary with "source", "part", "target", "flow" and "options".
    """
    source, part, target = message["source"], message["part"], message["target"]
    result: FrameMap | FlowMap
    if message["flow"]:
        result = make_flow(
            source, part, target, FlowOptions.model_validate(message["options"]), progress
        )
    else:
        result = make_copy(
            source, part, target, CopyOptions.model_validate(message["options"]), progress
        )
    return copy_row(result, os.stat(target).st_size)


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
