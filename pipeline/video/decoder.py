"""Decode exact frames of one video, with as little decoding as possible.

A plain linear decode of the whole file is the reference. Two shortcuts give the same frames faster.
Only groups of pictures with requested frames are decoded, each up to its last requested packet, and
non-reference pictures that are not requested are skipped. The reader falls back to the plain decode
if anything looks wrong: a missing frame, an error, a damaged picture, or a skipped picture whose
number does not confirm that no other picture refers to it.

The shortcuts do not notice all damage. If a skipped picture is damaged but its number is intact, a
plain decode marks the picture, or drops one whose damaged order count is wrong. Damage in groups
that are not decoded is not noticed either: after it an AV1 decoder may give no frames, while a
shortcut that begins later gives them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from ..common.errors import VideoError
from .bitstream import FROM_START, INTRA_ONLY, ONE_FRAME_PER_PACKET, NonReferencePictures
from .container import Margins, cropping, open_container, rational, reason, video_stream
from .feed import (
    DECODE_ERRORS,
    MAX_EARLY_FRAMES,
    Feed,
    HeldFrames,
    NotAsPlanned,
    packet_ranges,
    sort_rows,
)
from .geometry import Orientation, Renderer, display_size, inner_size, pixel_aspect
from .packets import PROGRESSIVE, PacketTable, Timeline, read_packets
from .sampling import Sampling

OTHER_ORDER = "its timestamps do not match its frames: the decoder shows them in another order"
Rows = Iterator[tuple[int, int, av.VideoFrame]]  # (index, pts, frame)


@dataclass(frozen=True)
class VideoIndex:
    """Packets and timeline of a file, so that a further reader need not read the whole file again.

    from_header: Read by `mp4.read_header`; only `mp4.QuickReader` may use it.
    """

    packets: PacketTable
    timeline: Timeline
    from_header: bool = False

    def __len__(self) -> int:
        return len(self.packets.pts)


@dataclass(frozen=True)
class VideoInfo:
    """Size on display (in square pixels, cropping and rotation applied), codec, timing."""

    width: int
    height: int
    orientation: Orientation
    pixel_aspect: Fraction
    margins: Margins
    codec: str
    time_base: Fraction
    duration: float
    fps: float

    def renderer(self) -> Renderer:
        """Return a renderer for the frames of this video.

        In PyAV 18, a frame whose side data is read stays alive for a while, which affects the MPEG
        decoders (see `VideoReader`). All their frames are therefore oriented like the first one.
        """
        return Renderer(
            self.pixel_aspect, self.margins, self.orientation if self.codec in FROM_START else None
        )


@dataclass
class _Count:
    """Counts of a plain decode: frames, corrupt frames among them, and packets that failed."""

    frames: int = 0
    corrupt: int = 0
    failed: int = 0
    last_failed: bool = False


class VideoReader:
    """One open video. `progress` is called for each packet and frame, as a sign of life.

    Raises VideoError, with the reason, if no frame can be decoded.
    """

    _header_only = False

    def __init__(
        self,
        path: str,
        *,
        index: VideoIndex | None = None,
        progress: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        # Counts of the last plain decode, and of the last one that reached the end of the file.
        self._count = _Count()
        self._final_count: _Count | None = None
        # The decoder's error for the first packet that failed.
        self.damage = "damaged data"
        self._progress = progress or (lambda: None)
        self._table = index.packets if index is not None else None
        self._timeline = index.timeline if index is not None else None
        self._info: VideoInfo | None = None
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _open(self) -> None:
        self._container = open_container(self.path, header_only=self._header_only)
        try:
            self._stream = video_stream(self._container)
        except BaseException:
            self._container.close()
            raise
        self._context = self._stream.codec_context
        # Later packets may change the ratio of the stream.
        self._opened_aspect = rational(self._stream.sample_aspect_ratio)
        # Whether packets have been read from the container, and passed to the decoder.
        self._container_used, self._decoder_used = False, False

    def start(self, *, read: bool, feed: bool) -> None:
        """Open the file again (2 ms) if the container to read or the decoder to feed was used."""
        if (read and self._container_used) or (feed and self._decoder_used):
            self._container.close()
            self._open()
        self._container_used = self._container_used or read
        self._decoder_used = self._decoder_used or feed

    # Metadata of the video

    @property
    def packets(self) -> PacketTable:
        """The packets of the stream, demuxed once."""
        if self._table is None:
            self.start(read=True, feed=False)
            self._table = read_packets(self._container, self._stream, self._progress)
            # Libavformat sets `enc_key_id` for a track of Matroska or WebM with ContentEncryption.
            if self._table.encrypted or "enc_key_id" in self._stream.metadata:
                raise VideoError("encrypted")
        return self._table

    @property
    def info(self) -> VideoInfo:
        """Size, codec and timing, from the header and the first decodable frame."""
        if self._info is not None:
            return self._info
        frames = self._decode_all() if self._table is not None else self._decode_head()
        frame = next(frames, None)
        if frame is None:
            raise VideoError(self._no_frame_reason())
        return self._set_info(frame)

    def _set_info(self, frame: av.VideoFrame) -> VideoInfo:
        if self._info is None:
            self._info = self._describe(frame)
        return self._info

    def _describe(self, frame: av.VideoFrame) -> VideoInfo:
        stream = self._stream
        aspect = pixel_aspect(self._aspect())
        orientation = Orientation.from_frame(frame)
        margins = cropping(stream)
        width, height = display_size(*inner_size(frame, margins), aspect, orientation)
        duration = math.nan
        base = rational(stream.time_base)
        if stream.duration is not None and base is not None:
            duration = float(stream.duration * base)
        elif self._container.duration is not None:
            duration = self._container.duration / av.time_base
        return VideoInfo(
            width=width,
            height=height,
            orientation=orientation,
            pixel_aspect=aspect,
            margins=margins,
            codec=self._context.codec.canonical_name,
            time_base=self._time_base,
            duration=duration,
            fps=float(self._rate or math.nan),
        )

    def _aspect(self) -> Fraction | None:
        return self._opened_aspect

    @property
    def container(self) -> InputContainer:
        """The open file."""
        return self._container

    @property
    def stream(self) -> VideoStream:
        """The open stream with its decoder; `start` may replace it."""
        return self._stream

    @property
    def _time_base(self) -> Fraction:
        return rational(self._stream.time_base) or Fraction(1, 1000)

    @property
    def _rate(self) -> Fraction | None:
        """Frames per second according to the header."""
        return rational(self._stream.average_rate) or rational(self._stream.guessed_rate)

    def timeline(self) -> Timeline:
        """Return all frames in order, from the packets if these can be trusted.

        Otherwise the whole file is decoded.
        """
        if self._timeline is None:
            timeline = self.packets.timeline(self._time_base)
            if not timeline.reliable:
                timeline = self._timeline_by_decoding()
            elif len(timeline) == 0:
                raise VideoError(self._no_frame_reason())
            self._timeline = timeline
        return self._timeline

    def _timeline_by_decoding(self) -> Timeline:
        pts: list[int | None] = []
        key: list[bool] = []
        for frame in self._decode_all():
            pts.append(frame.pts)
            key.append(bool(frame.key_frame))
        if not pts:
            raise VideoError(self._no_frame_reason())
        if all(p is not None for p in pts):
            times = np.array(pts, np.int64)
            if np.all(np.diff(times) > 0):
                return Timeline(times, np.array(key), self._time_base, reliable=False)
        counted = np.arange(len(pts), dtype=np.int64)
        return Timeline(
            counted, np.array(key), self._tick(len(pts)), reliable=False, clock="counted"
        )

    def _tick(self, frames: int) -> Fraction:
        """Return the seconds from one frame to the next of a file with a counted clock.

        They come from the times of the packets, and from the rate in the header only if the packets
        have no times: an AVI made from an mp4 claims 600 frames per second.
        """
        packets = self.packets
        # A frame of two fields has two packets, and an AVI has packets that repeat a frame.
        packets_per_frame = (
            Fraction(1)
            if self._one_frame_per_packet
            else Fraction(int(packets.shown.sum()), frames)
        )
        seconds = (packets.step * self._time_base * packets_per_frame).limit_denominator(1_000_000)
        return seconds if seconds > 0 else 1 / (self._rate or Fraction(25))

    def _no_frame_reason(self) -> str:
        """Return the reason why no frame could be decoded."""
        packets = self.packets
        if len(packets.pts) == 0:
            promised = self._stream.frames
            if packets.error is not None:
                return f"no frame could be read: {packets.error}"
            if promised > 0:
                return f"the header promises {promised} frames, the file holds none (cut off)"
            return "a header without any frame"
        if not packets.shown.any():
            return "all frames are marked as not to be shown"
        if len(packets.pts) == 1:
            return f"its one frame could not be decoded: {self.damage}"
        return f"none of its {len(packets.pts)} frames could be decoded: {self.damage}"

    # The plain decode: the reference

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        """Yield every frame in the order of a fresh decoder; count damage and continue."""
        table = self.packets
        cached_packets = table.cached_packets
        self.start(read=cached_packets is None, feed=True)
        source = iter(cached_packets) if cached_packets is not None else self.demux_remaining()
        count = self._count = _Count()
        intra = self._context.codec.canonical_name in INTRA_ONLY
        for packet in itertools.chain(source, [None]):
            self._progress()
            try:
                frames = self._context.decode(packet)
            except MemoryError as error:
                raise VideoError(reason(error)) from error
            except DECODE_ERRORS as error:
                # Some decoders report damage as PermissionError.
                if not (count.failed or isinstance(error, PermissionError)):
                    self.damage = reason(error)
                count.failed, count.last_failed = count.failed + 1, True
                continue
            count.last_failed = count.last_failed and not frames
            for frame in frames:
                count.corrupt += frame.is_corrupt
                # Such a frame shows what any earlier picture left in the buffer.
                if frame.is_corrupt and intra:
                    continue
                count.frames += 1
                self._set_info(frame)
                yield frame
                # How a decoder conceals damage may depend on the free buffers. Therefore neither
                # the reader nor its caller holds a frame while the next one is decoded.
                del frame
            frames.clear()
        self._final_count = count

    @property
    def truncated(self) -> str | None:
        """A description of the damage in the decoded packets; None without damage."""
        table, count = self._table, self._final_count or self._count
        if table is None or not count.frames:
            return None
        if self._final_count and (table.error or (count.last_failed and count.failed == 1)):
            return f"truncated after {count.frames} frames: {table.error or self.damage}"
        if count.failed:
            return f"{count.failed} of {len(table.pts)} packets could not be decoded: {self.damage}"
        shown = int(table.shown.sum())
        if (
            self._final_count
            and self._one_frame_per_packet
            and count.frames < shown - count.corrupt
        ):
            return f"{shown - count.frames} of {shown} frames never came out of the decoder"
        return f"{count.corrupt} of {shown} frames are damaged" if count.corrupt else None

    @property
    def _one_frame_per_packet(self) -> bool:
        """Return whether each shown packet of an undamaged file gives one frame.

        This is false for fields and for MPEG-4 in AVI.
        """
        name = self._context.codec.canonical_name
        return name in ONE_FRAME_PER_PACKET and self._context.field_order in PROGRESSIVE

    def _decode_head(self) -> Iterator[av.VideoFrame]:
        """Decode the first frames, without reading the whole file."""
        self.start(read=True, feed=True)
        for packet in itertools.chain(self.demux_remaining(), [None]):
            self._progress()
            try:
                yield from self._context.decode(packet)
            except DECODE_ERRORS:
                continue

    def demux_remaining(self) -> Iterator[av.Packet]:
        """Yield packets from the container's current position up to its end or an error."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, MemoryError):
                return
            if packet is None:
                return
            if packet.size:
                yield packet

    def _plain_rows(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (index, frame) of every frame in the order of the decoder."""
        timeline = self.timeline()
        if not timeline.reliable:
            # Not enumerate, which would hold the last frame.
            count = itertools.count()
            for frame in self._decode_all():
                yield next(count), frame
                del frame
            return
        # Damage must not shift the count: the index of a frame is the rank of its pts.
        rank = {int(p): i for i, p in enumerate(timeline.pts)}
        latest = -1
        for frame in self._decode_all():
            index = rank.pop(frame.pts, None) if frame.pts is not None else None
            if index is None:
                del frame
                continue
            if index < latest and not (self._count.failed or self._count.corrupt):
                raise VideoError(OTHER_ORDER)
            latest = max(latest, index)
            yield index, frame
            del frame

    def decode_plain(self) -> Rows:
        """Yield (index, pts, frame) of every frame that decodes, by one linear decode."""
        pts = self.timeline().pts
        for index, frame in sort_rows(self._plain_rows(), None):
            yield index, int(pts[index]), frame
            del frame

    # The shortcuts

    def frames_at(self, indices: np.ndarray) -> Rows:
        """Yield (index, pts, frame) for int64 [N] ascending, distinct `indices`.

        The frames equal those of the plain decode. Frames that even the plain decode does not give
        are left out.
        """
        timeline = self.timeline()
        requested = np.asarray(indices, np.int64)
        valid = len(requested) == 0 or (requested[0] >= 0 and requested[-1] < len(timeline))
        if not valid or np.any(np.diff(requested) <= 0):
            raise VideoError(
                f"frames {requested[0]} … {requested[-1]} wanted, the video has {len(timeline)}"
            )
        num_yielded = 0
        shortcut = self.shortcut(requested) if timeline.reliable else iter(())
        planned = timeline.reliable
        while planned and num_yielded < len(requested):
            try:
                index, frame = next(shortcut)
            except NotAsPlanned:
                planned = False
            else:
                num_yielded += 1
                yield index, int(timeline.pts[index]), frame
        for index, frame in sort_rows(self._plain_rows(), requested[num_yielded:]):
            yield index, int(timeline.pts[index]), frame
            del frame

    def shortcut(self, requested: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (index, frame) for all `requested` in order, or raise NotAsPlanned."""
        table = self.packets
        rank = {int(table.pts[table.order[i]]): int(i) for i in requested}
        queue = [int(i) for i in requested[::-1]]
        early: dict[int, av.VideoFrame] = {}
        for frame in self._decode_ranges(requested):
            index = rank.pop(frame.pts, None) if frame.pts is not None else None
            if index is not None:
                self._set_info(frame)
                early[index] = frame
            while queue and queue[-1] in early:
                index = queue.pop()
                yield index, early.pop(index)
            if len(early) > MAX_EARLY_FRAMES:
                raise NotAsPlanned
        if queue:
            raise NotAsPlanned

    def _decode_ranges(self, requested: np.ndarray) -> Iterator[av.VideoFrame]:
        """Yield the frames that come out of the ranges of packets with those `requested`."""
        table, context = self.packets, self._context
        needed = set(table.order[requested].tolist())
        codec = context.codec.canonical_name
        numbers = NonReferencePictures(context.extradata) if codec == "h264" else None
        # The pictures of the FROM_START decoders depend on the free buffers, so no frame is held
        # back.
        marks_damage = codec not in FROM_START
        feed = Feed(self)
        for start, stop in packet_ranges(table, requested):
            feed.begin(start)
            # The feed may have opened the file again, with another decoder.
            context = self._context
            first_pts = latest = table.pts[start]
            skipping: bool | None = None
            held = HeldFrames()
            if numbers is not None:
                numbers.begin()
            for position in range(start, stop + 2):
                self._progress()
                packet = feed.packet(position) if position <= stop else None
                if numbers is not None and packet is not None:
                    skip = numbers.may_leave_out(memoryview(packet), wanted=position in needed)
                    if skip is None:
                        raise NotAsPlanned
                    if skip is not skipping:
                        skipping = skip
                        context.skip_frame = "NONREF" if skip else "DEFAULT"
                if packet is not None and marks_damage and not skipping and table.shown[position]:
                    held.add_packet(int(table.pts[position]))
                for frame in feed.decode(packet):
                    if frame.pts is None:
                        raise NotAsPlanned
                    position_of_frame = table.position_of.get(frame.pts)
                    if position_of_frame is None or not table.shown[position_of_frame]:
                        raise NotAsPlanned
                    # A leading picture whose reference pictures were not decoded.
                    if frame.pts < first_pts:
                        continue
                    # The frame is damaged, or shown in another order than the pts say.
                    if frame.is_corrupt or frame.pts < latest:
                        raise NotAsPlanned
                    latest = frame.pts
                    yield from held.add_frame(frame, wanted=position_of_frame in needed)
            yield from held.flush()

    def sample(self, sampling: Sampling) -> Rows:
        """Yield (index, pts, frame) of the sampled frames, in one pass."""
        timeline = self.timeline()
        chosen = sampling.select(timeline.pts, timeline.key, timeline.time_base)
        yield from self.frames_at(chosen)
