"""Select the packets that a decoder needs for some frames, and put its frames into order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import av
import numpy as np

from .bitstream import b_picture_test
from .packets import NO_PTS, PacketTable

if TYPE_CHECKING:
    from .decoder import VideoReader

# Later frames that may come out before a missing one is given up; H.264 reorders by at most 16.
MAX_EARLY_FRAMES = 32
_SEEKABLE = frozenset(("mov", "matroska"))  # seeking by timestamp follows their index
# Up to this many packets and bytes are read and dropped; a seek over them would be slower.
_MAX_DROPPED_PACKETS, _MAX_DROPPED_BYTES = 64, 2**21
# PyAV raises ValueError for a decoder that could not be opened.
DECODE_ERRORS = (av.FFmpegError, ValueError)


class NotAsPlanned(Exception):
    """The shortcut did not deliver what the timeline promised: the plain decode must decide."""


def packet_ranges(table: PacketTable, requested: np.ndarray) -> list[tuple[int, int]]:
    """Return decode positions [(start, stop), …] to decode, both included, ascending, disjoint.

    Decoding of a requested frame begins at the last entry at or before its packet. A frame that is
    shown before that entry (a leading picture of an open group) may need frames of the previous
    group; decoding then begins at the previous entry. Example: in the decode order I0 P3 B1 B2 I6
    B4 B5, frame B5 needs (0, 6) and frame I6 needs (4, 4).
    """
    positions = table.order[requested]
    entries = np.flatnonzero(table.entry)
    entry_number = np.searchsorted(entries, positions, side="right") - 1
    pts = table.pts[positions]
    leading = (pts < table.pts[entries[entry_number]]) & (entry_number > 0)
    while leading.any():
        entry_number = entry_number - leading
        leading = (pts < table.pts[entries[entry_number]]) & (entry_number > 0)
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted(zip(entries[entry_number].tolist(), positions.tolist(), strict=True)):
        if ranges and start <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], stop))
        else:
            ranges.append((start, stop))
    return ranges


class Feed:
    """Consecutive packets for the reader's decoder, from memory or from the file by seeking."""

    def __init__(self, reader: VideoReader) -> None:
        self._reader = reader
        self._table = reader.packets
        reader.start(read=self._table.cached_packets is None, feed=True)
        self._remaining: Iterator[av.Packet] = (
            reader.demux_remaining() if self._table.cached_packets is None else iter(())
        )
        self._position = 0  # decode position of the packet that comes next
        context = reader.stream.codec_context
        self._is_b = b_picture_test(context.codec.canonical_name, context.extradata)

    def begin(self, start: int) -> None:
        """Flush the decoder and go to packet `start`."""
        self._reader.stream.codec_context.flush_buffers()
        if self._table.cached_packets is not None or self._position == start:
            return
        if self._position < start:
            dropped_bytes = self._table.num_bytes[self._position : start]
            if (
                len(dropped_bytes) <= _MAX_DROPPED_PACKETS
                and dropped_bytes.sum() <= _MAX_DROPPED_BYTES
            ):
                return
        if start == 0 or not self._seek(start):
            self._reader.start(read=True, feed=True)
            self._remaining, self._position = self._reader.demux_remaining(), 0

    def _seek(self, start: int) -> bool:
        """Seek to packet `start` or to an earlier one; return False if that fails."""
        reader, table = self._reader, self._table
        if not _SEEKABLE & set(reader.container.format.name.split(",")):
            return False
        entries = np.flatnonzero(table.entry[: start + 1])[::-1][:3]
        for entry in entries:
            times = [int(t) for t in (table.dts[entry], table.pts[entry]) if t != NO_PTS]
            # Mov seeks by dts and Matroska by pts: the smaller one is never too far.
            target = min(times)
            try:
                reader.container.seek(target, stream=reader.stream)
            except (av.FFmpegError, OverflowError):
                return False
            packets = reader.demux_remaining()
            packet = next(packets, None)
            if packet is None or packet.pts is None:
                continue
            position = table.position_of.get(packet.pts)
            if position is not None and position <= start:
                self._remaining, self._position = chain((packet,), packets), position
                return True
        return False

    def packet(self, position: int) -> av.Packet:
        """Return the packet of a decode position; positions ascend from the range's first."""
        cached_packets, byte_position = self._table.cached_packets, self._table.byte_position
        if cached_packets is not None:
            return cached_packets[position]
        while True:
            packet = next(self._remaining, None)
            if (
                packet is None
                or packet.pts is None
                or self._table.position_of.get(packet.pts) != self._position
            ):
                raise NotAsPlanned
            if byte_position is not None and not self._matches_header(packet, self._position):
                raise NotAsPlanned
            self._position += 1
            if self._position > position:
                return packet

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Return the frames that come out for a packet; None flushes the decoder."""
        try:
            return self._reader.stream.codec_context.decode(packet)
        except DECODE_ERRORS as error:
            raise NotAsPlanned from error

    def _matches_header(self, packet: av.Packet, position: int) -> bool:
        """Return whether a packet has the position and the time that the header gives."""
        table = self._table
        if table.byte_position is None or packet.pos != table.byte_position[position]:
            return False
        return not (
            self._is_b is not None and table.rising[position] and self._is_b(memoryview(packet))
        )


class HeldFrames:
    """Holds frames back until all pictures that they may refer to have come out.

    Only then is it known whether these pictures are damaged: a picture refers to pictures that were
    decoded before it, and some of them are shown after it. How a decoder conceals damage depends on
    the other pictures that it decoded. Example: in the decode order I0 P3 B1 with a damaged P3, B1
    comes out first, and P3 with its mark only afterwards.
    """

    def __init__(self) -> None:
        self._highest = NO_PTS
        # pts of a packet → the highest pts of the packets decoded up to it
        self._needs: dict[int, int] = {}
        self._frames: deque[av.VideoFrame] = deque()

    def add_packet(self, pts: int) -> None:
        """Record that the packet with this pts is decoded next."""
        self._highest = max(self._highest, pts)
        self._needs[pts] = self._highest

    def add_frame(self, frame: av.VideoFrame, *, wanted: bool) -> Iterator[av.VideoFrame]:
        """Add an undamaged decoded frame; yield the wanted frames that can now be shown."""
        latest = frame.pts or 0
        if wanted:
            self._frames.append(frame)
        while self._frames and self._needs.get(self._frames[0].pts or 0, NO_PTS) <= latest:
            yield self._frames.popleft()

    def flush(self) -> Iterator[av.VideoFrame]:
        """Yield the remaining frames, after the last packet was decoded."""
        while self._frames:
            yield self._frames.popleft()


def sort_rows(
    rows: Iterator[tuple[int, av.VideoFrame]], requested: np.ndarray | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield the rows `requested` (None: all) in ascending order; hold back those that come early.

    A frame is given up if it is missing when more than MAX_EARLY_FRAMES later ones wait.
    """
    queue = None if requested is None else deque(int(i) for i in requested)
    requested_set = None if queue is None else set(queue)
    early: dict[int, av.VideoFrame] = {}
    latest = -1
    if queue is not None and not queue:
        return
    for index, frame in rows:
        if index > latest and (requested_set is None or index in requested_set):
            early[index] = frame
        del frame  # see VideoReader
        while early and (
            min(early) == (queue[0] if queue else latest + 1) or len(early) > MAX_EARLY_FRAMES
        ):
            latest = min(early)
            yield latest, early.pop(latest)
            while queue and queue[0] <= latest:
                queue.popleft()
            if queue is not None and not queue:
                return
    for index in sorted(early):
        yield index, early[index]
