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

HOLD = 32  # frames that may come out ahead of a wanted one before that is given up: H.264 reorders by ≤ 16
_SEEKABLE = frozenset(("mov", "matroska"))  # seeking by timestamp follows their index
# Packets are read and dropped rather than sought over if they are at most so many, of so many
# bytes.
_READ_ON = (64, 2**21)


# ValueError: PyAV's of a decoder that could not be opened.
DECODE_ERRORS = (av.FFmpegError, ValueError)


class NotAsPlanned(Exception):
    """The shortcut did not deliver what the timeline promised: the plain decode must decide."""


def packet_ranges(table: PacketTable, requested: np.ndarray) -> list[tuple[int, int]]:
    """Return decode positions [(start, stop), …] to feed, both ends included, ascending and apart.

    A wanted frame is decoded from the last entry at or before its packet. If it is shown before
    that entry (a leading picture of an open group), it may need frames of the group before: the
    entry before that is taken. Example: decode order I0 P3 B1 B2 I6 B4 B5, wanted B5 → (0, 6),
    wanted I6 → (4, 4).
    """
    positions = table.order[requested]
    entries = np.flatnonzero(table.entry)
    which = np.searchsorted(entries, positions, side="right") - 1
    pts = table.pts[positions]
    leading = (pts < table.pts[entries[which]]) & (which > 0)
    while leading.any():
        which = which - leading
        leading = (pts < table.pts[entries[which]]) & (which > 0)
    ranges: list[tuple[int, int]] = []
    for start, stop in sorted(zip(entries[which].tolist(), positions.tolist(), strict=True)):
        if ranges and start <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], stop))
        else:
            ranges.append((start, stop))
    return ranges


class Feed:
    """Gives the reader's decoder consecutive packets: from memory, or from the file by seeking."""

    def __init__(self, reader: VideoReader) -> None:
        self._reader = reader
        self._table = reader.packets
        reader.start(read=self._table.kept is None, feed=True)
        self._next: Iterator[av.Packet] = reader.read_on() if self._table.kept is None else iter(())
        self._position = 0  # decode position of the packet that comes next
        context = reader.stream.codec_context
        self._is_b = b_picture_test(context.codec.canonical_name, context.extradata)

    def begin(self, start: int) -> None:
        """Empty the decoder and stand before packet `start`."""
        self._reader.stream.codec_context.flush_buffers()
        if self._table.kept is not None or self._position == start:
            return
        if self._position < start:
            between = self._table.bytes[self._position : start]
            if len(between) <= _READ_ON[0] and between.sum() <= _READ_ON[1]:
                return
        if start == 0 or not self._seek(start):
            self._reader.start(read=True, feed=True)
            self._next, self._position = self._reader.read_on(), 0

    def _seek(self, start: int) -> bool:
        """Seek to packet `start` or to one before it."""
        reader, table = self._reader, self._table
        if not _SEEKABLE & set(reader.container.format.name.split(",")):
            return False
        entries = np.flatnonzero(table.entry[: start + 1])[::-1][:3]
        for entry in entries:
            times = [int(t) for t in (table.dts[entry], table.pts[entry]) if t != NO_PTS]
            target = min(times)  # mov seeks by dts, Matroska by pts: the smaller is never too far
            try:
                reader.container.seek(target, stream=reader.stream)
            except (av.FFmpegError, OverflowError):
                return False
            packets = reader.read_on()
            packet = next(packets, None)
            if packet is None or packet.pts is None:
                continue
            landed = table.position_of.get(packet.pts)
            if landed is not None and landed <= start:
                self._next, self._position = chain((packet,), packets), landed
                return True
        return False

    def packet(self, position: int) -> av.Packet:
        """Return the packet of a decode position; positions ascend from the range's first."""
        kept, place = self._table.kept, self._table.place
        if kept is not None:
            return kept[position]
        while True:
            packet = next(self._next, None)
            if (
                packet is None
                or packet.pts is None
                or self._table.position_of.get(packet.pts) != self._position
            ):
                raise NotAsPlanned
            if place is not None and not self._as_in_header(packet, self._position):
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

    def _as_in_header(self, packet: av.Packet, position: int) -> bool:
        """Return whether a packet has the position and the time that a header gives it."""
        table = self._table
        if table.place is None or packet.pos != table.place[position]:
            return False
        return not (
            self._is_b is not None and table.rising[position] and self._is_b(memoryview(packet))
        )


class Waiting:
    """Holds frames back until all pictures that they may refer to have come out.

    Only then is it known whether those are damaged. A picture refers to pictures that were decoded
    before it, but some of those are shown after it. What a decoder puts in the place of damage
    depends on what else it decoded. Example: decode order I0 P3 B1, with P3 damaged; B1 comes out
    first, and only then P3 with its mark.
    """

    def __init__(self) -> None:
        self._highest = NO_PTS
        self._needs: dict[int, int] = {}  # pts → the highest pts of what was decoded up to it
        self._frames: deque[av.VideoFrame] = deque()

    def fed(self, pts: int) -> None:
        """Note that the packet with this pts is decoded next."""
        self._highest = max(self._highest, pts)
        self._needs[pts] = self._highest

    def came(self, frame: av.VideoFrame, *, wanted: bool) -> Iterator[av.VideoFrame]:
        """Take an undamaged frame that came out; yield the wanted ones that can now be shown."""
        latest = frame.pts or 0
        if wanted:
            self._frames.append(frame)
        while self._frames and self._needs.get(self._frames[0].pts or 0, NO_PTS) <= latest:
            yield self._frames.popleft()

    def rest(self) -> Iterator[av.VideoFrame]:
        """Yield the others, after the end of what is decoded."""
        while self._frames:
            yield self._frames.popleft()


def ascending(
    rows: Iterator[tuple[int, av.VideoFrame]], requested: np.ndarray | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield the rows `requested` (None: all) in ascending order; hold back those that come early.

    A frame still missing when more than HOLD later ones wait is given up.
    """
    queue = None if requested is None else deque(int(i) for i in requested)
    asked = None if queue is None else set(queue)
    early: dict[int, av.VideoFrame] = {}
    done = -1
    if queue is not None and not queue:
        return
    for index, frame in rows:
        if index > done and (asked is None or index in asked):
            early[index] = frame
        del frame  # see VideoReader
        while early and (min(early) == (queue[0] if queue else done + 1) or len(early) > HOLD):
            done = min(early)
            yield done, early.pop(done)
            while queue and queue[0] <= done:
                queue.popleft()
            if queue is not None and not queue:
                return
    for index in sorted(early):
        yield index, early[index]
