"""The frames of an mp4 from its header, without a look at its packets.

libavformat gives each sample's decode time, place and flags from the header, edit lists applied,
but not its presentation time: that is decode time + the sample's offset in the `ctts` box, which is
read here, + the shift that libavformat adds for negative offsets. Whatever is out of the ordinary
(fragments, several video tracks, edits, sample descriptions, …) is left to a reader of the packets.
Source: ISO/IEC 14496-12 §8; libavformat's mov.c.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from .container import rational
from .packets import PacketTable, Timeline, pts_are_real

_MOST = 2**26  # bytes of a header that is taken into memory
_MOST_BOXES = 64  # of a file, before its header
_CODED_AS = frozenset((b"avc1", b"avc3", b"hvc1", b"hev1"))
_LEAST_OFFSET = -(2**28)  # below that, libavformat drops all offsets
_CONTAINERS = (b"trak", b"mdia", b"minf", b"stbl", b"edts")

Header = tuple[PacketTable, Timeline]


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
