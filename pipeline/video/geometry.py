"""Convert a decoded frame to the RGB picture that a viewer sees, at the requested size.

The container's cropping, rotation and mirroring (display matrix) are applied, and non-square pixels
are made square. swscale uses the colour matrix, range and chroma position of the stream. All stages
use this resizer, because resizers differ by 1–2.6 grey levels on average.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.plane import VideoPlane
from av.video.reformatter import Interpolation, VideoReformatter
from pydantic import Field, PositiveInt

from ..common.errors import VideoError
from ..common.settings import Options
from .container import Margins
from .region import Region

# The limit for a rendered picture: a 16384x1 frame with short side 256 would be 1 GB.
_MAX_PIXELS = 2**26
# A header with a pixel aspect ratio beyond this, or its inverse, is invalid: 1 is used.
_MAX_PIXEL_ASPECT = 16
_FILTERS = {
    "bilinear": Interpolation.BILINEAR,
    "bicubic": Interpolation.BICUBIC,
    "area": Interpolation.AREA,
}
_PIL_FILTERS = {"pil-bilinear": "BILINEAR", "pil-bicubic": "BICUBIC", "pil-area": "BOX"}


@dataclass(frozen=True)
class Orientation:
    """The orientation of a stored picture for display: transposed first, then flipped."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def from_frame(cls, frame: av.VideoFrame) -> Orientation:
        """Return the orientation of the display matrix; angles are rounded to right angles.

        The matrix maps a stored point (p, q) to (a·p + c·q, b·p + d·q), x to the right and y down
        (ISO 14496-12 §6.2.2; FFmpeg libavutil/display.h).
        """
        try:
            # A mapping by type, although PyAV annotates it differently.
            side_data: Any = frame.side_data
        except ValueError:
            # Side data of a kind unknown to this PyAV, such as that of Apple's spatial video, hides
            # all other side data. The angle is still available, mirroring is not.
            turn = math.radians(frame.rotation)
            return cls._from_matrix(math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn))
        if SideData.DISPLAYMATRIX not in side_data:
            return _UPRIGHT
        raw = bytes(side_data[SideData.DISPLAYMATRIX])
        if len(raw) < 20:
            return _UPRIGHT
        a, b, _, c, d = struct.unpack("5i", raw[:20])
        return cls._from_matrix(a, b, c, d)

    @classmethod
    def _from_matrix(cls, a: float, b: float, c: float, d: float) -> Orientation:
        if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
            return cls(False, flip_rows=d < 0, flip_columns=a < 0)
        return cls(True, flip_rows=b < 0, flip_columns=c < 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return a view of the stored image [h, w, 3] as it is displayed."""
        if self.transpose:
            image = image.transpose(1, 0, 2)
        if self.flip_rows:
            image = image[::-1]
        if self.flip_columns:
            image = image[:, ::-1]
        return image


_UPRIGHT = Orientation()


def pixel_aspect(ratio: Fraction | None) -> Fraction:
    """Return the width of a pixel over its height; 1 if unknown or invalid."""
    if not ratio or not Fraction(1, _MAX_PIXEL_ASPECT) <= ratio <= _MAX_PIXEL_ASPECT:
        return Fraction(1)
    return Fraction(ratio)


def inner_size(frame: av.VideoFrame, margins: Margins) -> tuple[int, int]:
    """Return (width, height) without the margins; they are ignored if nothing would remain."""
    width = frame.width - margins.left - margins.right
    height = frame.height - margins.top - margins.bottom
    return (width, height) if width > 0 and height > 0 else (frame.width, frame.height)


def display_size(
    width: int, height: int, aspect: Fraction, orientation: Orientation
) -> tuple[int, int]:
    """Return (width, height) on display in square pixels; the stored height is kept."""
    width = max(1, round(width * aspect))
    return (height, width) if orientation.transpose else (width, height)


class View(Options):
    """A resize of the displayed picture, then an optional square center crop.

    `resize`: The short side (the long side follows, rounded down as in torchvision) or (height,
        width). `interpolation`: swscale's filter, or with the prefix `pil-` the antialiased filter
        of PIL, which image libraries use. The frame is then converted to RGB before the resize.
    """

    resize: PositiveInt | tuple[PositiveInt, PositiveInt]
    crop: int | None = Field(default=None, ge=1)
    interpolation: Literal[
        "bilinear", "bicubic", "area", "pil-bilinear", "pil-bicubic", "pil-area"
    ] = "bilinear"

    def scaled(self, display_h: int, display_w: int) -> tuple[int, int]:
        """Return (height, width) after the resize, before the crop."""
        if isinstance(self.resize, tuple):
            return self.resize
        if display_h <= display_w:
            return self.resize, max(self.resize, int(self.resize * display_w / display_h))
        return max(self.resize, int(self.resize * display_h / display_w)), self.resize

    def shape(self, display_h: int, display_w: int) -> tuple[int, int]:
        """Return (height, width) of the result."""
        return (self.crop, self.crop) if self.crop else self.scaled(display_h, display_w)

    def region(self, display_h: int, display_w: int) -> Region:
        """Return the rectangle of the displayed picture that the result shows.

        It is larger than the picture if the crop pads the picture.
        """
        sized = self.scaled(display_h, display_w)
        if not self.crop:
            return Region(0.0, 0.0, 1.0, 1.0)
        top, left = (
            -((self.crop - length) // 2) if length < self.crop else round((length - self.crop) / 2)
            for length in sized
        )
        return Region.from_pixels(top, left, (self.crop, self.crop), sized)

    @property
    def fixed_shape(self) -> tuple[int, int] | None:
        """The (height, width) of every result, None if it depends on the video."""
        if self.crop:
            return self.crop, self.crop
        return self.resize if isinstance(self.resize, tuple) else None


class Renderer:
    """Renders frames of one stream, with one swscale context per view and one thread.

    orientation: The orientation of all frames; by default that of each frame's display matrix.
    """

    def __init__(
        self,
        aspect: Fraction = Fraction(1),
        margins: Margins = Margins(),  # noqa: B008
        orientation: Orientation | None = None,
    ) -> None:
        self._aspect, self._margins, self._orientation = aspect, margins, orientation
        self._reformatters: dict[View | None, VideoReformatter] = {}

    def render(
        self,
        frame: av.VideoFrame,
        view: View | None,
        *,
        out: np.ndarray | None = None,
        display: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Return uint8 [h, w, 3] RGB; `display` (height, width) replaces the frame's size."""
        orientation = self._orientation or Orientation.from_frame(frame)
        if any(self._margins):
            frame = self._crop_margins(frame)
        if display is None:
            width, height = display_size(frame.width, frame.height, self._aspect, orientation)
        else:
            height, width = display
        sized = view.scaled(height, width) if view is not None else (height, width)
        if sized[0] * sized[1] > _MAX_PIXELS:
            raise VideoError(
                f"too long and thin: {width}x{height} would become {sized[1]}x{sized[0]}"
            )
        rows, columns = sized[::-1] if orientation.transpose else sized
        if view is not None and view.interpolation in _PIL_FILTERS:
            # The picture is oriented before the resize, as in image libraries.
            picture = orientation.apply(self._scale(frame, None, frame.width, frame.height))
            image = _pil_resize(picture, sized, _PIL_FILTERS[view.interpolation])
        else:
            image = orientation.apply(self._scale(frame, view, columns, rows))
        if view is not None and view.crop:
            image = _center_crop(image, view.crop)
        if out is None:
            return np.array(image)
        out[...] = image
        return out

    def _crop_margins(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return the frame in RGB, without its margins."""
        width, height = inner_size(frame, self._margins)
        if (width, height) == (frame.width, frame.height):
            return frame
        top, left = self._margins.top, self._margins.left
        picture = self._scale(frame, None, frame.width, frame.height)
        inner = np.ascontiguousarray(picture[top : top + height, left : left + width])
        return av.VideoFrame.from_ndarray(inner, "rgb24")

    def _scale(
        self, frame: av.VideoFrame, view: View | None, width: int, height: int
    ) -> np.ndarray:
        """Return RGB [height, width, 3], if possible as a view of swscale's buffer."""
        if frame.interlaced_frame:
            frame = _without_interlaced_flag(frame)
        scaler = self._reformatters.setdefault(view, VideoReformatter())
        kind = _FILTERS[view.interpolation if view is not None else "bilinear"]
        # At odd widths swscale has no fast conversion to packed RGB; its conversion to planes takes
        # a third of the time. Both give the same bits if a row is computed from more than two rows.
        planar = width % 2 == 1 and (
            kind == Interpolation.BICUBIC
            or (kind == Interpolation.BILINEAR and height < frame.height)
        )
        try:
            rgb = scaler.reformat(
                frame,
                width=width,
                height=height,
                format="gbrp" if planar else "rgb24",
                interpolation=kind,
                dst_color_range="JPEG",
                threads=1,
            )
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(
                f"pixel format {frame.format.name} cannot be converted to RGB"
            ) from error
        if planar:
            green, blue, red = (plane_rows(plane, height)[:, :width] for plane in rgb.planes)
            return np.stack((red, green, blue), axis=-1)
        return plane_rows(rgb.planes[0], height)[:, : width * 3].reshape(height, width, 3)


def plane_rows(plane: VideoPlane, height: int) -> np.ndarray:
    """Return the bytes of a plane [height, line size]."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(height, plane.line_size)


def render(frame: av.VideoFrame, view: View | None, aspect: Fraction = Fraction(1)) -> np.ndarray:
    """Render one frame as uint8 [h, w, 3] RGB; for many frames keep a Renderer."""
    return Renderer(aspect).render(frame, view)


def _pil_resize(image: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Resize [h, w, 3] to `size` (height, width) as PIL does, antialiased."""
    # Imported here: few stores need PIL, and every decoding process imports this module.
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size[::-1], Image.Resampling[name]))


def _center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Crop [h, w, 3] to [size, size, 3] at the centre; pad a smaller picture with black first."""
    height, width = image.shape[:2]
    if height < size or width < size:
        padded = np.zeros((max(height, size), max(width, size), 3), image.dtype)
        top, left = (padded.shape[0] - height) // 2, (padded.shape[1] - width) // 2
        padded[top : top + height, left : left + width] = image
        image, (height, width) = padded, padded.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def _without_interlaced_flag(frame: av.VideoFrame) -> av.VideoFrame:
    """Return a copy without the interlaced flag, so that swscale does not separate the fields."""
    copy = av.VideoFrame(frame.width, frame.height, frame.format.name)
    copy.colorspace, copy.color_range = frame.colorspace, frame.color_range
    for source, target in zip(frame.planes, copy.planes, strict=True):
        source_rows = np.frombuffer(memoryview(source), np.uint8).reshape(-1, abs(source.line_size))
        target_rows = np.frombuffer(memoryview(target), np.uint8).reshape(-1, target.line_size)
        num_bytes = min(source_rows.shape[1], target_rows.shape[1])
        target_rows[:, :num_bytes] = source_rows[:, :num_bytes]
    return copy
