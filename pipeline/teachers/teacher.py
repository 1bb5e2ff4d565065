"""Frozen image models that look at single frames. `load_teacher` turns a name into one.

Names: `efficientnet_lite0` (1, 2), `resnet50`, `resnet50-places365`, `torchvision:NAME[@WEIGHTS]`,
`timm:NAME`, `open_clip:ARCH[@WEIGHTS]`, `hf:ORG/NAME`, and `package.module:factory`, a function
that returns an `nn.Module` (images [B, 3, h, w] → the output asked for) or a `Teacher`.

A teacher gives logits, features or both, of one forward pass; of the mirrored frame, if asked for,
in another. A store holds each as a teacher of its own: NAME, NAME.features, NAME.flip, …
(`store.frame_views`).

Shapes: B images, h w pixels of the view, K classes, D numbers of an output, G cells per side.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..common.errors import TeacherError, third_party
from ..common.plugins import call_factory, is_factory
from ..common.weights import check_sha256, load_into, load_weights, state_sha256
from ..store.frame_views import CENTER, OutputView, output_keys
from ..store.store_options import Output
from ..video.geometry import View
from .efficientnet_lite import efficientnet_lite
from .hf_models import hf_model
from .loaded_model import (
    MAP,
    OWN_OPTIONS,
    LoadedModel,
    apply_view_options,
    builder_options,
    grid_cells,
    preprocessing,
    read_classes,
)
from .open_clip_models import open_clip_model
from .teacher_options import OUTPUTS, TeacherSpec
from .timm_models import timm_model
from .torchvision_models import resnet50_places365, torchvision_model

__all__ = ["Teacher", "TeacherOutput", "TeacherSpec", "known_teachers", "load_teacher"]

_COMPUTE = {"fp32": "float32", "bf16": "bfloat16 autocast over float32 weights"}

_BY_NAME: dict[str, Callable[[TeacherSpec], LoadedModel]] = {
    "efficientnet_lite0": lambda spec: efficientnet_lite(spec, 0),
    "efficientnet_lite1": lambda spec: efficientnet_lite(spec, 1),
    "efficientnet_lite2": lambda spec: efficientnet_lite(spec, 2),
    "resnet50": lambda spec: torchvision_model(spec, "resnet50", "IMAGENET1K_V1"),
    "resnet50-places365": resnet50_places365,
}
SHIPPED = frozenset(_BY_NAME)
"""Names of teachers that need no library's model name."""


@dataclass(frozen=True)
class Engine:
    """What runs a teacher's forward pass in place of torch itself.

    name: as `numerics` records it, with the version where it has one.
    run: images uint8 [B, h, w, 3] on the teacher's device → outputs [B, D].
    """

    name: str
    run: Callable[[Tensor], Mapping[str, Any]]


class Teacher:
    """A frozen image model with its preprocessing, classes and identity; in evaluation mode always.

    Args:
        name: its name in a store; characters other than letters, digits, `.`, `_`, `-` become `-`.
        recipe: the module and what belongs to it.
        outputs: what is taken of its forward pass.
        views: of each frame.

    Raises:
        TeacherError: the model does not give an output, or not as [B, D] of a batch of images; or
            the number of class names is not that of its logits.
    """

    def __init__(
        self,
        name: str,
        recipe: LoadedModel,
        outputs: tuple[Output, ...] = ("logits",),
        views: tuple[str, ...] = (CENTER,),
    ) -> None:
        self.name = _store_name(name)
        self.recipe = recipe
        for output in outputs:
            if output not in recipe.offers:
                lacks = "has no classifier" if output == "logits" else "has no pooled features"
                raise TeacherError(
                    f"teacher {name!r}: --teacher-output {output}: the model {lacks}; allowed: "
                    f"{', '.join(recipe.offers)}"
                )
        self.module = (
            recipe.module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        )
        shape = self.view.fixed_shape
        if shape is None:
            raise TeacherError(
                f"teacher {name!r}: a short side of {self.view.resize} alone has no fixed size"
            )
        self.input_shape: tuple[int, int] = shape
        self.state_sha256 = state_sha256(self.module.state_dict())
        self.device, self.precision = torch.device("cpu"), "fp32"
        self.engine: Engine | None = None
        self._place()
        self.choose(outputs, views)
        self.classes: list[str] = (
            self._class_names(self._widths["logits"]) if "logits" in outputs else []
        )

    def choose(self, outputs: tuple[Output, ...], views: tuple[str, ...]) -> None:
        """Set what is computed: keys of `OutputView`, and how many numbers each has.

        Raises:
            TeacherError: The model has no feature map to take cells of.
        """
        self.outputs: tuple[str, ...] = output_keys(outputs, views)
        self.plain_mean = False
        has_cells = any(OutputView.of(key).grid for key in self.outputs)
        # What one forward pass gives; views are made of it.
        self.asked: tuple[str, ...] = (*outputs, MAP) if has_cells else outputs
        if has_cells and not self.recipe.maps:
            raise TeacherError(
                f"teacher {self.name!r}: --views {','.join(views)}: no feature map of "
                f"{self.recipe.architecture} is known, allowed: center, or center,flip"
            )
        self._widths: dict[str, int] = {}
        self._widths = self._measure_widths()

    @property
    def view(self) -> View:
        """How a frame is resized and cropped for this teacher; the result has a fixed size."""
        return self.recipe.preprocessing.view

    def to(self, device: torch.device | str, precision: str = "fp32") -> Teacher:
        """Move to a device and choose the precision: `fp32`, or `bf16` (autocast).

        With `bf16` the weights stay float32. From here on torch runs the teacher, until it gets
        another engine.

        Raises:
            TeacherError: Another precision was given.
        """
        if precision not in _COMPUTE:
            raise TeacherError(f"precision is {precision!r}, allowed: {', '.join(_COMPUTE)}")
        self.device, self.precision, self.engine = torch.device(device), precision, None
        self.module.to(self.device)
        self._place()
        return self

    @property
    def store_names(self) -> dict[str, str]:
        """Names of the teachers of a store that hold the outputs, as NAME and NAME.features."""
        return {key: OutputView.of(key).store_name(self.name) for key in self.outputs}

    def width(self, key: str) -> int:
        """Return the number of classes, or of features, of all cells."""
        return self._widths[key]

    def identity(self, precision: str | None = None, output: str | None = None) -> dict[str, Any]:
        """Return what determines an output (default: the first), the same on every machine.

        It is JSON-able. `sha256` is that of the loaded state (its form:
        `distinit.pipeline.common.weights`), so a file of another name with the same tensors is the
        same teacher. The device is not part of it. Features have a `pooling` where logits have
        classes, whose names do not change them.
        """
        prepared, asked = self.recipe.preprocessing, OutputView.of(output or self.outputs[0])
        if asked.output == "features":
            of_output: dict[str, Any] = {"output": "features", "pooling": self.recipe.pooling}
        else:
            names = "\n".join(self.classes).encode()
            of_output = {
                "classes": len(self.classes),
                "classes_sha256": hashlib.sha256(names).hexdigest(),
            }
        identity = {
            "architecture": self.recipe.architecture,
            "weights": self.recipe.weights,
            "sha256": self.state_sha256,
            "options": self.recipe.options,
            **of_output,
            "view": prepared.view.model_dump(mode="json"),
            "mean": prepared.mean,
            "std": prepared.std,
            "compute": _COMPUTE[precision or self.precision],
        }
        # Of the centre alone nothing is added: its identity is that of stores without views.
        if asked.grid:
            identity |= {"grid": asked.grid, "plain_mean": self.plain_mean}
        if asked.mirrored:
            identity["mirrored"] = True
        plain: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        return plain

    def provenance(self) -> dict[str, Any]:
        """Return what is recorded for people and not compared.

        The name and sha256 of the weights file as `sha256sum` prints it, and torch's version.
        """
        return {
            "weights_file": self.recipe.file,
            "weights_file_sha256": self.recipe.file_sha256,
            "torch": torch.__version__,
        }

    def logits(self, images: np.ndarray | Tensor) -> Tensor:
        """logits[B, K] of images, as `compute` returns them."""
        return self.compute(images)["logits"]

    def compute(
        self, images: np.ndarray | Tensor, only: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return each output [B, D], float32 on the CPU, of one forward pass, or two with flip.

        The same batch gives the same values; another batch size may change the last bits, so
        batches are padded to one size where stores must be equal.

        Args:
            images: RGB [B, h, w, 3], uint8, rendered by `view`.
            only: Some of the outputs; a pass that gives none of them is not run.

        Raises:
            TeacherError: images of another dtype or shape.
        """
        return self.start(images, only)()

    def start(
        self, images: np.ndarray | Tensor, only: Collection[str] | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        """Start a forward pass; the function returned waits for its outputs, those of `compute`.

        On a CUDA device the work is queued and this returns before it is done, so that another
        batch can be queued meanwhile. `images` must not change before the outputs are there; they
        are copied without a halt where they are in pinned memory.

        Raises:
            TeacherError: images of another dtype or shape.
        """
        batch = self._checked(images)
        wanted = [key for key in self.outputs if only is None or key in only]
        if len(batch) == 0:
            return lambda: {key: torch.zeros(0, self._widths[key]) for key in wanted}
        run = self.run if self.engine is None else self.engine.run
        given: dict[bool, Mapping[str, Any]] = {}
        with torch.inference_mode(), self._arithmetic():
            pixels = batch.to(self.device, non_blocking=True)
            for mirrored in sorted({OutputView.of(key).mirrored for key in wanted}):
                given[mirrored] = run(pixels.flip(2) if mirrored else pixels)
        rows = {
            key: self._rows(view, given[view.mirrored], len(batch))
            for key, view in ((key, OutputView.of(key)) for key in wanted)
        }
        if self.device.type != "cuda":
            return lambda: rows
        done = torch.cuda.current_stream(self.device).record_event()

        def finish() -> dict[str, Tensor]:
            done.synchronize()
            return rows

        return finish

    def run(self, batch: Tensor) -> Mapping[str, Any]:
        """Run torch's forward pass on images uint8 [B, h, w, 3] that are on the device already."""
        # [B, h, w, 3] seen as [B, 3, h, w] is in memory as channels_last already.
        pixels = batch.permute(0, 3, 1, 2).float()
        return self._forward((pixels - self._mean) / self._std)

    def _checked(self, images: np.ndarray | Tensor) -> Tensor:
        if isinstance(images, np.ndarray):
            # Shared memory comes read-only, which torch.from_numpy warns about: that is copied.
            images = torch.from_numpy(np.require(images, requirements="W"))
        height, width = self.input_shape
        if (
            images.dtype != torch.uint8
            or images.ndim != 4
            or tuple(images.shape[1:]) != (height, width, 3)
        ):
            raise TeacherError(
                f"teacher {self.name!r}: images must be uint8 [B, {height}, {width}, 3], "
                f"got {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        return images

    def _forward(self, pixels: Tensor) -> Mapping[str, Any]:
        if self.recipe.forward is not None:
            return self.recipe.forward(pixels, self.asked)
        given = self.module(pixels)
        return given if isinstance(given, Mapping) else {self.asked[0]: given}

    def _rows(self, view: OutputView, outputs: Mapping[str, Any], count: int) -> Tensor:
        output = view.output
        given = outputs.get(MAP if view.grid else output)
        dimensions = 4 if view.grid else 2
        if isinstance(given, Tensor) and given.ndim == dimensions and len(given) == count:
            rows = grid_cells(given.float(), view.grid) if view.grid else given.float()
            # Into pinned host memory, so that the GPU continues during the copy.
            return rows.to("cpu", non_blocking=self.device.type == "cuda")
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        if view.grid:
            raise TeacherError(
                f"teacher {self.name!r}: --views grid:{view.grid}: its feature map must be "
                f"[{count}, D, h, w], got {shape}; allowed: center, or center,flip"
            )
        letter = "K" if output == "logits" else "D"
        raise TeacherError(
            f"teacher {self.name!r}: {output} must be [{count}, {letter}], got {shape}"
        )

    def _place(self) -> None:
        prepared = self.recipe.preprocessing
        self._mean = torch.tensor(prepared.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(prepared.std, device=self.device).view(1, 3, 1, 1)

    @contextlib.contextmanager
    def _arithmetic(self) -> Any:
        """Deterministic kernels, no TF32, and autocast for bf16."""
        bf16 = self.precision == "bf16"
        # The flags are of the whole process: left alone where they mean nothing, since threads run
        # teachers there.
        cuda = self.device.type == "cuda"
        flags = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
        with (
            torch.backends.cudnn.flags(**flags) if cuda else contextlib.nullcontext(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            yield

    def _measure_widths(self) -> dict[str, int]:
        height, width = self.input_shape
        who = f"teacher {self.name!r}: fails on an image [1, 3, {height}, {width}]"
        with third_party(who, TeacherError):
            given = self.compute(np.zeros((1, height, width, 3), np.uint8))
            if MAP in self.asked:
                self.plain_mean = self._pools_by_the_mean()
        return {key: values.shape[1] for key, values in given.items()}

    def _pools_by_the_mean(self) -> bool:
        """Return whether the features are the mean of the map, as a picture of noise shows."""
        noise = np.random.default_rng(0).integers(0, 256, (1, *self.input_shape, 3), np.uint8)
        with torch.inference_mode(), self._arithmetic():
            given = self.run(torch.from_numpy(noise).to(self.device))
        features, mean = given["features"].float(), given[MAP].float().mean((2, 3))
        return features.shape == mean.shape and bool(
            (features - mean).abs().max() <= 0.02 * features.abs().max()
        )

    def _class_names(self, count: int) -> list[str]:
        names = self.recipe.classes
        if names is None:
            return [f"class {index}" for index in range(count)]
        if len(names) != count:
            raise TeacherError(
                f"teacher {self.name!r}: has {count} classes, but {len(names)} class names"
            )
        return list(names)


@dataclass(frozen=True)
class TeacherOutput:
    """One output of a view: what a store holds as a teacher of its own. key: of `OutputView`."""

    teacher: Teacher
    key: str

    @property
    def output(self) -> Output:
        """What its rows hold."""
        return OutputView.of(self.key).output

    @property
    def name(self) -> str:
        """Its name in the store."""
        return self.teacher.store_names[self.key]

    @property
    def width(self) -> int:
        """Number of classes, or of features of all cells."""
        return self.teacher.width(self.key)

    @property
    def classes(self) -> list[str]:
        """Class names of logits; none of features."""
        return self.teacher.classes if self.output == "logits" else []

    def identity(self, precision: str | None = None) -> dict[str, Any]:
        """Return the identity of this output."""
        return self.teacher.identity(precision, self.key)

    def view_attributes(self) -> dict[str, Any]:
        """Return the attributes of the teacher's node that describe its view; {} for the centre."""
        view, attributes = OutputView.of(self.key), dict[str, Any]()
        if view.grid:
            attributes["grid"] = {"cells": view.grid, "plain_mean": self.teacher.plain_mean}
        if view.mirrored:
            attributes["mirror_of"] = OutputView(view.output, view.grid).store_name(
                self.teacher.name
            )
        return attributes


def known_teachers() -> list[str]:
    """Return the names that a user can give, as patterns."""
    return [
        *_BY_NAME,
        "torchvision:NAME[@WEIGHTS]",
        "timm:NAME",
        "open_clip:ARCH[@WEIGHTS]",
        "hf:ORG/NAME",
        "package.module:factory",
    ]


def load_teacher(spec: TeacherSpec) -> Teacher:
    """Build a teacher on the CPU in float32; then `teacher.to(device, precision)`.

    What a library prints on the way goes to standard error.

    Raises:
        TeacherError: an unknown name (the message has the list), an option that is not allowed, a
            package that is missing, a module that is no image classifier.
        WeightsError: weights that are missing, have another sha256, need a free unpickle or do not
            fit.
    """
    with contextlib.redirect_stdout(sys.stderr):
        made = _build(spec)
        if isinstance(made, Teacher):
            teacher = made
            _restrict(teacher, spec)
        else:
            if "classes" in spec.options:
                made = replace(made, classes=read_classes(spec.options["classes"]))
            teacher = Teacher(spec.options.get("name", spec.name), made, spec.outputs, spec.views)
    if teacher.recipe.file is None:
        check_sha256(f"teacher {spec.name!r}: its loaded state", teacher.state_sha256, spec.sha256)
    return teacher


def _build(spec: TeacherSpec) -> LoadedModel | Teacher:
    if spec.name in _BY_NAME:
        return _BY_NAME[spec.name](spec)
    family, _, rest = spec.name.partition(":")
    if family == "torchvision" and rest:
        model, _, weights = rest.partition("@")
        return torchvision_model(spec, model, weights or None)
    if family == "timm" and rest:
        return timm_model(spec, rest)
    if family == "open_clip" and rest:
        model, _, weights = rest.partition("@")
        return open_clip_model(spec, model, weights or None)
    if family == "hf" and "/" in rest:
        return hf_model(spec, rest)
    if is_factory(spec.name):
        return _from_factory(spec)
    raise TeacherError(
        f"teacher {spec.name!r} is not known; allowed: {', '.join(known_teachers())}"
    )


def _restrict(teacher: Teacher, spec: TeacherSpec) -> None:
    """Take only the outputs asked for of a teacher that a factory finished."""
    for output in spec.outputs:
        if output not in teacher.outputs:
            raise TeacherError(
                f"teacher {spec.name!r}: --teacher-output {output}: its factory made one of "
                f"{', '.join(teacher.outputs)}"
            )
    teacher.choose(spec.outputs, spec.views)


def _from_factory(spec: TeacherSpec) -> LoadedModel | Teacher:
    """Call a user's factory with the options that are not distinit's own.

    What a module returns is the output asked for; where both are, it returns a mapping with the
    keys logits and features. A module is taken to require ImageNet's preprocessing (short side 256,
    centre 224, mean and std of 0–1 pixels) unless options set another; a weights file is loaded
    into it, every tensor.
    """
    options = builder_options(spec)
    made = call_factory(spec.name, f"teacher {spec.name!r}", options, error=TeacherError)
    if isinstance(made, Teacher):
        if spec.weights:
            raise TeacherError(
                f"teacher {spec.name!r} is finished by its factory and takes no weights file"
            )
        if refused := sorted(spec.options.keys() & set(OWN_OPTIONS)):
            raise TeacherError(
                f"teacher {spec.name!r} is finished by its factory and takes no option {', '.join(refused)}"
            )
        return made
    if not isinstance(made, nn.Module):
        raise TeacherError(
            f"teacher {spec.name!r}: the factory returned a {type(made).__name__}, allowed: torch.nn.Module, Teacher"
        )
    file = load_weights(spec.weights, spec.sha256) if spec.weights else None
    if file is not None:
        load_into(made, file.state, f"weights file {spec.weights}")
    return LoadedModel(
        architecture=spec.name,
        weights="file" if file else "factory",
        module=made,
        preprocessing=apply_view_options(preprocessing(View(resize=256, crop=224)), spec),
        file=file.name if file else None,
        file_sha256=file.sha256 if file else None,
        options=options,
        offers=OUTPUTS,
        maps=True,
        pooling="output of the module",
    )


def _store_name(name: str) -> str:
    """Convert to a name that every file system and Zarr take; Zarr reserves a leading `__`."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")
    if not safe:
        raise TeacherError(f"teacher name {name!r} has no letter or digit")
    return safe
