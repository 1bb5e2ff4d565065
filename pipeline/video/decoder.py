"""Exact frames of one video, with as little decoding as that allows.

A plain linear decode of the whole file is the truth. Two shortcuts give the same frames for less:
only those groups of pictures are decoded that hold wanted frames, each only up to the last wanted
packet, and in them the non-reference pictures nobody wants are left out. Whatever looks wrong on
the way (a frame that does not come out, an error, a damaged picture, a left out picture whose
number does not confirm that no other refers to it) makes the reader fall back to the plain decode.
Damage in a picture that is left out is not noticed if its number is intact: a plain decode marks
that picture, or drops one that its damaged order count puts in the wrong place. Nor is damage in
groups that are not decoded: a decoder of AV1 may give nothing after it, while a shortcut that
begins after it gives frames.
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
from .feed import DECODE_ERRORS, HOLD, Feed, NotAsPlanned, Waiting, ascending, packet_ranges
from .geometry import Orientation, Renderer, display_size, inner_size, pixel_aspect
from .packets import PROGRESSIVE, PacketTable, Timeline, read_packets
from .sampling import Sampling

OTHER_ORDER = "its times are not those of its frames, which the decoder shows in another order"
Rows = Iterator[tuple[int, int, av.VideoFrame]]  # (index, pts, frame)


@dataclass(frozen=True)
class VideoIndex:
    """What reading a whole file was needed for; a reader that is given it need not do so again.

    from_header: by `mp4.read_header`, for an `mp4.QuickReader` alone.
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
        """Return what renders the frames of this video.

        A frame whose side data is read stays alive for a while in PyAV 18, which matters to the
        decoders of MPEG (see `VideoReader`); their frames are turned by the container alone, the
        first one like all others.
        """
        return Renderer(
            self.pixel_aspect, self.margins, self.orientation if self.codec in FROM_START else None
        )


@dataclass
class _Count:
    """What came of a plain decode: frames, corrupt ones among them, packets that failed."""

    came: int = 0
    corrupt: int = 0
    failed: int = 0
    last_failed: bool = False


class VideoReader:
    """One open video. `progress` is called for every packet and frame touched (a sign of life).

    Raises VideoError, with a reason, when the file has no frame to give.
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
        self._count = _Count()  # of the plain decode that was begun last
        self._whole: _Count | None = None  # of one that went to the end of the file
        self.damage = "damaged data"  # the decoder's error for the first packet that failed
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
        # What comes later in the stream may change it.
        self._opened_aspect = rational(self._stream.sample_aspect_ratio)
        # Whether the container or the decoder is no longer fresh.
        self._read, self._fed = False, False

    def start(self, *, read: bool, feed: bool) -> None:
        """Make sure that what will be used is fresh: the container to read, the decoder to feed."""
        if (read and self._read) or (feed and self._fed):
            self._container.close()
            self._open()  # 2 ms
        self._read, self._fed = self._read or read, self._fed or feed

    # What the video is

    @property
    def packets(self) -> PacketTable:
        """The packets of the stream, demuxed once."""
        if self._table is None:
            self.start(read=True, feed=False)
            self._table = read_packets(self._container, self._stream, self._progress)
            # The second is what libavformat calls a track of Matroska or WebM with
            # ContentEncryption.
            if self._table.encrypted or "enc_key_id" in self._stream.metadata:
                raise VideoError("encrypted")
        return self._table

    @property
    def info(self) -> VideoInfo:
        """What is shown, from the header and the first frame that decodes."""
        if self._info is not None:
            return self._info
        frames = self._decode_all() if self._table is not None else self._decode_head()
        frame = next(frames, None)
        if frame is None:
            raise VideoError(self._why_nothing())
        return self._notice(frame)

    def _notice(self, frame: av.VideoFrame) -> VideoInfo:
        if self._info is None:
            self._info = self._describe(frame)
        return self._info

    def _describe(self, frame: av.VideoFrame) -> VideoInfo:
        stream = self._stream
        aspect = pixel_aspect(self._aspect())
        orientation = Orientation.of(frame)
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
        """The open stream and, in it, the decoder; another one after `start`."""
        return self._stream

    @property
    def _time_base(self) -> Fraction:
        return rational(self._stream.time_base) or Fraction(1, 1000)

    @property
    def _rate(self) -> Fraction | None:
        """Frames per second by the header."""
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
                raise VideoError(self._why_nothing())
            self._timeline = timeline
        return self._timeline

    def _timeline_by_decoding(self) -> Timeline:
        pts: list[int | None] = []
        key: list[bool] = []
        for frame in self._decode_all():
            pts.append(frame.pts)
            key.append(bool(frame.key_frame))
        if not pts:
            raise VideoError(self._why_nothing())
        if all(p is not None for p in pts):
            times = np.array(pts, np.int64)
            if np.all(np.diff(times) > 0):
                return Timeline(times, np.array(key), self._time_base, reliable=False)
        counted = np.arange(len(pts), dtype=np.int64)
        return Timeline(
            counted, np.array(key), self._tick(len(pts)), reliable=False, clock="counted"
        )

    def _tick(self, frames: int) -> Fraction:
        """Return seconds from one frame to the next where they are counted.

        They come from the packets' times. The header's rate is taken only if the packets have none:
        an AVI made from an mp4 claims 600 frames per second.
        """
        packets = self.packets
        # Fields come in two packets to a frame, and an AVI has packets that repeat a frame.
        each = (
            Fraction(1)
            if self._one_frame_per_packet
            else Fraction(int(packets.shown.sum()), frames)
        )
        seconds = (packets.step * self._time_base * each).limit_denominator(1_000_000)
        return seconds if seconds > 0 else 1 / (self._rate or Fraction(25))

    def _why_nothing(self) -> str:
        """Return the reason why no frame came out."""
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

    # The plain decode: the truth

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        """Yield every frame in the order of a fresh decoder; note damage and continue."""
        table = self.packets
        kept = table.kept
        self.start(read=kept is None, feed=True)
        source = iter(kept) if kept is not None else self.read_on()
        count = self._count = _Count()
        intra = self._context.codec.canonical_name in INTRA_ONLY
        for packet in itertools.chain(source, [None]):
            self._progress()
            try:
                frames = self._context.decode(packet)
            except MemoryError as error:
                raise VideoError(reason(error)) from error
            except DECODE_ERRORS as error:
                # PermissionError is some decoders' word for damage.
                if not (count.failed or isinstance(error, PermissionError)):
                    self.damage = reason(error)
                count.failed, count.last_failed = count.failed + 1, True
                continue
            count.last_failed = count.last_failed and not frames
            for frame in frames:
                count.corrupt += frame.is_corrupt
                # Such a frame shows what an earlier picture left in the buffer, whichever that was.
                if frame.is_corrupt and intra:
                    continue
                count.came += 1
                self._notice(frame)
                yield frame
                # What a decoder puts in the place of damage may depend on the buffers that are
                # free: from here to the reader's caller no frame is held while the next is decoded.
                del frame
            frames.clear()
        self._whole = count

    @property
    def truncated(self) -> str | None:
        """What was damaged in what has been decoded, in words; None where nothing was."""
        table, count = self._table, self._whole or self._count
        if table is None or not count.came:
            return None
        if self._whole and (table.error or (count.last_failed and count.failed == 1)):
            return f"truncated after {count.came} frames: {table.error or self.damage}"
        if count.failed:
            return f"{count.failed} of {len(table.pts)} packets could not be decoded: {self.damage}"
        shown = int(table.shown.sum())
        if self._whole and self._one_frame_per_packet and count.came < shown - count.corrupt:
            return f"{shown - count.came} of {shown} frames never came out of the decoder"
        return f"{count.corrupt} of {shown} frames are damaged" if count.corrupt else None

    @property
    def _one_frame_per_packet(self) -> bool:
        """Return whether each shown packet of a sound file gives one frame.

        Not so for fields and for MPEG-4 in AVI.
        """
        name = self._context.codec.canonical_name
        return name in ONE_FRAME_PER_PACKET and self._context.field_order in PROGRESSIVE

    def _decode_head(self) -> Iterator[av.VideoFrame]:
        """Decode the first frames, without reading the whole file."""
        self.start(read=True, feed=True)
        for packet in itertools.chain(self.read_on(), [None]):
            self._progress()
            try:
                yield from self._context.decode(packet)
            except DECODE_ERRORS:
                continue

    def read_on(self) -> Iterator[av.Packet]:
        """Yield packets from the container's current position; an error ends them."""
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
        """(index, frame) of every frame as the decoder gives them."""
        timeline = self.timeline()
        if not timeline.reliable:
            count = itertools.count()  # not enumerate, which holds the last frame
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
        for index, frame in ascending(self._plain_rows(), None):
            yield index, int(pts[index]), frame
            del frame

    # The shortcuts

    def frames_at(self, indices: np.ndarray) -> Rows:
        """Yield (index, pts, frame) for int64 [N] ascending, distinct `indices`.

        The frames equal those of the plain decode; those that even the plain decode lacks are left
        out.
        """
        timeline = self.timeline()
        requested = np.asarray(indices, np.int64)
        inside = len(requested) == 0 or (requested[0] >= 0 and requested[-1] < len(timeline))
        if not inside or np.any(np.diff(requested) <= 0):
            raise VideoError(
                f"frames {requested[0]} … {requested[-1]} wanted, the video has {len(timeline)}"
            )
        done = 0
        shortcut = self.shortcut(requested) if timeline.reliable else iter(())
        planned = timeline.reliable
        while planned and done < len(requested):
            try:
                index, frame = next(shortcut)
            except NotAsPlanned:
                planned = False
            else:
                done += 1
                yield index, int(timeline.pts[index]), frame
        for index, frame in ascending(self._plain_rows(), requested[done:]):
            yield index, int(timeline.pts[index]), frame
            del frame

    def shortcut(self, requested: np.ndarray) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield (index, frame) for all `requested` in order, else raise NotAsPlanned."""
        table = self.packets
        rank = {int(table.pts[table.order[i]]): int(i) for i in requested}
        queue = [int(i) for i in requested[::-1]]
        early: dict[int, av.VideoFrame] = {}
        for frame in self._decode_ranges(requested):
            index = rank.pop(frame.pts, None) if frame.pts is not None else None
            if index is not None:
                self._notice(frame)
                early[index] = frame
            while queue and queue[-1] in early:
                index = queue.pop()
                yield index, early.pop(index)
            if len(early) > HOLD:
                raise NotAsPlanned
        if queue:
            raise NotAsPlanned

    def _decode_ranges(self, requested: np.ndarray) -> Iterator[av.VideoFrame]:
        """Yield the frames that come out of the ranges of packets with those `requested`."""
        table, context = self.packets, self._context
        needed = set(table.order[requested].tolist())
        codec = context.codec.canonical_name
        numbers = NonReferencePictures(context.extradata) if codec == "h264" else None
        # What the decoders of FROM_START show depends on the buffers that are free: nothing is held
        # back.
        marks_damage = codec not in FROM_START
        feed = Feed(self)
        for start, stop in packet_ranges(table, requested):
            feed.begin(start)
            context = self._context  # another one if the file had to be opened again
            first_pts = latest = table.pts[start]
            skips: bool | None = None
            waiting = Waiting()
            if numbers is not None:
                numbers.begin()
            for position in range(start, stop + 2):
                self._progress()
                packet = feed.packet(position) if position <= stop else None
                if numbers is not None and packet is not None:
                    skip = numbers.may_leave_out(memoryview(packet), wanted=position in needed)
                    if skip is None:
                        raise NotAsPlanned
                    if skip is not skips:
                        skips = skip
                        context.skip_frame = "NONREF" if skip else "DEFAULT"
                if packet is not None and marks_damage and not skips and table.shown[position]:
                    waiting.fed(int(table.pts[position]))
                for frame in feed.decode(packet):
                    if frame.pts is None:
                        raise NotAsPlanned
                    place = table.position_of.get(frame.pts)
                    if place is None or not table.shown[place]:
                        raise NotAsPlanned
                    if frame.pts < first_pts:  # a leading picture that lacks what it refers to
                        continue
                    # The frame is damaged, or shown in another order than the pts say.
                    if frame.is_corrupt or frame.pts < latest:
                        raise NotAsPlanned
                    latest = frame.pts
                    yield from waiting.came(frame, wanted=place in needed)
            yield from waiting.rest()

    def sample(self, sampling: Sampling) -> Rows:
        """Yield (index, pts, frame) of the sampled frames, in one pass."""
        timeline = self.timeline()
        chosen = sampling.select(timeline.pts, timeline.key, timeline.time_base)
        yield from self.frames_at(chosen)
