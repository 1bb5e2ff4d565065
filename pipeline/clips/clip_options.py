"""Options of a clip: size, resize, mirror, crop. torch is imported when a clip is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from ..common.settings import CliOption, Options
from ..video.region import Region

# Mean and standard deviation by the number of channels of a clip: 3 for RGB in 0 … 1 (Kinetics, as
# torchvision's video models expect it), 2 for flow in pixels, x and y (Caffe2's operator). Clips
# are normalised with them, and exported students record them.
NORMALIZATION: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    3: ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)),
    2: ((0.0046635, 0.0046261), (0.972347, 0.755146)),
}


if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..video.geometry import View


@dataclass(frozen=True)
class Crop:
    """Where a training clip is cut out.

    Attributes:
        top: Share in [0, 1) of the free height.
        left: Share in [0, 1) of the free width.
        flip: Whether the clip is mirrored.
        zoom: Where in the view's range `scale` the resize is, as a share in [0, 1).
    """

    top: float
    left: float
    flip: bool
    zoom: float = 0.0


class ClipView(Options):
    """A square `size`, cropped from a resize (height, width), mirrored with probability `flip`.

    Without `resize`: 128×171 for 112, and in proportion for other sizes (VMZ and torchvision
    references). `scale`: in training the resize is larger by a factor drawn evenly from this range,
    as in (1.0, 1.25); the paper does not use it. Nothing is mirrored outside training.
    """

    size: Annotated[int, CliOption(group="Sampling", metavar="PX")] = Field(
        default=112, ge=1, description="side of a clip's crop"
    )
    resize: tuple[int, int] | None = None
    flip: float = Field(default=0.5, ge=0, le=1)
    scale: tuple[float, float] = Field(
        default=(1.0, 1.0), description="range of a random factor on resize"
    )

    @field_validator("scale")
    @classmethod
    def _range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 16:
            raise ValueError(
                f"scale must be two factors, the smaller first, as in [1.0, 1.25], got {list(scale)}"
            )
        return scale

    def frame_view(self, crop: Crop | None = None) -> View:
        """Return the resize that the decoder does for a clip with this crop, see `frame_size`."""
        from ..video.geometry import View

        return View(resize=self.frame_size(crop))

    def frame_size(self, crop: Crop | None = None) -> tuple[int, int]:
        """Return height and width that frames are resized to for a clip with this crop.

        Raises:
            ValueError: The crop does not fit into the resize.
        """
        height, width = self.resize or (round(128 * self.size / 112), round(171 * self.size / 112))
        least = min(1.0, self.scale[0])
        if round(least * min(height, width)) < self.size:
            shrunk = f" times scale {least:g}" if least < 1 else ""
            raise ValueError(
                f"resize {height}x{width}{shrunk} is smaller than the crop of {self.size}"
            )
        low, high = self.scale
        factor = 1.0 if crop is None else low + crop.zoom * (high - low)
        return round(factor * height), round(factor * width)

    def cut(self, images: np.ndarray, crop: Crop | None) -> torch.Tensor:
        """Crop frames uint8 [T, H, W, C] to uint8 [C, T, size, size]; None crops the middle."""
        from .transforms import center_crop, crop_and_flip

        if crop is None:
            return center_crop(images, self.size)
        top, left = self._corner(images.shape[1:3], crop)
        return crop_and_flip(images, top, left, self.size, crop.flip)

    def region(self, crop: Crop | None) -> Region:
        """Return the rectangle of the displayed frame that a clip with this crop shows.

        Whether the clip is mirrored does not move it.
        """
        height, width = self.frame_view(crop).scaled(1, 1)
        if crop is None:
            top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        else:
            top, left = self._corner((height, width), crop)
        return Region.from_pixels(top, left, (self.size, self.size), (height, width))

    def _corner(self, shape: tuple[int, ...], crop: Crop) -> tuple[int, int]:
        """Return the top and left of a crop in a picture (height, width)."""
        height, width = shape
        return int(crop.top * (height - self.size + 1)), int(crop.left * (width - self.size + 1))

    def cuts(self, images: np.ndarray, crops: Literal[1, 3]) -> list[torch.Tensor]:
        """Cut crops uint8 [3, T, size, size] of one clip.

        One is the middle; three are the beginning, middle and end of the longer side.
        """
        from .transforms import center_crop, crop_and_flip

        middle = center_crop(images, self.size)
        if crops == 1:
            return [middle]
        down, across = (length - self.size for length in images.shape[1:3])
        ends = [(0, round(across / 2)), (down, round(across / 2))]
        if across >= down:
            ends = [(round(down / 2), 0), (round(down / 2), across)]
        first, last = (crop_and_flip(images, top, left, self.size, False) for top, left in ends)
        return [first, middle, last]
