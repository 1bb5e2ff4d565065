"""Load classification models of torchvision, and ResNet-50 on Places365.

Features are the input of the classifier, which is the output of the penultimate layer.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from ..common.config import CONF
from ..common.errors import TeacherError, WeightsError
from ..common.weights import WeightsFile, hub_folder, library_weights, load_into, load_weights
from ..video.geometry import View
from .loaded_model import (
    LoadedModel,
    Preprocessing,
    apply_view_options,
    builder_options,
    last_linear,
    pooling_layer,
    preprocessing,
    read_classes,
    refuse_builder_options,
    tapped,
)
from .teacher_options import TeacherSpec

PLACES_CLASSES = CONF / "places365_classes.txt"
PLACES_FILE = "resnet50_places365.pth.tar"
PLACES_URL = f"http://places2.csail.mit.edu/models_places365/{PLACES_FILE}"
# The builders set these options only if they load weights, which are loaded separately here.
_WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": True, "init_weights": False},
}


def torchvision_model(
    spec: TeacherSpec, model: str, weights_name: str | None = None
) -> LoadedModel:
    """Load a classification model by torchvision's name, with its weights or those of a file.

    Args:
        spec: The teacher. Its weights file may have another number of classes.
        model: torchvision's name of the model.
        weights_name: torchvision's name of the weights. The default is IMAGENET1K_V1, since
            `DEFAULT` is often V2, whose outputs are far less confident (pytorch/vision#7570).

    Raises:
        TeacherError: The model, the name of the weights or an option is unknown.
        WeightsError: The weights do not exist, cannot be fetched, or do not fit.
    """
    # torchvision is imported here, since it loads torch's compiler: seconds that other teachers do
    # not need.
    import torchvision

    models = torchvision.models.list_models(module=torchvision.models)
    if model not in models:
        similar = difflib.get_close_matches(model, models, 5)
        hint = (
            f"; did you mean {', '.join(similar)}?"
            if similar
            else f"; allowed: {', '.join(models)}"
        )
        raise TeacherError(f"torchvision has no classification model {model!r}{hint}")
    choices = torchvision.models.get_model_weights(model)
    if weights_name is None:
        weights_name = "IMAGENET1K_V1" if "IMAGENET1K_V1" in choices.__members__ else "DEFAULT"
    if weights_name not in choices.__members__:
        raise TeacherError(
            f"torchvision's {model} has no weights {weights_name!r}; allowed: {', '.join(choices.__members__)}"
        )
    choice = choices[weights_name]
    options = {**_WITH_WEIGHTS.get(model, {}), **builder_options(spec)}
    file = load_weights(spec.weights, spec.sha256) if spec.weights else _library_file(spec, choice)
    module = _build(spec, model, options, file)
    pretrained = not spec.weights
    return LoadedModel(
        architecture=f"torchvision:{model}",
        weights=choice.name if pretrained else "file",
        module=module,
        preprocessing=apply_view_options(_from_preset(choice), spec),
        classes=tuple(choice.meta["categories"]) if pretrained else None,
        file=file.name,
        file_sha256=file.sha256,
        options=builder_options(spec),
        **_features(module),
    )


def resnet50_places365(spec: TeacherSpec) -> LoadedModel:
    """Load ResNet-50 with CSAILVision's checkpoint of Places365, from a file or torch hub's cache.

    Class names come from `categories_places365.txt` in the folder of the checkpoint, else from the
    list in `conf`. The preprocessing is that of its authors' validation: short side 256, centre
    crop 224.

    Raises:
        WeightsError: The checkpoint does not exist (it is never downloaded) or does not fit.
    """
    import torchvision

    refuse_builder_options(spec)
    path = Path(spec.weights) if spec.weights else hub_folder() / PLACES_FILE
    if not spec.weights and not path.is_file():
        raise WeightsError(
            f"teacher {spec.name!r}: no {PLACES_FILE} in {path.parent}; fetch {PLACES_URL} "
            f"and pass --teacher-weights {spec.name}=FILE"
        )
    weights = load_weights(path, spec.sha256)
    module = torchvision.models.resnet50(num_classes=365)
    load_into(module, weights.state, f"weights file {path}")
    names = path.with_name("categories_places365.txt")
    return LoadedModel(
        architecture="torchvision:resnet50",
        weights="PLACES365",
        module=module,
        preprocessing=apply_view_options(preprocessing(View(resize=256, crop=224)), spec),
        classes=read_classes(names if names.is_file() else PLACES_CLASSES),
        file=weights.name,
        file_sha256=weights.sha256,
        **_features(module),
    )


def _features(module: nn.Module) -> dict[str, Any]:
    """Return the fields of LoadedModel for features: the input of the last linear layer.

    A module without a linear layer (squeezenet ends in a convolution) has logits alone.
    """
    layer = last_linear(module)
    if layer is None:
        return {}
    return {
        "offers": ("logits", "features"),
        "forward": tapped(module, layer),
        "maps": pooling_layer(module) is not None,
        "pooling": f"input of {layer}",
    }


def _library_file(spec: TeacherSpec, choice: Any) -> WeightsFile:
    """Return torchvision's weights from torch hub's cache, after a download if they are missing."""
    return library_weights(
        choice,
        spec.sha256,
        prefix=f"teacher {spec.name!r}",
        remedy=f"pass --teacher-weights {spec.name}=FILE",
        fetch=spec.fetch,
    )


def _build(spec: TeacherSpec, model: str, options: dict[str, Any], file: WeightsFile) -> nn.Module:
    """Build the module with the file's weights, and its number of classes if only that differs."""
    import torchvision

    try:
        module = torchvision.models.get_model(model, weights=None, **options)
        state = module.state_dict()
        # The (module's, file's) shape of each tensor whose shapes differ.
        shapes = {
            (tuple(state[name].shape), tuple(tensor.shape))
            for name, tensor in file.state.items()
            if name in state and state[name].shape != tensor.shape
        }
        class_counts = {in_file[0] for _, in_file in shapes if in_file}
        same_inputs = all(in_module[1:] == in_file[1:] for in_module, in_file in shapes)
        if shapes and same_inputs and len(class_counts) == 1 and "num_classes" not in options:
            module = torchvision.models.get_model(
                model, weights=None, **options, num_classes=class_counts.pop()
            )
    except (TypeError, ValueError) as error:
        raise TeacherError(
            f"teacher {spec.name!r}: torchvision's {model} refuses its options: {error}"
        ) from None
    load_into(module, file.state, f"weights file {file.name}")
    return module


def _from_preset(choice: Any) -> Preprocessing:
    """Return the preprocessing of weights from their preset for image classification."""
    preset = choice.transforms()
    return preprocessing(
        View(
            resize=int(preset.resize_size[0]),
            crop=int(preset.crop_size[0]),
            interpolation="bicubic" if preset.interpolation.value == "bicubic" else "bilinear",
        ),
        tuple(preset.mean),
        tuple(preset.std),
    )
