"""Probe a file cheaply: sizes and bounds for planning, or the reason why it cannot be used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ..common.errors import VideoError
from .bitstream import codes_frames_only
from .container import digest, file_size, is_mp4, rational, reason
from .decoder import VideoReader
from .feed import DECODE_ERRORS, NotAsPlanned
from .mp4 import QuickReader

DEMUX_BYTES = 2**26  # files up to this size are demuxed in full
_HEADROOM = 1.1
_SPARE = 64
_RATE_OFF = 0.1  # that the header's rate may differ from that of the frames, by share


@dataclass(frozen=True)
class Probe:
    """Bytes, identity, seconds, display size in pixels. `frames` and `keyframes` are upper bounds.

    `exact`: the packets were all read, and `frames` counts them (a damaged one may not decode).
    `error`: why the file cannot be used; the other fields then have their defaults where unknown.
    """

    size: int = 0
    digest: str = ""
    duration: float = math.nan
    frames: int = 0
    exact: bool = False
    keyframes: int = 0
    time_base: tuple[int, int] = (0, 1)
    width: int = 0
    height: int = 0
    codec: str = ""
    fps: float = math.nan
    error: str | None = None


def probe(path: str, progress: Callable[[], None] | None = None) -> Probe:
    """Look at one file. Never raises for a bad file: `error` is the reason."""
    size, identity = 0, ""
    try:
        size = file_size(path)
        identity = digest(path)
        if size <= DEMUX_BYTES and is_mp4(path):
            try:
                with _PacketReader(path, progress=progress) as reader:
                    return _measure(reader, size, identity)
            except (NotAsPlanned, VideoError, OSError):
                pass
        with VideoReader(path, progress=progress) as reader:
            return _measure(reader, size, identity)
    except (VideoError, MemoryError, FFmpegError) as error:
        return Probe(size=size, digest=identity, error=reason(error))


class _PacketReader(QuickReader):
    """The packets of an mp4 with H.264, for less than half of what opening it in full takes.

    Raises NotAsPlanned where the packets alone do not determine the frames.
    """

    def _plan(self) -> None:
        super()._plan()
        by_header, self._table, self._timeline = self.packets.pts, None, None
        context = self._context
        if context.codec.canonical_name != "h264" or not codes_frames_only(
            context.extradata or b""
        ):
            raise NotAsPlanned
        timeline = self.packets.timeline(self._time_base)
        if not timeline.reliable or not np.array_equal(self.packets.pts, by_header):
            raise NotAsPlanned
        self._timeline = timeline

    def _decode_all(self) -> Iterator[VideoFrame]:
        """Yield the first frame alone, which the decoder would hold back until later packets."""
        if not self.packets.cached_packets:
            raise NotAsPlanned
        self.start(read=False, feed=True)
        for packet in (self.packets.cached_packets[0], None):
            try:
                yield from self._context.decode(packet)
            except (MemoryError, *DECODE_ERRORS) as error:
                raise NotAsPlanned from error


def _measure(reader: VideoReader, size: int, identity: str) -> Probe:
    estimate = _estimate(reader.stream, reader.info.duration) if size > DEMUX_BYTES else None
    if estimate is not None:
        info = reader.info
        frames, keyframes = estimate
        base, duration, fps, exact = info.time_base, info.duration, info.fps, False
    else:
        timeline = reader.timeline()
        info = reader.info
        frames, keyframes, exact = len(timeline), int(timeline.key.sum()), True
        base = timeline.time_base
        duration = _seconds(int(timeline.pts[-1] - timeline.pts[0]), base, frames)
        # A header may claim anything: 600 frames per second for an AVI made of an mp4.
        measured = frames / duration if duration > 0 else info.fps
        fps = info.fps if abs(info.fps - measured) <= _RATE_OFF * measured else measured
    return Probe(
        size=size,
        digest=identity,
        duration=duration,
        frames=frames,
        exact=exact,
        keyframes=keyframes,
        time_base=(base.numerator, base.denominator),
        width=info.width,
        height=info.height,
        codec=info.codec,
        fps=fps,
    )


def _estimate(stream: VideoStream, duration: float) -> tuple[int, int] | None:
    """Return upper bounds of (frames, key frames) from the header.

    They come from the index if it is complete, else from rates. None if the header has neither:
    then only the whole file can tell.
    """
    entries = stream.index_entries
    if "mov" in stream.container.format.name and len(entries) >= stream.frames > 0:
        return len(entries), sum(entry.is_keyframe for entry in entries)
    rates = [
        float(r)
        for r in map(rational, (stream.average_rate, stream.base_rate, stream.guessed_rate))
        if r
    ]
    if not math.isfinite(duration) and stream.frames == 0:
        return None
    by_rate = duration * max(rates, default=60.0) if math.isfinite(duration) else 0.0
    frames = int(max(by_rate, stream.frames) * _HEADROOM) + _SPARE
    return frames, frames


def _seconds(span: int, time_base: Fraction, frames: int) -> float:
    """Return seconds from the first frame to the end of the last.

    The last one is taken to last as long as the others.
    """
    return float(span * time_base) * (frames / (frames - 1) if frames > 1 else 1.0)
