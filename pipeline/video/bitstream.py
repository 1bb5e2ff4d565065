"""What a packet's first bytes say: whether decoding may begin at it, and whether it shows a frame.

Containers flag key frames too generously (an AVI flags them all; an open GOP's I frame needs frames
from before it). Decoding from a wrong entry gives wrong pixels silently, so the entry is read from
the bitstream itself for the codecs below; codecs not listed are decoded from the start.
Sources: ITU-T H.264 table 7-1 and §7.3.3, ITU-T H.265 table 7-1, ITU-T H.262 §6.2.3, ISO/IEC
14496-2 §6.2.5, RFC 6386 §9.1, VP9 bitstream specification §6.2 and annex B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# Every frame stands alone: any packet is an entry.
INTRA_ONLY = frozenset(
    ("mjpeg", "png", "prores", "dnxhd", "cfhd", "hap", "jpeg2000", "dvvideo", "rawvideo", "v210")
)
INTRA_ONLY |= {"huffyuv", "ffvhuff", "utvideo", "magicyuv"}
# Each packet that is shown gives one frame, fields and damage aside.
ONE_FRAME_PER_PACKET = INTRA_ONLY | {"h264", "hevc", "vp8", "vp9", "av1"}
# The demuxer's own flag is trusted (the parser read it from the frame header).
FLAGGED = frozenset(("av1",))
# MPEG-1, -2 and -4 conceal damage without a word, from whatever was decoded before: nothing is left
# out.
FROM_START = frozenset(("mpeg1video", "mpeg2video", "mpeg4"))
_MAX_NAL_UNITS = 64  # that are looked at in a packet
_X264 = re.compile(rb"x264 - core (\d{1,9})")
_H264_SEQUENCE = re.compile(rb"\x00\x00\x01[\x07\x27\x47\x67](.)", re.DOTALL)
_H264_444 = (44, 244)  # of profile_idc
# Their sequence parameter sets have fields of their own for colours (ITU-T H.264 §7.3.2.1.1).
_H264_HIGH = frozenset((44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244))
_H264_HEAD = 9  # bytes in which a picture's first slice has its number: 1 + 7 + 17 + 16 bits after the first, escapes
# Supplemental information, delimiter and filler: not needed for any picture.
_H264_ASIDE = frozenset((6, 9, 12))
# The NAL units that say how the others are to be read: sequence, picture and, of HEVC, video
# parameter sets.
_PARAMETERS = {"h264": (7, 8), "hevc": (32, 33, 34)}


def entry_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a function that tells whether a flagged packet is a true entry.

    None if the codec is unknown.
    """
    if codec in INTRA_ONLY or codec in FLAGGED:
        return lambda data: True
    if codec in FROM_START:
        return lambda data: False
    kinds = _nal_kinds(codec, extradata)
    tests: dict[str, Callable[[memoryview], bool]] = {
        # The first slice decides: whether it is IDR (H.264), or of a random access point (HEVC).
        "h264": lambda data: next((k == 5 for k in kinds(data) if k in (1, 5)), False),
        "hevc": lambda data: next((k >= 16 for k in kinds(data) if k <= 21), False),
        "vp8": lambda data: len(data) > 0 and not data[0] & 1,
        "vp9": lambda data: len(data) > 0 and not _vp9(data[0])[1],
    }
    return tests.get(codec)


def in_doubt(codec: str, extradata: bytes | None, data: memoryview, size: int) -> bool:
    """Return whether a packet of H.264 or HEVC may leave a decoder in an unexpected state.

    It does if a unit up to its first slice ends after the packet, if it brings parameter sets that
    the header lacks (a decoder that saw the packets before keeps some of their parameters), or if
    its beginning has no slice.

    data: the beginning of the packet's `size` bytes.
    """
    if codec not in _PARAMETERS:
        return False
    length, at = _length_size(codec, extradata), 0
    for unit in _nal_units(data, length):
        at += length + int.from_bytes(data[at : at + length], "big")
        if length and at > size:
            return True
        kind = _nal_kind(codec, unit)
        if 1 <= kind <= 5 if codec == "h264" else kind < 32:
            return False
        if kind in _PARAMETERS[codec]:  # in avcC and hvcC, each is preceded by its length
            content = bytes(unit)
            parameters = (
                len(content).to_bytes(2, "big") + content if length else content.rstrip(b"\0")
            )
            if parameters not in (extradata or b""):
                return True
    return True


def must_be_first(codec: str, extradata: bytes | None, first: memoryview) -> bool:
    """Return whether a decoder has to see the `first` packet before any other.

    That packet names the build of x264. Early builds have faults, in 4:4:4 before 151 and in direct
    prediction before 34, which libavcodec reproduces if it knows the build.
    """
    match = _X264.search(first) if codec == "h264" else None
    if match is None:
        return False
    build = int(match[1])
    return build < 34 or (build < 151 and _profile(extradata or bytes(first)) in _H264_444)


def b_picture_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a function that tells whether a packet holds a bidirectional picture.

    None where the codec has none. Such a picture is shown before one that was decoded earlier. One
    whose pts is above those of all packets before it has a made-up pts: the muxer wrote the decode
    order (any `-c copy` of an AVI). HEVC marks low-delay P pictures as B slices too, so that its
    sub-layer non-reference pictures are taken instead.
    """
    length, kinds = _length_size(codec, extradata), _nal_kinds(codec, extradata)
    tests: dict[str, Callable[[memoryview], bool]] = {
        "h264": lambda data: _h264_slice_is_b(data, length),
        "hevc": lambda data: any(k < 16 and not k & 1 for k in kinds(data)),
        "mpeg4": lambda data: any(
            vop[:1] and vop[0] >> 6 == 2 for vop in bytes(data).split(b"\0\0\1\xb6")[1:]
        ),
        "mpeg1video": _mpeg_picture_is_b,
        "mpeg2video": _mpeg_picture_is_b,
    }
    return tests.get(codec)


def _h264_slice_is_b(data: memoryview, length: int) -> bool:
    for unit in _nal_units(data, length):
        kind = unit[0] & 0x1F
        if 1 <= kind <= 5:
            head = bytes(unit[1:9])
            bits = int.from_bytes(head, "big")
            _, at = _exp_golomb(bits, 8 * len(head))  # first_mb_in_slice
            slice_type, _ = _exp_golomb(bits, at)
            return kind != 5 and slice_type % 5 == 1
    return False


def _exp_golomb(bits: int, at: int) -> tuple[int, int]:
    """Return (value, bits left after it) of the ue(v) code that begins `at` bits from the end.

    (0, 0) if it is cut off.
    """
    rest = bits & ((1 << max(at, 0)) - 1)
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
    match = _H264_SEQUENCE.search(extradata)
    return match[1][0] if match is not None else -1


class NonReferencePictures:
    """Tells, packet by packet, which H.264 pictures a decoder may skip without effect on others.

    Those are the non-reference pictures, but one flipped bit gives a reference picture the header
    of one, and a decoder that skips it shows the pictures that refer to it wrongly without an
    error. `frame_num` tells them apart: it counts reference pictures, so that the next picture has
    the same number after a non-reference picture alone (ITU-T H.264 §7.4.3).
    """

    def __init__(self, extradata: bytes | None) -> None:
        self._length = _length_size("h264", extradata)
        self._bits = _frame_num_bits(extradata or b"", self._length)
        # The number of the picture before, if that was left out.
        self._left_out: int | None = None

    def begin(self) -> None:
        """Forget the packets before."""
        self._left_out = None

    def may_leave_out(self, data: memoryview, *, wanted: bool) -> bool | None:
        """Return whether the packet that comes next may be left out.

        None: the one before should not have been, as far as can be seen.
        """
        before, self._left_out = self._left_out, None
        if not self._bits or (wanted and before is None):
            return False
        head, alone = self._first_slice(data)
        if before is None and not alone:
            return False
        number = self._number(head)
        is_idr = head[:1] and head[0] & 0x1F == 5  # refers to nothing
        if before is not None and number != before and not is_idr:
            return None
        if alone and not wanted:
            self._left_out = number
        return self._left_out is not None

    def _first_slice(self, data: memoryview) -> tuple[bytes, bool]:
        """Return how the first slice of a packet begins, and if all slices are non-reference."""
        head, alone = b"", True
        for start in _h264_starts(data, self._length):
            first = data[start]
            if not head and first & 0x9F in (1, 5):  # with the highest bit, which is always 0
                head = bytes(data[start : start + _H264_HEAD])
                if first != 1:
                    return head, False
            elif first != 1 and first & 0x9F not in _H264_ASIDE:
                alone = False
        return head, alone and len(head) > 0

    def _number(self, head: bytes) -> int | None:
        if not head:
            return None
        if b"\0\0\3" in head:
            head = head.replace(b"\0\0\3", b"\0\0")
        bits, at = int.from_bytes(head, "big"), 8 * len(head) - 8
        for _ in range(3):  # first_mb_in_slice, slice_type, pic_parameter_set_id: Exp-Golomb codes
            _, at = _exp_golomb(bits, at)
            if at < self._bits:
                return None
        return bits >> (at - self._bits) & ((1 << self._bits) - 1)


def _h264_starts(data: memoryview, length: int) -> list[int]:
    """Return where the NAL units of a packet begin, all of them."""
    starts, at, size = [], 0, len(data)
    while length and at + length < size:
        start = at + length
        at = start + int.from_bytes(data[at:start], "big")
        starts.append(start)
        if at == start:  # an empty unit is none
            return starts
    if not length:
        raw = bytes(data)
        at = raw.find(b"\0\0\1")
        while 0 <= at < size - 3:
            starts.append(at + 3)
            at = raw.find(b"\0\0\1", at + 3)
    return starts


def _frame_num_bits(extradata: bytes, length: int) -> int:
    """Return how many bits frame_num has in the slices of a stream; 0 if unknown."""
    widths = set()
    for sequence in _sequences(extradata, length):
        bits, at = _to_frame_num(sequence)
        value, left = _exp_golomb(bits, at)
        widths.add(value + 4 if left and value <= 12 else 0)
    return widths.pop() if len(widths) == 1 else 0


def codes_frames_only(extradata: bytes) -> bool:
    """Return whether all pictures of an H.264 stream are whole frames, by its header.

    Otherwise a packet may hold a field, half a frame.
    """
    sequences = _sequences(extradata, _length_size("h264", extradata))
    return bool(sequences) and all(map(_has_frames_only, sequences))


def _has_frames_only(sequence: bytes) -> bool:
    """Return frame_mbs_only_flag of a sequence parameter set; False if that is unknown."""
    bits, at = _to_frame_num(sequence)
    _, at = _exp_golomb(bits, at)  # log2_max_frame_num
    order, at = _exp_golomb(bits, at)  # pic_order_cnt_type
    codes = 2 if order == 0 else 1  # log2_max_pic_order_cnt_lsb, max_num_ref_frames
    if order == 1:
        at -= 1  # delta_pic_order_always_zero_flag
        for _ in range(2):  # offset_for_non_ref_pic, offset_for_top_to_bottom_field
            _, at = _exp_golomb(bits, at)
        cycle, at = _exp_golomb(bits, at)
        codes = min(cycle, 255) + 1
    for _ in range(codes):
        _, at = _exp_golomb(bits, at)
    at -= 1  # gaps_in_frame_num_value_allowed_flag
    for _ in range(2):  # width and height in macroblocks
        _, at = _exp_golomb(bits, at)
    return at > 0 and bool(bits >> (at - 1) & 1)


def _sequences(extradata: bytes, length: int) -> list[bytes]:
    """Return the sequence parameter sets of H.264, without emulation prevention bytes."""
    units, at = extradata.split(b"\0\0\1")[1:], 6
    if length:
        units = []
        for _ in range(int.from_bytes(extradata[5:6]) & 31):
            end = at + 2 + int.from_bytes(extradata[at : at + 2], "big")
            units.append(extradata[at + 2 : end])
            at = end
    return [unit.replace(b"\0\0\3", b"\0\0") for unit in units if unit[:1] and unit[0] & 0x1F == 7]


def _to_frame_num(sequence: bytes) -> tuple[int, int]:
    """Return the bits of a sequence parameter set and how many follow up to log2_max_frame_num.

    (0, 0) if that is unknown.
    """
    head = sequence[4:1024]
    bits, at = int.from_bytes(head, "big"), 8 * len(head)
    _, at = _exp_golomb(bits, at)  # seq_parameter_set_id
    if sequence[1:2] and sequence[1] in _H264_HIGH:
        chroma, at = _exp_golomb(bits, at)
        at -= chroma == 3  # a bit for planes of their own, whose slices have one more field
        if chroma == 3 and bits >> max(at, 0) & 1:
            return 0, 0
        for _ in range(2):  # bit_depth_luma, bit_depth_chroma
            _, at = _exp_golomb(bits, at)
        at -= 2  # qpprime_y_zero_transform_bypass_flag, seq_scaling_matrix_present_flag
        if at > 0 and bits >> at & 1:
            at = _after_scaling_lists(bits, at, 12 if chroma == 3 else 8)
    return bits, at


def _after_scaling_lists(bits: int, at: int, count: int) -> int:
    """Return how many bits are left after the scaling lists that begin `at` bits from the end."""
    for number in range(count):
        at -= 1
        last = following = 8 if at > 0 and bits >> at & 1 else 0  # 0: the list ends here
        for _ in range(16 if number < 6 else 64):
            if following:
                code, at = _exp_golomb(bits, at)
                following = (last + (code + 1) // 2 * (1 if code & 1 else -1)) % 256
                last = following or last
    return at


def shown_test(codec: str) -> Callable[[memoryview], bool] | None:
    """Return a function that tells whether a packet gives a frame to show.

    None where all packets do (not so in VP8 and VP9).
    """
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
    """Return the bytes of a NAL unit's length prefix in the container; 0 for start codes."""
    if not extradata or extradata[0] != 1:
        return 0
    if codec == "h264" and len(extradata) > 4:
        return (extradata[4] & 3) + 1
    if codec == "hevc" and len(extradata) > 21:
        return (extradata[21] & 3) + 1
    return 0


def _nal_kinds(codec: str, extradata: bytes | None) -> Callable[[memoryview], Iterator[int]]:
    """Return a function that yields the kind of each NAL unit of a packet of H.264 or HEVC."""
    length = _length_size(codec, extradata)
    return lambda data: (_nal_kind(codec, unit) for unit in _nal_units(data, length))


def _nal_kind(codec: str, unit: memoryview) -> int:
    """Return `nal_unit_type`."""
    return unit[0] & 0x1F if codec == "h264" else unit[0] >> 1 & 0x3F


def _nal_units(data: memoryview, length: int) -> Iterator[memoryview]:
    """Yield the first NAL units of a packet, after start codes or a `length` of so many bytes.

    They are cut off where the data is.
    """
    at = 0
    if length:
        data = data[: 1 << 16]
        for _ in range(_MAX_NAL_UNITS):
            start = at + length
            if start >= len(data):
                return
            at = start + int.from_bytes(data[at:start], "big")
            yield data[start : max(at, start + 1)]
        return
    raw = bytes(data[: 1 << 16])
    at = raw.find(b"\x00\x00\x01")
    for _ in range(_MAX_NAL_UNITS):
        if at < 0 or at + 3 >= len(raw):
            return
        end = raw.find(b"\x00\x00\x01", at + 3)
        # Between two start codes there may be nothing.
        if end != at + 3:
            yield memoryview(raw)[at + 3 : end if end > 0 else len(raw)]
        at = end
