"""Read frames of a clip out of an mp4 whose header lists all packets, without reading the rest.

It takes a tenth of the time to open such a file that way, and none to list its packets. The claims
of the header are compared with each packet that is fed to the decoder; where anything is in doubt,
NotAsPlanned leaves the file to a VideoReader, which reads and, if need be, decodes all of it.

libavformat gives each sample's decode time, place and flags from the header, edit lists applied,
but not its presentation time: that is decode time + the sample's offset in the `ctts` box, which is
read here, + the shift that libavformat adds for negative offsets. Whatever is out of the ordinary
(fragments, several video tracks, edits, sample descriptions, …) is left to a reader of the packets.
Source: ISO/IEC 14496-12 §8; libavformat's mov.c.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.stream import Discard
from av.video.stream import VideoStream

from ..common.errors import VideoError
from .bitstream import b_picture_test, entry_test, in_doubt, must_be_first
from .container import rational, reason
from .decoder import Rows, VideoIndex, VideoReader
from .feed import NotAsPlanned, packet_ranges
from .packets import PacketTable, Timeline, pts_are_real

_BEGINNING = 2**16  # bytes of a packet that are looked at for what it is
_MOST = 2**26  # bytes of a header that is taken into memory
_MOST_BOXES = 64  # of a file, before its header
_CODED_AS = frozenset((b"avc1", b"avc3", b"hvc1", b"hev1"))
_LEAST_OFFSET = -(2**28)  # below that, libavformat drops all offsets
_CONTAINERS = (b"trak", b"mdia", b"minf", b"stbl", b"edts")

Header = tuple[PacketTable, Timeline]


class QuickReader(VideoReader):
    """As VideoReader, for `timeline`, `info` after a frame, and `frames_at`.

    Raises NotAsPlanned instead of decoding the whole file, and VideoError if the file cannot be
    opened.

    index: of the same file by a reader of this kind.
    """

    _header_only = True

    def __init__(
        self,
        path: str,
        *,
        index: VideoIndex | None = None,
        progress: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(path, index=index, progress=progress)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._container.close()
            raise VideoError(reason(error)) from error
        if index is None:
            try:
                self._plan()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the file."""
        super().close()
        os.close(self._file)

    def _plan(self) -> None:
        header = read_header(self._file, self._container, self._stream)
        if header is None:
            raise NotAsPlanned
        self._table, self._timeline = header
        # Else the first frames may never come out, and the others would have other indices.
        if not self._begins(0):
            raise NotAsPlanned

    def _open(self) -> None:
        super()._open()
        for stream in self._container.streams:
            if stream is not self._stream:
                stream.discard = Discard.all  # libavformat does not even read them

    def _aspect(self) -> Fraction | None:
        """Return the container's aspect, else that of the header's parameters.

        The decoder has these: `_begins` lets no others in.
        """
        return rational(self._stream.sample_aspect_ratio) or rational(
            self._context.sample_aspect_ratio
        )

    def index(self) -> VideoIndex:
        """For the next reader of the file."""
        return VideoIndex(self.packets, self.timeline(), from_header=True)

    def frames_at(self, indices: np.ndarray) -> Rows:
        """Yield (index, pts, frame) for all of int64 [N] ascending, distinct `indices`."""
        self._check_entries(indices)
        pts = self.timeline().pts
        for index, frame in self.shortcut(indices):
            yield index, int(pts[index]), frame

    def _check_entries(self, requested: np.ndarray) -> None:
        """Read the packets at which decoding is to begin.

        Those where it cannot begin stop being entries.
        """
        table = self.packets
        while True:
            ranges = packet_ranges(table, requested)
            wrong = [start for start, _ in ranges if not self._begins(start)]
            if not wrong:
                break
            table.entry[wrong] = False
        codec, extradata = self._context.codec.canonical_name, self._context.extradata
        is_b = b_picture_test(codec, extradata)
        for _, stop in ranges:
            # What is decoded is looked at on the way. If the packet after it is shown before it,
            # its pts must say so.
            after = stop + 1
            if (
                is_b
                and after < len(table.pts)
                and table.rising[after]
                and is_b(self._beginning(after))
            ):
                raise NotAsPlanned

    def _begins(self, position: int) -> bool:
        """Return whether decoding may begin at a packet.

        Parameters other than the header's are in doubt everywhere: what they omit (colours, the
        shape of pixels) stays as it was before.
        """
        codec, extradata, data = (
            self._context.codec.canonical_name,
            self._context.extradata,
            self._beginning(position),
        )
        if extradata is None or in_doubt(codec, extradata, data, int(self.packets.bytes[position])):
            raise NotAsPlanned
        if position == 0 and must_be_first(codec, extradata, data):
            raise NotAsPlanned
        test = entry_test(codec, extradata)
        return test is not None and test(data)

    def _beginning(self, position: int) -> memoryview:
        """Return the file's bytes in the place of a packet, as far as they identify the packet."""
        table = self.packets
        if table.place is None:
            raise NotAsPlanned
        size = min(int(table.bytes[position]), _BEGINNING)
        return memoryview(os.pread(self._file, size, int(table.place[position])))


def read_header(descriptor: int, container: InputContainer, stream: VideoStream) -> Header | None:
    """Read packets and timeline of an open mp4 with H.264 or HEVC from its header.

    None if the header does not give them. The table is what reading the packets would give, except
    that key frames are the header's, and that every one of them counts as an entry.

    Raises:
        OSError: The file cannot be read.
    """
    extradata = stream.codec_context.extradata
    if len(container.streams.video) != 1 or not extradata or extradata[0] != 1:
        return None
    moov = _moov(descriptor)
    if moov is None:
        return None
    try:
        samples = _samples(moov, len(stream.index_entries))
    except (ValueError, IndexError):  # cut off
        return None
    if samples is None:
        return None
    sizes, offsets, shift = samples
    rows = [(e.timestamp, e.pos, e.size, e.is_keyframe, e.is_discard) for e in stream.index_entries]
    dts, place, length, key, hidden = np.array(rows, np.int64).reshape(-1, 5).T
    whole = np.all(length > 0) and np.all(place + length <= os.fstat(descriptor).st_size)
    if not whole or not np.array_equal(length, sizes):
        return None
    table = PacketTable(
        pts=dts + offsets + shift,
        dts=dts,
        key=key.astype(bool),
        shown=~hidden.astype(bool),
        entry=key.astype(bool),
        bytes=length,
        place=place,
        trusted=pts_are_real(container, stream),
    )
    if len(np.unique(table.pts)) < len(table.pts):
        return None
    timeline = table.timeline(rational(stream.time_base) or Fraction(1, 1000))
    return (table, timeline) if timeline.reliable and len(timeline) else None


def _moov(descriptor: int) -> bytes | None:
    """Return the file's header, without its own head.

    None if it does not exist, or further ones may follow.
    """
    at = 0
    for _ in range(_MOST_BOXES):
        head = os.pread(descriptor, 16, at)
        if len(head) < 8:
            return None
        size, kind, start = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, start = int.from_bytes(head[8:], "big"), 16
        if size < start or kind == b"moof":
            return None
        if kind == b"moov":
            return os.pread(descriptor, size - start, at + start) if size <= _MOST else None
        at += size
    return None


def _samples(moov: bytes, num_packets: int) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Return sizes in bytes, offsets of presentation times int64 [P], and the shift of all.

    They are those of the one video track. num_packets: P; None is returned if the header
    claims another number.

    Raises:
        ValueError: A box ends too early.
        IndexError: Likewise.
    """
    tracks = []
    for kind, start, end in _boxes(moov, 0, len(moov)):
        if kind == b"mvex":  # fragments follow
            return None
        if kind == b"trak":
            boxes: dict[bytes, bytes] = {}
            for leaf, content in _leaves(moov, start, end):
                boxes.setdefault(leaf, content)  # QuickTime has a second, lesser `hdlr`
            if b"hdlr" in boxes and boxes[b"hdlr"][8:12] == b"vide":
                tracks.append(boxes)
    if len(tracks) != 1:
        return None
    boxes = tracks[0]
    description, table = boxes.get(b"stsd", b""), boxes.get(b"stsz", b"")
    if description[4:8] != b"\0\0\0\1" or description[12:16] not in _CODED_AS or len(table) < 12:
        return None
    if b"elst" in boxes and not _one_edit(boxes[b"elst"]):
        return None
    size, count = np.frombuffer(table, ">u4", 2, 4).tolist()
    if count != num_packets:
        return None
    sizes = (
        np.full(count, size) if size else np.frombuffer(table, ">u4", count, 12).astype(np.int64)
    )
    offsets, shift = np.zeros(count, np.int64), 0
    if b"ctts" in boxes:
        (runs,) = np.frombuffer(boxes[b"ctts"], ">u4", 1, 4).tolist()
        lengths, values = (
            np.frombuffer(boxes[b"ctts"], ">i4", 2 * runs, 8).reshape(-1, 2).astype(np.int64).T
        )
        if (
            np.min(lengths, initial=1) < 1
            or lengths.sum() != count
            or np.min(values, initial=0) < _LEAST_OFFSET
        ):
            return None
        offsets = np.repeat(values, lengths)
        # As in libavformat, the last two runs do not count.
        shift = max(0, -int(np.min(values[:-2], initial=0)))
    return sizes, offsets, shift


def _one_edit(box: bytes) -> bool:
    """Return whether an edit list takes the track only once; empty edits only delay it."""
    long = box[0] == 1
    (count,) = np.frombuffer(box, ">u4", 1, 4).tolist()
    edit = np.dtype([("for", ">i8"), ("time", ">i8"), ("rate", ">i4")] if long else
                    [("for", ">i4"), ("time", ">i4"), ("rate", ">i4")])  # fmt: skip
    return int(np.sum(np.frombuffer(box, edit, count, 8)["time"] != -1)) <= 1


def _leaves(data: bytes, start: int, end: int, depth: int = 4) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, content) of the boxes of a track that hold no others.

    Raises:
        ValueError: They are nested too deep.
    """
    if not depth:
        raise ValueError("boxes in boxes without end")
    for kind, at, stop in _boxes(data, start, end):
        if kind in _CONTAINERS:
            yield from _leaves(data, at, stop, depth - 1)
        else:
            yield kind, data[at:stop]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the contents of the boxes in data[start:end].

    Raises:
        ValueError: A box ends too late.
    """
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if size < 8 or start + size > end:
            raise ValueError("a box that is longer than what holds it")
        yield kind, start + 8, start + size
        start += size
