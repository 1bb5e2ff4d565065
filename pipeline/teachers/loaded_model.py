"""What every family of teachers hands over: a model, its forward pass, and the options they share.

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
"""One forward pass: images [B, 3, h, w], outputs asked for → logits [B, K], features [B, D], and
where it `maps` the map [B, D, h, w] that features are pooled from."""
MAP = "map"

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocessing(Options):
    """From a video frame to a teacher's input: a view of the frame, then (pixel − mean) / std."""

    view: View
    mean: tuple[float, float, float]
    """In pixel values, 0–255, RGB."""
    std: tuple[float, float, float]


@dataclass(frozen=True)
class LoadedModel:
    """A built module with everything that a teacher is made of."""

    architecture: str
    weights: str
    """The weights' name: `IMAGENET1K_V1`, `pretrained`, `file`, …"""
    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    """None where nobody knows them: then `class 0`, `class 1`, …"""
    file: str | None = None
    file_sha256: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments that reached the builder."""
    offers: tuple[Output, ...] = ("logits",)
    """What the model can give."""
    forward: Forward | None = None
    """None where the module's own output is the one output, or a mapping of outputs by name."""
    maps: bool = False
    """Whether `forward` also gives the last feature map, as the output `map`."""
    pooling: str | None = None
    """How features are taken: the pooling, or the layer whose input they are. In their identity."""


def preprocessing(
    view: View,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Preprocessing:
    """Preprocessing from the habitual mean and std of pixels in 0–1."""
    return Preprocessing(
        view=view,
        mean=tuple(round(255 * value, 6) for value in mean),
        std=tuple(round(255 * value, 6) for value in std),
    )


VIEW_OPTIONS = ("input_size", "resize", "interpolation", "resize_backend", "mean", "std")
OWN_OPTIONS = ("name", "classes", *VIEW_OPTIONS)
BACKENDS = ("swscale", "pil")


def builder_options(spec: TeacherSpec) -> dict[str, Any]:
    """Parse the options for the model's builder: `true`, `3`, `0.5`, `[1, 2]` or text."""
    return {key: _value(text) for key, text in spec.options.items() if key not in OWN_OPTIONS}


def refuse_builder_options(spec: TeacherSpec) -> None:
    """Refuse options for the builder, for teachers whose builder is fixed.

    Raises:
        TeacherError: an option that is not distinit's own.
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
            # The habitual margin: a short side of 256 around a crop of 224.
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
        key: tuple(round(255 * value, 6) for value in _three(spec, key))
        for key in ("mean", "std")
        if key in options
    }
    return Preprocessing.model_validate(
        {"view": view, "mean": base.mean, "std": base.std, **changed}
    )


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file, one per line; also Places365's `/a/airfield 0` lines.

    Raises:
        TeacherError: The file cannot be read or is empty.
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
    # From a file, since torchvision takes seconds to import, which EfficientNet-Lite does without.
    return tuple((CONF / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


def _value(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _interpolation(view: View, spec: TeacherSpec) -> str:
    """Return the filter by the name that `View` has for it; PIL's have a prefix."""
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


def _three(spec: TeacherSpec, key: str) -> tuple[float, ...]:
    text = spec.options[key]
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    good = len(numbers) == 3 and all(0 <= number <= 1 for number in numbers)
    if not good or (key == "std" and min(numbers) == 0):
        least = "above 0" if key == "std" else "0"
        raise TeacherError(
            f"teacher {spec.name!r}: option {key} is {text!r}, allowed: one or three numbers a,b,c from {least} to 1, "
            f"for pixels in 0–1; divide values for pixels in 0–255 by 255"
        )
    return numbers


_POOLS = ("avgpool", "_avg_pooling")


def tapped(module: nn.Module, layer: str) -> Forward:
    """Return a forward pass whose features are the input [B, D] of `layer`, the classifier.

    The logits are the module's own output, whether features are asked for or not. The map is the
    input of the layer that pools it, where there is one.
    """
    # Of its own in each thread: several batches run through one module at once.
    seen = threading.local()

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.inputs = inputs[0]

    def remember_map(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.map = inputs[0]

    module.get_submodule(layer).register_forward_pre_hook(remember)
    if (pool := pooling_layer(module)) is not None:
        module.get_submodule(pool).register_forward_pre_hook(remember_map)

    def forward(images: Tensor, outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        logits = module(images)
        found = {"logits": logits, "features": seen.inputs}
        seen.inputs = None
        if MAP in outputs:
            found[MAP] = seen.map
        seen.map = None
        return found

    return forward


def pooling_layer(module: nn.Module) -> str | None:
    """Return the name of the layer that pools the last feature map, or None."""
    return next((name for name, _ in module.named_children() if name in _POOLS), None)


def grid_cells(maps: Tensor, grid: int) -> Tensor:
    """Average maps [B, D, h, w] over G × G cells of equal area, [B, G·G·D], the cells row by row.

    Where a cell ends inside one of the map, each takes its share of the area, so that the mean of
    all cells is that of the map.
    """
    down, across = (
        torch.stack(
            [torch.from_numpy(shares(i / grid, (i + 1) / grid, length)) for i in range(grid)]
        ).to(maps)
        for length in maps.shape[2:]
    )
    return torch.einsum("gh,bdhw,kw->bgkd", down, maps, across).flatten(1)


def last_linear(module: nn.Module) -> str | None:
    """Return the name of a module's last linear layer that it runs as a layer, None without one."""
    names = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    return names[-1] if names else None
