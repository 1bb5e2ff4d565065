"""What a packet's first bytes say: whether decoding may begin at it, and whether it shows a frame.

Containers flag key frames too generously (an AVI flags them all; an open GOP's I frame needs frames
from before it). Decoding from a wrong entry gives wrong pixels silently, so the entry is read from the
bitstream itself for the codecs below; codecs not listed are decoded from the start.
Sources: ITU-T H.264 table 7-1 and §7.3.3, ITU-T H.265 table 7-1, ITU-T H.262 §6.2.3, ISO/IEC 14496-2 §6.2.5,
RFC 6386 §9.1, VP9 bitstream specification §6.2 and annex B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# Every frame stands alone: any packet is an entry.
INTRA_ONLY = frozenset(("mjpeg", "png", "prores", "dnxhd", "cfhd", "hap", "jpeg2000", "dvvideo", "rawvideo", "v210"))
INTRA_ONLY |= {"huffyuv", "ffvhuff", "utvideo", "magicyuv"}
# Each packet that is shown gives one frame, fields and damage aside.
ONE_FRAME_PER_PACKET = INTRA_ONLY | {"h264", "hevc", "vp8", "vp9", "av1"}
# The demuxer's own flag is trusted (the parser read it from the frame header).
FLAGGED = frozenset(("av1",))
# MPEG-1, -2 and -4 conceal damage without a word, from whatever was decoded before: nothing is left out.
FROM_START = frozenset(("mpeg1video", "mpeg2video", "mpeg4"))
# Non-reference pictures can be left out without any effect on the others.
SKIP_NON_REFERENCE = frozenset(("h264",))
_X264 = re.compile(rb"x264 - core (\d{1,9})")
_H264_SEQUENCE = re.compile(rb"\x00\x00\x01[\x07\x27\x47\x67](.)", re.DOTALL)
_H264_444 = (44, 244)  # of profile_idc
# The NAL units that say how the others are to be read: sequence, picture and, of HEVC, video parameter sets.
_PARAMETERS = {"h264": (7, 8), "hevc": (32, 33, 34)}


def entry_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """A function that tells whether a flagged packet is a true entry; None when the codec is unknown."""
    if codec in INTRA_ONLY or codec in FLAGGED:
        return lambda data: True
    if codec in FROM_START:
        return lambda data: False
    length = _length_size(codec, extradata)
    tests: dict[str, Callable[[memoryview], bool]] = {
        "h264": lambda data: _has_nal(data, length, lambda b: b & 0x1F == 5, lambda b: b & 0x1F == 1),
        "hevc": lambda data: _has_nal(data, length, lambda b: 16 <= b >> 1 & 0x3F <= 21, lambda b: b >> 1 & 0x3F < 16),
        "vp8": lambda data: len(data) > 0 and not data[0] & 1,
        "vp9": lambda data: len(data) > 0 and not _vp9(data[0])[1],
    }
    return tests.get(codec)


def in_doubt(codec: str, extradata: bytes | None, data: memoryview, size: int) -> bool:
    """Whether a packet of H.264 or HEVC, before its first slice ends, has a unit longer than itself, or brings
    parameter sets that the header lacks: a decoder that saw the ones before keeps some of what they said.

    data: the beginning of the packet's `size` bytes.
    """
    if codec not in _PARAMETERS:
        return False
    length, at = _length_size(codec, extradata), 0
    for unit in _nal_units(data, length):
        at += length + int.from_bytes(data[at : at + length], "big")
        if length and at > size:
            return True
        kind = unit[0] & 0x1F if codec == "h264" else unit[0] >> 1 & 0x3F
        if 1 <= kind <= 5 if codec == "h264" else kind < 32:
            return False
        if kind in _PARAMETERS[codec]:  # in avcC and hvcC, each is preceded by its length
            content = bytes(unit)
            known = len(content).to_bytes(2, "big") + content if length else content.rstrip(b"\0")
            if known not in (extradata or b""):
                return True
    return True


def must_be_first(codec: str, extradata: bytes | None, first: memoryview) -> bool:
    """Whether a decoder has to see the `first` packet before any other: it tells of mistakes of early x264, in 4:4:4
    before build 151 and in direct prediction before 34, which libavcodec makes as well where it knows the build.
    """
    found = _X264.search(first) if codec == "h264" else None
    if found is None:
        return False
    build = int(found[1])
    return build < 34 or (build < 151 and _profile(extradata or bytes(first)) in _H264_444)


def b_picture_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a function that tells whether a packet holds a bidirectional picture; None where the codec has none.

    Such a picture is shown before one that was decoded earlier. One whose pts is above those of all packets before it
    has a made-up pts: the muxer wrote the decode order (any `-c copy` of an AVI). HEVC marks low-delay P pictures as B
    slices too, so that its sub-layer non-reference pictures are taken instead.
    """
    length = _length_size(codec, extradata)
    tests: dict[str, Callable[[memoryview], bool]] = {
        "h264": lambda data: _h264_slice_is_b(data, length),
        "hevc": lambda data: any(b >> 1 & 0x3F < 16 and not b >> 1 & 1 for b in _slice_headers(data, length)),
        "mpeg4": lambda data: any(vop[:1] and vop[0] >> 6 == 2 for vop in bytes(data).split(b"\0\0\1\xb6")[1:]),
        "mpeg1video": _mpeg_picture_is_b,
        "mpeg2video": _mpeg_picture_is_b,
    }
    return tests.get(codec)


def _slice_headers(data: memoryview, length: int) -> Iterator[int]:
    """The first header byte of each HEVC slice of a packet."""
    return (first for first in _nal_headers(data, length) if first >> 1 & 0x3F < 32)


def _h264_slice_is_b(data: memoryview, length: int) -> bool:
    for unit in _nal_units(data, length):
        kind = unit[0] & 0x1F if unit else 0
        if 1 <= kind <= 5:
            head = bytes(unit[1:9])
            bits = int.from_bytes(head, "big")
            _, at = _exp_golomb(bits, 8 * len(head))  # first_mb_in_slice
            slice_type, _ = _exp_golomb(bits, at)
            return kind != 5 and slice_type % 5 == 1
    return False


def _exp_golomb(bits: int, at: int) -> tuple[int, int]:
    """(value, bits left after it) of the ue(v) code that begins `at` bits from the end; (0, 0) where it is cut off."""
    rest = bits & ((1 << at) - 1)
    zeros = at - rest.bit_length()
    if not rest or 2 * zeros + 1 > at:
        return 0, 0
    left = at - 2 * zeros - 1
    return (rest >> left) - 1, left


def _mpeg_picture_is_b(data: memoryview) -> bool:
    pictures = bytes(data).split(b"\0\0\1\0")[1:]
    return any(len(picture) > 1 and picture[1] >> 3 & 7 == 3 for picture in pictures)


def _profile(extradata: bytes) -> int:
    """profile_idc of H.264, from avcC or from the first parameter set after a start code."""
    if extradata[0] == 1:
        return extradata[1]
    found = _H264_SEQUENCE.search(extradata)
    return found[1][0] if found is not None else -1


def shown_test(codec: str) -> Callable[[memoryview], bool] | None:
    """A function that tells whether a packet gives a frame to show; None where all do (not in VP8 and VP9)."""
    if codec == "vp8":
        return lambda data: bool(data[0] & 0x10)
    if codec == "vp9":
        return lambda data: _vp9(data[0])[0] or _vp9(data[0])[2] or data[-1] & 0xE0 == 0xC0
    return None


def _vp9(first: int) -> tuple[bool, bool, bool]:
    """(show_existing_frame, frame is inter, show_frame) of a VP9 frame's first byte."""
    profile = (first >> 5 & 1) | (first >> 4 & 1) << 1
    shift = 3 if profile < 3 else 2
    existing = bool(first >> shift & 1)
    return existing, existing or bool(first >> (shift - 1) & 1), bool(first >> (shift - 2) & 1)


def _length_size(codec: str, extradata: bytes | None) -> int:
    """Bytes of a NAL unit's length prefix as the container stores it; 0 for start codes."""
    if not extradata or extradata[0] != 1:
        return 0
    if codec == "h264" and len(extradata) > 4:
        return (extradata[4] & 3) + 1
    if codec == "hevc" and len(extradata) > 21:
        return (extradata[21] & 3) + 1
    return 0


def _has_nal(data: memoryview, length: int, wanted: Callable[[int], bool], other: Callable[[int], bool]) -> bool:
    """Whether an access unit has a NAL unit of a wanted kind before any of another one."""
    for first in _nal_headers(data, length):
        if wanted(first):
            return True
        if other(first):
            return False
    return False


def _nal_headers(data: memoryview, length: int) -> Iterator[int]:
    """The first byte of each NAL unit of a packet."""
    return (unit[0] for unit in _nal_units(data, length))


def _nal_units(data: memoryview, length: int, most: int = 64) -> Iterator[memoryview]:
    """The NAL units of a packet, after start codes or a `length` of so many bytes; cut off where the data is."""
    at = 0
    if length:
        data = data[: 1 << 16]
        for _ in range(most):
            start = at + length
            if start >= len(data):
                return
            at = start + int.from_bytes(data[at:start], "big")
            yield data[start : max(at, start + 1)]
        return
    raw = bytes(data[: 1 << 16])
    at = raw.find(b"\x00\x00\x01")
    for _ in range(most):
        if at < 0 or at + 3 >= len(raw):
            return
        end = raw.find(b"\x00\x00\x01", at + 3)
        yield memoryview(raw)[at + 3 : end if end > 0 else len(raw)]
        at = end
