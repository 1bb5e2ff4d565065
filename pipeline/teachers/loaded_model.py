"""The model and forward pass that every family of teachers returns, and the options they share.

Shapes: B images, h w cells of a map, K classes, D features, G cells per side of a grid.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from ..common.config import CONF
from ..common.documents import is_utf8, load_yaml, read_text
from ..common.errors import ListError, TeacherError
from ..common.settings import Options
from ..store.encoding import shares
from ..store.store_options import Output
from ..video.geometry import View
from .teacher_options import TeacherSpec

Forward = Callable[[Tensor, tuple[str, ...]], Mapping[str, Tensor]]
"""One forward pass: images [B, 3, h, w] and the names of outputs → logits [B, K], features [B, D],
and for a model that `maps` the feature map [B, D, h, w] before pooling."""
MAP = "map"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(Options):
    """The preprocessing of a video frame: a view of the frame, then (pixel − mean) / std."""

    view: View
    mean: tuple[float, float, float]
    """Mean of each channel of RGB, in pixel values from 0 to 255."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, in pixel values from 0 to 255."""


@dataclass(frozen=True)
class LoadedModel:
    """A built module with the preprocessing and description of a teacher."""

    architecture: str
    weights: str
    """The name of the weights: `IMAGENET1K_V1`, `pretrained`, `file`, …"""
    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    """The class names; None if they are unknown, for `class 0`, `class 1`, …"""
    file: str | None = None
    """The name of the weights file, None without one."""
    file_sha256: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the builder."""
    offers: tuple[Output, ...] = ("logits",)
    """The outputs that the model has."""
    forward: Forward | None = None
    """The forward pass; None if the module returns its one output, or outputs by name."""
    maps: bool = False
    """Whether the forward pass also returns the last feature map, as the output `map`."""
    pooling: str | None = None
    """The pooling of the features, or the layer whose input they are; part of their identity."""


def preprocessing(
    view: View,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Preprocessing:
    """Return the preprocessing for a mean and std of pixels in 0–1."""
    return Preprocessing(
        view=view,
        mean=tuple(round(255 * value, 6) for value in mean),
        std=tuple(round(255 * value, 6) for value in std),
    )


VIEW_OPTIONS = ("input_size", "resize", "interpolation", "resize_backend", "mean", "std")
OWN_OPTIONS = ("name", "classes", *VIEW_OPTIONS)
BACKENDS = ("swscale", "pil")


def builder_options(spec: TeacherSpec) -> dict[str, Any]:
    """Return the options of the model's builder, parsed as `true`, `3`, `0.5`, `[1, 2]` or text."""
    return {key: _value(text) for key, text in spec.options.items() if key not in OWN_OPTIONS}


def refuse_builder_options(spec: TeacherSpec) -> None:
    """Refuse builder options for a teacher whose builder has none.

    Raises:
        TeacherError: An option is not one of distinit.
    """
    for key in builder_options(spec):
        raise TeacherError(
            f"teacher {spec.name!r} has no option {key!r}; allowed: {', '.join(sorted(OWN_OPTIONS))}"
        )


def apply_view_options(base: Preprocessing, spec: TeacherSpec) -> Preprocessing:
    """Return `base` with the input size, resize, interpolation, mean and std that the user set.

    Raises:
        TeacherError: A value is not allowed, or the view has no fixed size.
    """
    options = spec.options
    resize: int | tuple[int, int] = base.view.resize
    crop = base.view.crop
    if "input_size" in options:
        crop = _integer(spec, "input_size")
        if "resize" not in options:
            # The usual ratio: a short side of 256 around a crop of 224.
            resize = round(crop * 256 / 224)
    if "resize" in options:
        pair = re.fullmatch(r"(\d+)x(\d+)", options["resize"])
        resize = (int(pair[1]), int(pair[2])) if pair else _integer(spec, "resize")
        if pair and "input_size" not in options:
            crop = None
    try:
        view = View.model_validate(
            {"resize": resize, "crop": crop, "interpolation": _interpolation(base.view, spec)}
        )
    except ValidationError as error:
        raise TeacherError(f"teacher {spec.name!r}: {error.errors()[0]['msg']}") from None
    if view.fixed_shape is None:
        raise TeacherError(
            f"teacher {spec.name!r}: a short side of {view.resize} alone has no fixed size; set input_size as well"
        )
    changed = {
        key: tuple(round(255 * value, 6) for value in _three_numbers(spec, key))
        for key in ("mean", "std")
        if key in options
    }
    return Preprocessing.model_validate(
        {"view": view, "mean": base.mean, "std": base.std, **changed}
    )


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one per line.

    Lines of the form `/a/airfield 0`, as those of Places365, are sorted by their number.

    Raises:
        TeacherError: The file cannot be read, is not UTF-8 or is empty.
    """
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ListError) as error:
        raise TeacherError(f"classes file {path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not is_utf8(line):
            raise TeacherError(
                f"classes file {path}: line {number} is not UTF-8; save it as text in UTF-8"
            )
    names = [line for line in lines if line]
    if not names:
        raise TeacherError(f"classes file {path}: holds no name")
    numbered = [re.fullmatch(r"(.+\S)\s+(\d+)", name) for name in names]
    if all(numbered) and sorted(int(match[2]) for match in numbered if match) == list(
        range(len(names))
    ):
        ordered = sorted((int(match[2]), match[1]) for match in numbered if match)
        names = [re.sub(r"^/[a-z]/", "", name) for _, name in ordered]
    return tuple(names)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the 1000 classes of ImageNet-1K in the standard order, under torchvision's names.

    Some names occur twice: crane, maillot.
    """
    # The names are read from a file, since importing torchvision takes seconds, which
    # EfficientNet-Lite does not need.
    return tuple((CONF / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def _value(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _interpolation(view: View, spec: TeacherSpec) -> str:
    """Return the name of the interpolation in `View`, where those of PIL have a prefix."""
    name = spec.options.get("interpolation", view.interpolation)
    backend = spec.options.get("resize_backend")
    if backend is None:
        return name
    if backend not in BACKENDS:
        raise TeacherError(
            f"teacher {spec.name!r}: option resize_backend is {backend!r}, allowed: {', '.join(BACKENDS)}"
        )
    name = name.removeprefix("pil-")
    return f"pil-{name}" if backend == "pil" else name


def _integer(spec: TeacherSpec, key: str) -> int:
    text = spec.options[key]
    if not text.isdecimal() or int(text) < 1:
        also = " or HEIGHTxWIDTH" if key == "resize" else ""
        raise TeacherError(
            f"teacher {spec.name!r}: option {key} is {text!r}, allowed: pixels, 1 or more{also}"
        )
    return int(text)


def _three_numbers(spec: TeacherSpec, key: str) -> tuple[float, ...]:
    text = spec.options[key]
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    is_valid = len(numbers) == 3 and all(0 <= number <= 1 for number in numbers)
    if not is_valid or (key == "std" and min(numbers) == 0):
        minimum = "above 0" if key == "std" else "0"
        raise TeacherError(
            f"teacher {spec.name!r}: option {key} is {text!r}, allowed: one or three numbers a,b,c from {minimum} to "
            f"1, for pixels in 0–1; divide values for pixels in 0–255 by 255"
        )
    return numbers


_POOLING_LAYERS = ("avgpool", "_avg_pooling")


def tapped(module: nn.Module, layer: str) -> Forward:
    """Return a forward pass whose features are the input [B, D] of `layer`, the classifier.

    The logits are the output of the module. The feature map is the input of the layer that pools
    it, if there is one.
    """
    # Each thread has its own inputs, since several batches run through one module at once.
    layer_inputs = threading.local()

    def save_features(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        layer_inputs.features = inputs[0]

    def save_map(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        layer_inputs.map = inputs[0]

    module.get_submodule(layer).register_forward_pre_hook(save_features)
    if (pooling := pooling_layer(module)) is not None:
        module.get_submodule(pooling).register_forward_pre_hook(save_map)

    def forward(images: Tensor, outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        results = {"logits": module(images)}
        results["features"] = layer_inputs.features
        layer_inputs.features = None
        if MAP in outputs:
            results[MAP] = layer_inputs.map
        layer_inputs.map = None
        return results

    return forward


def pooling_layer(module: nn.Module) -> str | None:
    """Return the name of the layer that pools the last feature map, or None."""
    return next((name for name, _ in module.named_children() if name in _POOLING_LAYERS), None)


def grid_cells(maps: Tensor, grid: int) -> Tensor:
    """Average maps [B, D, h, w] over G × G cells of equal area; return [B, G·G·D], row by row.

    If the border of two cells is inside a position of the map, each cell gets its share of the
    area, so that the mean of all cells is that of the map.
    """
    row_shares, column_shares = (
        torch.stack(
            [torch.from_numpy(shares(i / grid, (i + 1) / grid, length)) for i in range(grid)]
        ).to(maps)
        for length in maps.shape[2:]
    )
    return torch.einsum("gh,bdhw,kw->bgkd", row_shares, maps, column_shares).flatten(1)


def last_linear(module: nn.Module) -> str | None:
    """Return the name of a module's last linear layer; None if it has none."""
    # Subclasses of nn.Linear are inside other layers, which do not run them as layers.
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return names[-1] if names else None
