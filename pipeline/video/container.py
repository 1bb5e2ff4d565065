"""Open a file as a real container of video, or explain in plain words why that fails.

FFmpeg treats playlists as media and would follow them to other files and to the network, so every
open goes through the whitelist here, with an absolute path: a file called `http:x.mp4` or `-a.mp4`
is then just a file.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import io
import os
import re
import stat
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from ..common.errors import DecoderError, VideoError
from .bitstream import INTRA_ONLY

# Demuxers of formats that contain their own frames. Formats that open further files or addresses
# are left out on purpose: concat, hls, dash, imf, sdp, rtsp, image2 and others.
FORMATS = (
    "3gp,apng,asf,av1,avi,avs2,avs3,bink,cavsvideo,dhav,dirac,dnxhd,dv,evc,flic,flv,gif,gxf,h261,h263,h264,"
    "hevc,ivf,kux,live_flv,m4v,matroska,mgsts,mjpeg,mkv,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nsv,nut,nuv,obu,"
    "ogg,rm,roq,smk,vc1,vc1test,vvc,webm,wtv,yuv4mpegpipe"
)
# The limit for one frame: a 16K frame fits. A header that claims more is refused before decoding.
MAX_PIXELS = 2**27
DIGEST_BYTES = 2**16
_MAX_BOXES = 64  # that are read from an ISO base media file
_NOT_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails
# Titles that are not UTF-8 must not keep a file from being opened. PyAV 19 replaces such bytes
# itself.
_LENIENT_METADATA: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
)
_LIMITS = {
    errno.EMFILE: "too many open files in this process: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine (fs.file-max)",
}
_CAN_CROP = frozenset(("mov", "matroska"))
_PLAYLIST_STARTS = (b"ffconcat", b"#extm3u", b"[playlist]", b"<smil", b"<?xml", b"<mpd", b"v=0")


class Margins(NamedTuple):
    """Pixels to cut off the stored picture at each side."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def open_container(path: str, *, header_only: bool = False) -> InputContainer:
    """Open `path` for reading, and no other file; raise VideoError with the reason.

    header_only: Decode no frame to learn what the header lacks, which takes most of the time.
    """
    absolute = os.path.abspath(path)
    if file_size(absolute) == 0:
        raise VideoError("empty file")
    options = {
        "format_whitelist": FORMATS,
        "protocol_whitelist": "file",
        "max_pixels": str(MAX_PIXELS),
        "enable_drefs": "0",
    }
    if header_only:
        # Libavformat then finds no decoder to try.
        options["codec_whitelist"] = "none"
    try:
        return av.open(absolute, mode="r", options=options, **_LENIENT_METADATA)
    except (FFmpegError, OSError, ValueError, MemoryError, UnicodeError) as error:
        raise VideoError(_why_not_opened(absolute, error)) from error


def is_mp4(path: str) -> bool:
    """Return whether the file begins as an mp4."""
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read(8) or b"")[4:] == b"ftyp"
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error


def file_size(path: str) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        VideoError: It is not a regular file. Opening a pipe, for example, would block.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError("is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("is not a regular file")
    return status.st_size


def video_stream(container: InputContainer) -> VideoStream:
    """Return the best video stream by FFmpeg's choice, without cover art, decoded in one thread."""
    streams = [s for s in container.streams.video if not s.disposition & _NOT_PICTURES]
    if not streams:
        if container.streams.video:
            raise VideoError("no video stream (cover art only)")
        kinds = sorted({s.type for s in container.streams})
        if kinds:
            raise VideoError(f"no video stream ({' and '.join(kinds)} only)")
        raise VideoError("no video stream")
    readable = [s for s in streams if s.codec_context is not None]
    if not readable:
        raise VideoError("no decoder for the codec of the video stream")
    best = container.streams.best("video")
    stream = next((s for s in readable if best is not None and s.index == best.index), readable[0])
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        size = f"{context.width}x{context.height}"
        raise VideoError(
            f"the header claims frames of {size}, at most {MAX_PIXELS} pixels are allowed"
        )
    context.options = {"max_pixels": str(MAX_PIXELS)}
    if context.codec.canonical_name in INTRA_ONLY:
        # Make a damaged picture an error. It would show what any earlier picture left in the
        # decoder's buffer.
        context.options = {**context.options, "err_detect": "explode"}
    # Frame threads cost more than they gain and can deadlock (FFmpeg logging).
    context.thread_type = "NONE"
    context.thread_count = 1
    return stream


def rational(value: Any) -> Fraction | None:
    """Return a rational number of PyAV as a Fraction, or None if it is unknown.

    PyAV 15 to 18 give a Fraction or None; PyAV 19 gives an AVRational, 0/1 or n/0 if unknown.
    """
    if value is None or not value.denominator or not value.numerator:
        return None
    return Fraction(value.numerator, value.denominator)


def cropping(stream: VideoStream) -> Margins:
    """Return the margins by which the container crops the stored picture.

    They are `clap` in mp4 and PixelCrop in Matroska. FFmpeg (7.1 and newer) reads them and leaves
    their application to the player.
    """
    if not _CAN_CROP & set(stream.container.format.name.split(",")):
        return Margins()
    # PyAV 19 and newer has this attribute.
    side_data: Any = getattr(stream.codec_context, "coded_side_data", None)
    if side_data is None:
        return _cropping_by_remux(stream)
    raw = bytes(side_data.get("frame_cropping", b""))
    return Margins(*struct.unpack("<4I", raw)) if len(raw) == 16 else Margins()


def _cropping_by_remux(stream: VideoStream) -> Margins:
    """Return the margins with PyAV 15 to 18, which do not expose them.

    They are read from the header of a Matroska file that is written without packets.
    """
    header = io.BytesIO()
    try:
        with av.open(header, "w", format="matroska") as copy:
            copy.add_stream_from_template(stream)
            copy.start_encoding()
    except (FFmpegError, ValueError):  # a codec that Matroska does not take
        return Margins()
    sizes = []
    for kind in (b"\xbb", b"\xaa", b"\xcc", b"\xdd"):  # PixelCropTop, -Bottom, -Left, -Right
        # An id of two bytes, 0x80 + the number of bytes that follow, a big-endian number.
        match = re.search(
            rb"\x54" + kind + rb"(?:\x81(.)|\x82(..)|\x83(...))", header.getvalue(), re.DOTALL
        )
        sizes.append(
            int.from_bytes(b"".join(group or b"" for group in match.groups()), "big")
            if match
            else 0
        )
    return Margins(*sizes)


def digest(path: str) -> str:
    """Return the identity of a file: hex of blake2b-16 over its size, first and last 64 KiB."""
    file_size(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(DIGEST_BYTES)
            file.seek(max(0, size - DIGEST_BYTES))
            tail = file.read(DIGEST_BYTES)
    except (OSError, ValueError) as error:
        raise VideoError(reason(error)) from error
    return hashlib.blake2b(str(size).encode() + b"\0" + head + tail, digest_size=16).hexdigest()


def same_content(a: str, b: str) -> bool | None:
    """Compare every byte of two files, once per process and pair; None if one cannot be read.

    Digests distinguish compressed videos, but not raw videos that begin and end in black.
    """
    try:
        return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)
    except (OSError, ValueError):
        return None


def reason(error: BaseException) -> str:
    """Describe an exception of the system or of FFmpeg in one plain clause, without the path.

    Raises:
        DecoderError: The cause is a limit of this process or machine, not a file.
    """
    if isinstance(error, VideoError):
        return str(error)
    if (limit := _LIMITS.get(getattr(error, "errno", None) or 0)) is not None:
        raise DecoderError(limit) from error
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return "needs more memory than allowed"
    if isinstance(error, av.error.InvalidDataError):
        return "damaged data"
    if isinstance(error, av.error.EOFError):
        return "the data ends too early"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).lower()


def _why_not_opened(path: str, error: BaseException) -> str:
    """Name the common causes behind FFmpeg's "Invalid data found" and "Invalid argument"."""
    if (
        isinstance(error, (FileNotFoundError, PermissionError, MemoryError))
        or getattr(error, "errno", 0) in _LIMITS
    ):
        return reason(error)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        boxes = _top_level_boxes(path) if head[4:8] == b"ftyp" else []
    except OSError as read_error:
        return reason(read_error)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PLAYLIST_STARTS):
        return "a playlist or text file, not a video"
    if boxes and b"moov" not in boxes:
        return "no index (moov box): the recording or download was cut off"
    if boxes:
        return "the mp4 header is damaged"
    if isinstance(error, av.error.InvalidDataError | ValueError):
        return "not a video container FFmpeg knows"
    return f"the header is damaged, cut off or not supported ({reason(error)})"


def _top_level_boxes(path: str) -> list[bytes]:
    """Return the types of the first boxes of an ISO base media file."""
    types: list[bytes] = []
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        position = 0
        while position + 8 <= size and len(types) < _MAX_BOXES:
            file.seek(position)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            types.append(header[4:8])
            if length < 8:  # 0: to the end of the file
                break
            position += length
    return types
