"""Read the first bytes of packets: may decoding begin at a packet, and does it show a frame?

Containers flag too many key frames: an AVI flags all frames, and the I frame of an open GOP needs
earlier frames. Decoding from a wrong entry silently gives wrong pixels. Entries are therefore read
from the bitstream for the codecs below; videos of other codecs are decoded from the start.
Sources: ITU-T H.264 table 7-1 and §7.3.3, ITU-T H.265 table 7-1, ITU-T H.262 §6.2.3, ISO/IEC
14496-2 §6.2.5, RFC 6386 §9.1, VP9 bitstream specification §6.2 and annex B.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

# No frame refers to another: any packet is an entry.
INTRA_ONLY = frozenset(
    ("mjpeg", "png", "prores", "dnxhd", "cfhd", "hap", "jpeg2000", "dvvideo", "rawvideo", "v210")
)
INTRA_ONLY |= {"huffyuv", "ffvhuff", "utvideo", "magicyuv"}
# Each shown packet gives one frame, except for fields and damage.
ONE_FRAME_PER_PACKET = INTRA_ONLY | {"h264", "hevc", "vp8", "vp9", "av1"}
# The flag of the demuxer is trusted, because the parser read it from the frame header.
FLAGGED = frozenset(("av1",))
# MPEG-1, -2 and -4 conceal damage silently, with any picture that was decoded earlier. All packets
# are decoded.
FROM_START = frozenset(("mpeg1video", "mpeg2video", "mpeg4"))
_MAX_NAL_UNITS = 64  # that are read from a packet
_X264 = re.compile(rb"x264 - core (\d{1,9})")
_H264_SEQUENCE = re.compile(rb"\x00\x00\x01[\x07\x27\x47\x67](.)", re.DOTALL)
_H264_444 = (44, 244)  # of profile_idc
# Profiles whose sequence parameter sets have extra fields for colours (ITU-T H.264 §7.3.2.1.1).
_H264_HIGH = frozenset((44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 144, 244))
# The first slice of a picture has its number in these bytes: 1 + 7 + 17 + 16 bits after the first
# byte, and escapes.
_H264_HEAD_BYTES = 9
# Supplemental information, delimiter and filler, which no picture needs.
_H264_UNNEEDED_KINDS = frozenset((6, 9, 12))
# NAL units that hold parameters of the others: sequence and picture parameter sets, and for HEVC
# video parameter sets.
_PARAMETERS = {"h264": (7, 8), "hevc": (32, 33, 34)}


def entry_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a function that checks whether a flagged packet is a true entry.

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

    It may do so if a unit up to its first slice ends after the packet, if it has parameter sets
    that the header lacks (a decoder keeps some parameters of earlier packets), or if its first
    bytes hold no slice.

    data: The first of the packet's `size` bytes.
    """
    if codec not in _PARAMETERS:
        return False
    length, end = _length_size(codec, extradata), 0
    for unit in _nal_units(data, length):
        end += length + int.from_bytes(data[end : end + length], "big")
        if length and end > size:
            return True
        kind = _nal_kind(codec, unit)
        if 1 <= kind <= 5 if codec == "h264" else kind < 32:
            return False
        # In avcC and hvcC, the length of each parameter set precedes it.
        if kind in _PARAMETERS[codec]:
            content = bytes(unit)
            parameters = (
                len(content).to_bytes(2, "big") + content if length else content.rstrip(b"\0")
            )
            if parameters not in (extradata or b""):
                return True
    return True


def must_be_first(codec: str, extradata: bytes | None, first: memoryview) -> bool:
    """Return whether a decoder has to decode the `first` packet before any other.

    That packet names the build of x264. libavcodec reproduces the faults of early builds (in 4:4:4
    before 151, in direct prediction before 34) if it knows the build.
    """
    match = _X264.search(first) if codec == "h264" else None
    if match is None:
        return False
    build = int(match[1])
    return build < 34 or (build < 151 and _profile(extradata or bytes(first)) in _H264_444)


def b_picture_test(codec: str, extradata: bytes | None) -> Callable[[memoryview], bool] | None:
    """Return a function that checks whether a packet holds a bidirectional picture.

    Return None if the codec has none. Such a picture is shown before one that was decoded earlier.
    If its pts exceeds those of all earlier packets, the pts is made up: the muxer wrote the decode
    order (any `-c copy` of an AVI). HEVC marks low-delay P pictures as B slices too, so sub-layer
    non-reference pictures are used instead.
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
            slice_header = bytes(unit[1:9])
            bits = int.from_bytes(slice_header, "big")
            _, bits_left = _exp_golomb(bits, 8 * len(slice_header))  # first_mb_in_slice
            slice_type, _ = _exp_golomb(bits, bits_left)
            return kind != 5 and slice_type % 5 == 1
    return False


def _exp_golomb(bits: int, bits_left: int) -> tuple[int, int]:
    """Return the value of the ue(v) code `bits_left` bits from the end, and the bits after it.

    Return (0, 0) if the code is truncated.
    """
    tail = bits & ((1 << max(bits_left, 0)) - 1)
    zeros = bits_left - tail.bit_length()
    if not tail or 2 * zeros + 1 > bits_left:
        return 0, 0
    bits_after = bits_left - 2 * zeros - 1
    return (tail >> bits_after) - 1, bits_after


def _mpeg_picture_is_b(data: memoryview) -> bool:
    pictures = bytes(data).split(b"\0\0\1\0")[1:]
    return any(len(picture) > 1 and picture[1] >> 3 & 7 == 3 for picture in pictures)


def _profile(extradata: bytes) -> int:
    """Return profile_idc of H.264, from avcC or the first parameter set after a start code."""
    if extradata[0] == 1:
        return extradata[1]
    match = _H264_SEQUENCE.search(extradata)
    return match[1][0] if match is not None else -1


class NonReferencePictures:
    """Decides, packet by packet, which H.264 pictures a decoder may skip without effect on others.

    These are the non-reference pictures. One flipped bit can give a reference picture the header of
    a non-reference picture; a decoder that skips it then shows wrong pictures without an error.
    `frame_num` reveals this: it counts reference pictures, so that the next picture has the same
    number only after a non-reference picture (ITU-T H.264 §7.4.3).
    """

    def __init__(self, extradata: bytes | None) -> None:
        self._length = _length_size("h264", extradata)
        self._bits = _frame_num_bits(extradata or b"", self._length)
        # The number of the previous picture, if that was left out.
        self._skipped_number: int | None = None

    def begin(self) -> None:
        """Forget the earlier packets."""
        self._skipped_number = None

    def may_leave_out(self, data: memoryview, *, wanted: bool) -> bool | None:
        """Return whether the next packet may be left out.

        Return None if the previous one seems to have been left out wrongly.
        """
        previous, self._skipped_number = self._skipped_number, None
        if not self._bits or (wanted and previous is None):
            return False
        head, is_non_reference = self._first_slice(data)
        if previous is None and not is_non_reference:
            return False
        number = self._number(head)
        # An IDR picture refers to no other picture.
        is_idr = head[:1] and head[0] & 0x1F == 5
        if previous is not None and number != previous and not is_idr:
            return None
        if is_non_reference and not wanted:
            self._skipped_number = number
        return self._skipped_number is not None

    def _first_slice(self, data: memoryview) -> tuple[bytes, bool]:
        """Return the first bytes of the first slice, and whether all slices are non-reference."""
        head, is_non_reference = b"", True
        for start in _h264_starts(data, self._length):
            first = data[start]
            # The highest bit, which is always 0, is part of the comparison.
            if not head and first & 0x9F in (1, 5):
                head = bytes(data[start : start + _H264_HEAD_BYTES])
                if first != 1:
                    return head, False
            elif first != 1 and first & 0x9F not in _H264_UNNEEDED_KINDS:
                is_non_reference = False
        return head, is_non_reference and len(head) > 0

    def _number(self, head: bytes) -> int | None:
        if not head:
            return None
        if b"\0\0\3" in head:
            head = head.replace(b"\0\0\3", b"\0\0")
        bits, bits_left = int.from_bytes(head, "big"), 8 * len(head) - 8
        # first_mb_in_slice, slice_type and pic_parameter_set_id are Exp-Golomb codes.
        for _ in range(3):
            _, bits_left = _exp_golomb(bits, bits_left)
            if bits_left < self._bits:
                return None
        return bits >> (bits_left - self._bits) & ((1 << self._bits) - 1)


def _h264_starts(data: memoryview, length: int) -> list[int]:
    """Return the positions at which the NAL units of a packet begin, all of them."""
    starts, position, size = [], 0, len(data)
    while length and position + length < size:
        start = position + length
        position = start + int.from_bytes(data[position:start], "big")
        starts.append(start)
        # A unit without content ends the list.
        if position == start:
            return starts
    if not length:
        raw = bytes(data)
        position = raw.find(b"\0\0\1")
        while 0 <= position < size - 3:
            starts.append(position + 3)
            position = raw.find(b"\0\0\1", position + 3)
    return starts


def _frame_num_bits(extradata: bytes, length: int) -> int:
    """Return the number of bits of frame_num in the slices of a stream; 0 if unknown."""
    widths = set()
    for sequence in _sequence_parameter_sets(extradata, length):
        bits, bits_left = _to_frame_num(sequence)
        value, bits_after = _exp_golomb(bits, bits_left)
        widths.add(value + 4 if bits_after and value <= 12 else 0)
    return widths.pop() if len(widths) == 1 else 0


def codes_frames_only(extradata: bytes) -> bool:
    """Return whether the header of an H.264 stream allows only whole frames.

    Otherwise a packet may hold a field, that is half a frame.
    """
    sequences = _sequence_parameter_sets(extradata, _length_size("h264", extradata))
    return bool(sequences) and all(map(_has_frames_only, sequences))


def _has_frames_only(sequence: bytes) -> bool:
    """Return frame_mbs_only_flag of a sequence parameter set; False if that is unknown."""
    bits, bits_left = _to_frame_num(sequence)
    _, bits_left = _exp_golomb(bits, bits_left)  # log2_max_frame_num
    order, bits_left = _exp_golomb(bits, bits_left)  # pic_order_cnt_type
    codes = 2 if order == 0 else 1  # log2_max_pic_order_cnt_lsb, max_num_ref_frames
    if order == 1:
        bits_left -= 1  # delta_pic_order_always_zero_flag
        for _ in range(2):  # offset_for_non_ref_pic, offset_for_top_to_bottom_field
            _, bits_left = _exp_golomb(bits, bits_left)
        cycle, bits_left = _exp_golomb(bits, bits_left)
        codes = min(cycle, 255) + 1
    for _ in range(codes):
        _, bits_left = _exp_golomb(bits, bits_left)
    bits_left -= 1  # gaps_in_frame_num_value_allowed_flag
    for _ in range(2):  # width and height in macroblocks
        _, bits_left = _exp_golomb(bits, bits_left)
    return bits_left > 0 and bool(bits >> (bits_left - 1) & 1)


def _sequence_parameter_sets(extradata: bytes, length: int) -> list[bytes]:
    """Return the sequence parameter sets of H.264, without emulation prevention bytes."""
    units, position = extradata.split(b"\0\0\1")[1:], 6
    if length:
        units = []
        for _ in range(int.from_bytes(extradata[5:6]) & 31):
            end = position + 2 + int.from_bytes(extradata[position : position + 2], "big")
            units.append(extradata[position + 2 : end])
            position = end
    return [unit.replace(b"\0\0\3", b"\0\0") for unit in units if unit[:1] and unit[0] & 0x1F == 7]


def _to_frame_num(sequence: bytes) -> tuple[int, int]:
    """Return the bits of a sequence parameter set, and the bits left from log2_max_frame_num on.

    Return (0, 0) if that is unknown.
    """
    head = sequence[4:1024]
    bits, bits_left = int.from_bytes(head, "big"), 8 * len(head)
    _, bits_left = _exp_golomb(bits, bits_left)  # seq_parameter_set_id
    if sequence[1:2] and sequence[1] in _H264_HIGH:
        chroma, bits_left = _exp_golomb(bits, bits_left)
        # separate_colour_plane_flag: slices of separate planes have one more field.
        bits_left -= chroma == 3
        if chroma == 3 and bits >> max(bits_left, 0) & 1:
            return 0, 0
        for _ in range(2):  # bit_depth_luma, bit_depth_chroma
            _, bits_left = _exp_golomb(bits, bits_left)
        bits_left -= 2  # qpprime_y_zero_transform_bypass_flag, seq_scaling_matrix_present_flag
        if bits_left > 0 and bits >> bits_left & 1:
            bits_left = _skip_scaling_lists(bits, bits_left, 12 if chroma == 3 else 8)
    return bits, bits_left


def _skip_scaling_lists(bits: int, bits_left: int, count: int) -> int:
    """Return the bits left after the scaling lists that begin `bits_left` bits from the end."""
    for number in range(count):
        bits_left -= 1
        # Zero means that the list ends here.
        last = following = 8 if bits_left > 0 and bits >> bits_left & 1 else 0
        for _ in range(16 if number < 6 else 64):
            if following:
                code, bits_left = _exp_golomb(bits, bits_left)
                following = (last + (code + 1) // 2 * (1 if code & 1 else -1)) % 256
                last = following or last
    return bits_left


def shown_test(codec: str) -> Callable[[memoryview], bool] | None:
    """Return a function that checks whether a packet gives a frame to show.

    Return None if all packets do, as in all codecs except VP8 and VP9.
    """
    if codec == "vp8":
        return lambda data: bool(data[0] & 0x10)
    if codec == "vp9":
        return lambda data: _vp9(data[0])[0] or _vp9(data[0])[2] or data[-1] & 0xE0 == 0xC0
    return None


def _vp9(first: int) -> tuple[bool, bool, bool]:
    """Return (show_existing_frame, is inter, show_frame) from the first byte of a VP9 frame."""
    profile = (first >> 5 & 1) | (first >> 4 & 1) << 1
    shift = 3 if profile < 3 else 2
    existing = bool(first >> shift & 1)
    return existing, existing or bool(first >> (shift - 1) & 1), bool(first >> (shift - 2) & 1)


def _length_size(codec: str, extradata: bytes | None) -> int:
    """Return the size in bytes of the length before each NAL unit; 0 for start codes."""
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
    """Yield the first NAL units of a packet, each after a start code or `length` bytes of size.

    A unit ends where the data ends.
    """
    position = 0
    if length:
        data = data[: 1 << 16]
        for _ in range(_MAX_NAL_UNITS):
            start = position + length
            if start >= len(data):
                return
            position = start + int.from_bytes(data[position:start], "big")
            yield data[start : max(position, start + 1)]
        return
    raw = bytes(data[: 1 << 16])
    position = raw.find(b"\x00\x00\x01")
    for _ in range(_MAX_NAL_UNITS):
        if position < 0 or position + 3 >= len(raw):
            return
        end = raw.find(b"\x00\x00\x01", position + 3)
        # Two start codes may follow each other directly.
        if end != position + 3:
            yield memoryview(raw)[position + 3 : end if end > 0 else len(raw)]
        position = end
