"""Frozen image models that compute outputs of single frames. `load_teacher` loads one by name.

Names: `efficientnet_lite0` (1, 2), `resnet50`, `resnet50-places365`, `torchvision:NAME[@WEIGHTS]`,
`timm:NAME`, `open_clip:ARCH[@WEIGHTS]`, `hf:ORG/NAME`, and `package.module:factory`, a function
that returns an `nn.Module` (images [B, 3, h, w] → the requested output) or a `Teacher`.

A teacher computes logits, features or both in one forward pass, and those of the mirrored frame, if
requested, in another one. A store holds each output as a separate teacher: NAME, NAME.features,
NAME.flip, … (`store.frame_views`).

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
"""Names of teachers that are not models of a library by their name there."""


@dataclass(frozen=True)
class Engine:
    """An engine that runs a teacher's forward pass in place of torch.

    Args:
        name: The name that the numerics record, with a version if the engine has one.
        run: Images uint8 [B, h, w, 3] on the teacher's device → outputs [B, D].
    """

    name: str
    run: Callable[[Tensor], Mapping[str, Any]]


class Teacher:
    """A frozen image model with its preprocessing, classes and identity, always in evaluation mode.

    Args:
        name: The name in a store; characters other than letters, digits, `.`, `_`, `-` become `-`.
        recipe: The module with its preprocessing and its description.
        outputs: The outputs to compute: logits, features or both.
        views: The views of each frame to compute.

    Raises:
        TeacherError: The model does not have an output, or it is not [B, D] for a batch of images;
            or the number of class names is not that of its logits.
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
        self._move_normalization()
        self.choose(outputs, views)
        self.classes: list[str] = (
            self._class_names(self._widths["logits"]) if "logits" in outputs else []
        )

    def choose(self, outputs: tuple[Output, ...], views: tuple[str, ...]) -> None:
        """Set the outputs and views to compute, and measure the width of each.

        Raises:
            TeacherError: The views have cells, but the model has no feature map.
        """
        self.outputs: tuple[str, ...] = output_keys(outputs, views)
        self.plain_mean = False
        has_cells = any(OutputView.of(key).grid for key in self.outputs)
        # The outputs of one forward pass, of which the views are computed.
        self.forward_outputs: tuple[str, ...] = (*outputs, MAP) if has_cells else outputs
        if has_cells and not self.recipe.maps:
            raise TeacherError(
                f"teacher {self.name!r}: --views {','.join(views)}: no feature map of "
                f"{self.recipe.architecture} is known, allowed: center, or center,flip"
            )
        self._widths: dict[str, int] = {}
        self._widths = self._measure_widths()

    @property
    def view(self) -> View:
        """The resize and crop of a frame for this teacher, with a fixed size."""
        return self.recipe.preprocessing.view

    def to(self, device: torch.device | str, precision: str = "fp32") -> Teacher:
        """Move to a device and choose the precision: `fp32`, or `bf16` (autocast).

        With `bf16` the weights stay float32. The engine is reset to torch.

        Raises:
            TeacherError: The precision is not one of these.
        """
        if precision not in _COMPUTE:
            raise TeacherError(f"precision is {precision!r}, allowed: {', '.join(_COMPUTE)}")
        self.device, self.precision, self.engine = torch.device(device), precision, None
        self.module.to(self.device)
        self._move_normalization()
        return self

    @property
    def store_names(self) -> dict[str, str]:
        """Output → name of the teacher in a store that holds it, such as NAME.features."""
        return {key: OutputView.of(key).store_name(self.name) for key in self.outputs}

    def width(self, key: str) -> int:
        """Return the number of classes, or of features of all cells."""
        return self._widths[key]

    def identity(self, precision: str | None = None, output: str | None = None) -> dict[str, Any]:
        """Return all that determines an output, in a form for JSON.

        The identity is the same on every machine and device. `sha256` is that of the loaded state
        (`distinit.pipeline.common.weights`), so that a file of another name with the same tensors
        is the same teacher. Logits have `classes`; features have `pooling`, since class names do
        not change them.

        Args:
            precision: The precision, by default the current one.
            output: The key of the output, by default the first one.
        """
        prepared, view = self.recipe.preprocessing, OutputView.of(output or self.outputs[0])
        if view.output == "features":
            description: dict[str, Any] = {"output": "features", "pooling": self.recipe.pooling}
        else:
            names = "\n".join(self.classes).encode()
            description = {
                "classes": len(self.classes),
                "classes_sha256": hashlib.sha256(names).hexdigest(),
            }
        identity = {
            "architecture": self.recipe.architecture,
            "weights": self.recipe.weights,
            "sha256": self.state_sha256,
            "options": self.recipe.options,
            **description,
            "view": prepared.view.model_dump(mode="json"),
            "mean": prepared.mean,
            "std": prepared.std,
            "compute": _COMPUTE[precision or self.precision],
        }
        # Nothing is added for the centre alone, whose identity is that of stores without views.
        if view.grid:
            identity |= {"grid": view.grid, "plain_mean": self.plain_mean}
        if view.mirrored:
            identity["mirrored"] = True
        json_identity: dict[str, Any] = json.loads(json.dumps(identity, default=str))
        return json_identity

    def provenance(self) -> dict[str, Any]:
        """Return the attributes that are recorded for people and not compared.

        They are the name and sha256 of the weights file, and torch's version.
        """
        return {
            "weights_file": self.recipe.file,
            "weights_file_sha256": self.recipe.file_sha256,
            "torch": torch.__version__,
        }

    def logits(self, images: np.ndarray | Tensor) -> Tensor:
        """Return the logits [B, K] of images; see `compute`."""
        return self.compute(images)["logits"]

    def compute(
        self, images: np.ndarray | Tensor, keys: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Return the outputs [B, D] of images, float32 on the CPU.

        The same batch gives the same values. Another batch size may change the last bits, so that
        batches are padded to one size where stores must be equal.

        Args:
            images: RGB images uint8 [B, h, w, 3], rendered by `view`.
            keys: The outputs to compute, by default all. Mirrored images need a second forward
                pass, which is run only if one of these outputs is of them.

        Raises:
            TeacherError: The images have another dtype or shape.
        """
        return self.start(images, keys)()

    def start(
        self, images: np.ndarray | Tensor, keys: Collection[str] | None = None
    ) -> Callable[[], dict[str, Tensor]]:
        """Start to compute outputs; return a function that waits for them.

        On a CUDA device the work is queued, so that another batch can be queued meanwhile. `images`
        must not change before the outputs are computed. Images in pinned memory are copied
        asynchronously.

        Args:
            images: See `compute`.
            keys: See `compute`.

        Raises:
            TeacherError: The images have another dtype or shape.
        """
        batch = self._checked(images)
        views = {key: OutputView.of(key) for key in self.outputs if keys is None or key in keys}
        if len(batch) == 0:
            return lambda: {key: torch.zeros(0, self._widths[key]) for key in views}
        run = self.run if self.engine is None else self.engine.run
        # Whether the images are mirrored → the outputs of the forward pass.
        passes: dict[bool, Mapping[str, Any]] = {}
        with torch.inference_mode(), self._arithmetic():
            pixels = batch.to(self.device, non_blocking=True)
            for mirrored in sorted({view.mirrored for view in views.values()}):
                passes[mirrored] = run(pixels.flip(2) if mirrored else pixels)
        rows = {
            key: self._rows(view, passes[view.mirrored], len(batch)) for key, view in views.items()
        }
        if self.device.type != "cuda":
            return lambda: rows
        event = torch.cuda.current_stream(self.device).record_event()

        def finish() -> dict[str, Tensor]:
            event.synchronize()
            return rows

        return finish

    def run(self, batch: Tensor) -> Mapping[str, Any]:
        """Run torch's forward pass on images uint8 [B, h, w, 3] on the teacher's device."""
        # The permuted view [B, 3, h, w] has the memory format channels_last.
        pixels = batch.permute(0, 3, 1, 2).float()
        return self._forward((pixels - self._mean) / self._std)

    def _checked(self, images: np.ndarray | Tensor) -> Tensor:
        if isinstance(images, np.ndarray):
            # Shared memory is read-only. It is copied, since torch.from_numpy would warn.
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
            return self.recipe.forward(pixels, self.forward_outputs)
        result = self.module(pixels)
        return result if isinstance(result, Mapping) else {self.forward_outputs[0]: result}

    def _rows(self, view: OutputView, outputs: Mapping[str, Any], count: int) -> Tensor:
        """Return the rows [count, D] of a view, computed from the outputs of a forward pass."""
        output = view.output
        values = outputs.get(MAP if view.grid else output)
        dimensions = 4 if view.grid else 2
        if isinstance(values, Tensor) and values.ndim == dimensions and len(values) == count:
            rows = grid_cells(values.float(), view.grid) if view.grid else values.float()
            # The copy goes to pinned memory, so that the GPU continues meanwhile.
            return rows.to("cpu", non_blocking=self.device.type == "cuda")
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if view.grid:
            raise TeacherError(
                f"teacher {self.name!r}: --views grid:{view.grid}: its feature map must be "
                f"[{count}, D, h, w], got {shape}; allowed: center, or center,flip"
            )
        letter = "K" if output == "logits" else "D"
        raise TeacherError(
            f"teacher {self.name!r}: {output} must be [{count}, {letter}], got {shape}"
        )

    def _move_normalization(self) -> None:
        """Put the mean and standard deviation of pixels on the device."""
        prepared = self.recipe.preprocessing
        self._mean = torch.tensor(prepared.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(prepared.std, device=self.device).view(1, 3, 1, 1)

    @contextlib.contextmanager
    def _arithmetic(self) -> Any:
        """Use deterministic kernels, no TF32, and autocast for bf16."""
        bf16 = self.precision == "bf16"
        # The flags apply to the whole process. On a CPU, where they have no effect and threads run
        # teachers, they are left as they are.
        cuda = self.device.type == "cuda"
        flags = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
        with (
            torch.backends.cudnn.flags(**flags) if cuda else contextlib.nullcontext(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16),
        ):
            yield

    def _measure_widths(self) -> dict[str, int]:
        """Return the width of each output, and set `plain_mean`."""
        height, width = self.input_shape
        who = f"teacher {self.name!r}: fails on an image [1, 3, {height}, {width}]"
        with third_party(who, TeacherError):
            outputs = self.compute(np.zeros((1, height, width, 3), np.uint8))
            if MAP in self.forward_outputs:
                self.plain_mean = self._pools_by_mean()
        return {key: values.shape[1] for key, values in outputs.items()}

    def _pools_by_mean(self) -> bool:
        """Return whether the features of a picture of noise are the mean of the feature map."""
        noise = np.random.default_rng(0).integers(0, 256, (1, *self.input_shape, 3), np.uint8)
        with torch.inference_mode(), self._arithmetic():
            outputs = self.run(torch.from_numpy(noise).to(self.device))
        features, mean = outputs["features"].float(), outputs[MAP].float().mean((2, 3))
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
    """One output of a model, which a store holds as a separate teacher.

    Args:
        teacher: The model.
        key: The key of its `OutputView`.
    """

    teacher: Teacher
    key: str

    @property
    def output(self) -> Output:
        """The kind of its numbers: logits or features."""
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
        """The class names of logits; features have none."""
        return self.teacher.classes if self.output == "logits" else []

    def identity(self, precision: str | None = None) -> dict[str, Any]:
        """Return the identity of this output."""
        return self.teacher.identity(precision, self.key)

    def view_attributes(self) -> dict[str, Any]:
        """Return the attributes of the store's node that describe the view; {} for the centre."""
        view, attributes = OutputView.of(self.key), dict[str, Any]()
        if view.grid:
            attributes["grid"] = {"cells": view.grid, "plain_mean": self.teacher.plain_mean}
        if view.mirrored:
            attributes["mirror_of"] = OutputView(view.output, view.grid).store_name(
                self.teacher.name
            )
        return attributes


def known_teachers() -> list[str]:
    """Return the names of teachers, as patterns."""
    return [
        *_BY_NAME,
        "torchvision:NAME[@WEIGHTS]",
        "timm:NAME",
        "open_clip:ARCH[@WEIGHTS]",
        "hf:ORG/NAME",
        "package.module:factory",
    ]


def load_teacher(spec: TeacherSpec) -> Teacher:
    """Build a teacher on the CPU in float32; `Teacher.to` moves it to another device.

    The output of libraries is redirected to standard error.

    Raises:
        TeacherError: The name is unknown (the message lists the allowed names), an option is not
            allowed, a package is missing, or the module is not an image model.
        WeightsError: The weights are missing, have another sha256, do not fit, or would run code
            when unpickled.
    """
    with contextlib.redirect_stdout(sys.stderr):
        model = _build(spec)
        if isinstance(model, Teacher):
            teacher = model
            _choose_outputs(teacher, spec)
        else:
            if "classes" in spec.options:
                model = replace(model, classes=read_classes(spec.options["classes"]))
            teacher = Teacher(spec.options.get("name", spec.name), model, spec.outputs, spec.views)
    if teacher.recipe.file is None:
        check_sha256(f"teacher {spec.name!r}: its loaded state", teacher.state_sha256, spec.sha256)
    return teacher


def _build(spec: TeacherSpec) -> LoadedModel | Teacher:
    """Build the model of a name; a factory may return a teacher."""
    if spec.name in _BY_NAME:
        return _BY_NAME[spec.name](spec)
    family, _, family_name = spec.name.partition(":")
    if family == "torchvision" and family_name:
        model, _, weights = family_name.partition("@")
        return torchvision_model(spec, model, weights or None)
    if family == "timm" and family_name:
        return timm_model(spec, family_name)
    if family == "open_clip" and family_name:
        model, _, weights = family_name.partition("@")
        return open_clip_model(spec, model, weights or None)
    if family == "hf" and "/" in family_name:
        return hf_model(spec, family_name)
    if is_factory(spec.name):
        return _from_factory(spec)
    raise TeacherError(
        f"teacher {spec.name!r} is not known; allowed: {', '.join(known_teachers())}"
    )


def _choose_outputs(teacher: Teacher, spec: TeacherSpec) -> None:
    """Set the outputs and views of a teacher that a factory returned."""
    for output in spec.outputs:
        if output not in teacher.outputs:
            raise TeacherError(
                f"teacher {spec.name!r}: --teacher-output {output}: its factory made one of "
                f"{', '.join(teacher.outputs)}"
            )
    teacher.choose(spec.outputs, spec.views)


def _from_factory(spec: TeacherSpec) -> LoadedModel | Teacher:
    """Call a user's factory with the options that are not distinit's own.

    A module returns the requested output; if logits and features are requested, it returns a
    mapping with these keys. Its preprocessing is ImageNet's (short side 256, centre 224, mean and
    std of 0–1 pixels) unless options change it. A weights file must have all of its tensors.
    """
    options = builder_options(spec)
    model = call_factory(spec.name, f"teacher {spec.name!r}", options, error=TeacherError)
    if isinstance(model, Teacher):
        if spec.weights:
            raise TeacherError(
                f"teacher {spec.name!r} is finished by its factory and takes no weights file"
            )
        if refused_options := sorted(spec.options.keys() & set(OWN_OPTIONS)):
            raise TeacherError(
                f"teacher {spec.name!r} is finished by its factory and takes no option {', '.join(refused_options)}"
            )
        return model
    if not isinstance(model, nn.Module):
        raise TeacherError(
            f"teacher {spec.name!r}: the factory returned a {type(model).__name__}, allowed: torch.nn.Module, Teacher"
        )
    file = load_weights(spec.weights, spec.sha256) if spec.weights else None
    if file is not None:
        load_into(model, file.state, f"weights file {spec.weights}")
    return LoadedModel(
        architecture=spec.name,
        weights="file" if file else "factory",
        module=model,
        preprocessing=apply_view_options(preprocessing(View(resize=256, crop=224)), spec),
        file=file.name if file else None,
        file_sha256=file.sha256 if file else None,
        options=options,
        offers=OUTPUTS,
        maps=True,
        pooling="output of the module",
    )


def _store_name(name: str) -> str:
    """Convert a name to one that Zarr and every file system allow; Zarr reserves a leading `__`."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")
    if not safe:
        raise TeacherError(f"teacher name {name!r} has no letter or digit")
    return safe
