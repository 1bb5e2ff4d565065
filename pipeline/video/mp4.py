"""Read frames of a clip from an mp4 whose header lists all packets, without reading the others.

Opening such a file takes a tenth of the time, and listing its packets takes none. The header is
compared with each packet that is decoded. In case of doubt NotAsPlanned is raised, and a
VideoReader must read and, if necessary, decode the whole file.

libavformat gives the decode time, position and flags of each sample from the header, with edit
lists applied, but not the presentation time. That is the decode time + the offset of the sample in
the `ctts` box, which is read here, + the shift that libavformat adds for negative offsets. Unusual
files (fragments, several video tracks, edits, sample descriptions, …) are left to a reader of all
packets.

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

_MAX_HEAD_BYTES = 2**16  # of a packet, read to identify it
_MAX_HEADER_BYTES = 2**26  # of a header that is read into memory
_MAX_BOXES = 64  # of a file, before its header
_SAMPLE_FORMATS = frozenset((b"avc1", b"avc3", b"hvc1", b"hev1"))
_MIN_OFFSET = -(2**28)  # below that, libavformat drops all offsets
_PARENT_BOXES = (b"trak", b"mdia", b"minf", b"stbl", b"edts")

Header = tuple[PacketTable, Timeline]


class QuickReader(VideoReader):
    """A VideoReader for `timeline`, `frames_at`, and `info` after the first frame.

    It raises NotAsPlanned instead of decoding the whole file, and VideoError if the file cannot be
    opened.

    index: The index of the same file from another QuickReader.
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
        # Otherwise the first frames may never come out, and the indices of the others would change.
        if not self._can_begin(0):
            raise NotAsPlanned

    def _open(self) -> None:
        super()._open()
        for stream in self._container.streams:
            if stream is not self._stream:
                # Libavformat then does not even read it.
                stream.discard = Discard.all

    def _aspect(self) -> Fraction | None:
        """Return the aspect ratio of the container, or else of the parameter sets in the header.

        The decoder uses no other parameter sets, since `_can_begin` refuses them.
        """
        return rational(self._stream.sample_aspect_ratio) or rational(
            self._context.sample_aspect_ratio
        )

    def index(self) -> VideoIndex:
        """Return the index for the next reader of the file."""
        return VideoIndex(self.packets, self.timeline(), from_header=True)

    def frames_at(self, indices: np.ndarray) -> Rows:
        """Yield (index, pts, frame) for all of int64 [N] ascending, distinct `indices`."""
        self._check_entries(indices)
        pts = self.timeline().pts
        for index, frame in self.shortcut(indices):
            yield index, int(pts[index]), frame

    def _check_entries(self, requested: np.ndarray) -> None:
        """Read the packets at which decoding is to begin, and correct the table of entries.

        A packet at which decoding cannot begin is no longer an entry.
        """
        table = self.packets
        while True:
            ranges = packet_ranges(table, requested)
            invalid = [start for start, _ in ranges if not self._can_begin(start)]
            if not invalid:
                break
            table.entry[invalid] = False
        codec, extradata = self._context.codec.canonical_name, self._context.extradata
        is_b = b_picture_test(codec, extradata)
        for _, stop in ranges:
            # Decoded packets are checked on the way. If the packet after them is shown before them,
            # its pts must be lower.
            following = stop + 1
            if (
                is_b
                and following < len(table.pts)
                and table.rising[following]
                and is_b(self._head(following))
            ):
                raise NotAsPlanned

    def _can_begin(self, position: int) -> bool:
        """Return whether decoding may begin at a packet.

        Parameter sets that the header lacks raise NotAsPlanned, because the decoder keeps earlier
        values of what they omit (colours, pixel aspect ratio).
        """
        codec, extradata, data = (
            self._context.codec.canonical_name,
            self._context.extradata,
            self._head(position),
        )
        if extradata is None or in_doubt(
            codec, extradata, data, int(self.packets.num_bytes[position])
        ):
            raise NotAsPlanned
        if position == 0 and must_be_first(codec, extradata, data):
            raise NotAsPlanned
        test = entry_test(codec, extradata)
        return test is not None and test(data)

    def _head(self, position: int) -> memoryview:
        """Return the first bytes of a packet from the file, as many as identify it."""
        table = self.packets
        if table.byte_position is None:
            raise NotAsPlanned
        size = min(int(table.num_bytes[position]), _MAX_HEAD_BYTES)
        return memoryview(os.pread(self._file, size, int(table.byte_position[position])))


def read_header(descriptor: int, container: InputContainer, stream: VideoStream) -> Header | None:
    """Read packets and timeline of an open mp4 with H.264 or HEVC from its header.

    Return None if the header does not give them. The table equals that of reading all packets,
    except that key frames are those of the header and that each of them counts as an entry.

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
    except (ValueError, IndexError):  # truncated boxes
        return None
    if samples is None:
        return None
    sizes, offsets, shift = samples
    rows = [(e.timestamp, e.pos, e.size, e.is_keyframe, e.is_discard) for e in stream.index_entries]
    dts, position, length, key, hidden = np.array(rows, np.int64).reshape(-1, 5).T
    complete = np.all(length > 0) and np.all(position + length <= os.fstat(descriptor).st_size)
    if not complete or not np.array_equal(length, sizes):
        return None
    table = PacketTable(
        pts=dts + offsets + shift,
        dts=dts,
        key=key.astype(bool),
        shown=~hidden.astype(bool),
        entry=key.astype(bool),
        num_bytes=length,
        byte_position=position,
        trusted=pts_are_real(container, stream),
    )
    if len(np.unique(table.pts)) < len(table.pts):
        return None
    timeline = table.timeline(rational(stream.time_base) or Fraction(1, 1000))
    return (table, timeline) if timeline.reliable and len(timeline) else None


def _moov(descriptor: int) -> bytes | None:
    """Return the content of the header box of the file (moov).

    Return None if there is none, or if further headers may follow.
    """
    position = 0
    for _ in range(_MAX_BOXES):
        head = os.pread(descriptor, 16, position)
        if len(head) < 8:
            return None
        size, kind, start = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, start = int.from_bytes(head[8:], "big"), 16
        if size < start or kind == b"moof":
            return None
        if kind == b"moov":
            if size > _MAX_HEADER_BYTES:
                return None
            return os.pread(descriptor, size - start, position + start)
        position += size
    return None


def _samples(moov: bytes, num_packets: int) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Return sizes in bytes and offsets of presentation times, int64 [P], and their common shift.

    They belong to the only video track. num_packets: P; None is returned if the header has another
    number of packets.

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
                # QuickTime has a second `hdlr` box after the one of the track.
                boxes.setdefault(leaf, content)
            if b"hdlr" in boxes and boxes[b"hdlr"][8:12] == b"vide":
                tracks.append(boxes)
    if len(tracks) != 1:
        return None
    boxes = tracks[0]
    description, table = boxes.get(b"stsd", b""), boxes.get(b"stsz", b"")
    if (
        description[4:8] != b"\0\0\0\1"
        or description[12:16] not in _SAMPLE_FORMATS
        or len(table) < 12
    ):
        return None
    if b"elst" in boxes and not _has_one_edit(boxes[b"elst"]):
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
            or np.min(values, initial=0) < _MIN_OFFSET
        ):
            return None
        offsets = np.repeat(values, lengths)
        # As in libavformat, the last two runs are not counted.
        shift = max(0, -int(np.min(values[:-2], initial=0)))
    return sizes, offsets, shift


def _has_one_edit(box: bytes) -> bool:
    """Return whether an edit list shows the track only once; empty edits only delay it."""
    is_long = box[0] == 1
    (count,) = np.frombuffer(box, ">u4", 1, 4).tolist()
    edit = np.dtype([("for", ">i8"), ("time", ">i8"), ("rate", ">i4")] if is_long else
                    [("for", ">i4"), ("time", ">i4"), ("rate", ">i4")])  # fmt: skip
    return int(np.sum(np.frombuffer(box, edit, count, 8)["time"] != -1)) <= 1


def _leaves(data: bytes, start: int, end: int, depth: int = 4) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, content) of the boxes of a track that hold no other boxes.

    Raises:
        ValueError: They are nested too deep.
    """
    if not depth:
        raise ValueError("boxes are nested too deep")
    for kind, content_start, content_end in _boxes(data, start, end):
        if kind in _PARENT_BOXES:
            yield from _leaves(data, content_start, content_end, depth - 1)
        else:
            yield kind, data[content_start:content_end]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the contents of the boxes in data[start:end].

    Raises:
        ValueError: A box ends too late.
    """
    while start + 8 <= end:
        size, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        if size < 8 or start + size > end:
            raise ValueError("a box is longer than its parent")
        yield kind, start + 8, start + size
        start += size
