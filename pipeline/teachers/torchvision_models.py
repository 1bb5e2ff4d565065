"""Teachers that torchvision builds: its classification models, and ResNet-50 on Places365.

Their features are the input of the classifier, the penultimate layer's output.
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
# Their builders set these only together with weights, which are loaded apart here.
_WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "aux_logits": True, "init_weights": False},
}


def torchvision_model(
    spec: TeacherSpec, model: str, weights_name: str | None = None
) -> LoadedModel:
    """Load a classification model by torchvision's name, with its weights or those of a file.

    Without a weights name: IMAGENET1K_V1, for `DEFAULT` is often the V2 whose outputs are far less
    confident (pytorch/vision#7570). A file may have another number of classes.

    Raises:
        TeacherError: The model, weights name or option is unknown.
        WeightsError: The weights do not exist, cannot be fetched, or do not fit.
    """
    # Imported where it is used: it loads torch's compiler, seconds that other teachers do not need.
    import torchvision

    models = torchvision.models.list_models(module=torchvision.models)
    if model not in models:
        near = difflib.get_close_matches(model, models, 5)
        also = f"; did you mean {', '.join(near)}?" if near else f"; allowed: {', '.join(models)}"
        raise TeacherError(f"torchvision has no classification model {model!r}{also}")
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
    module = _fitting(spec, model, options, file)
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
    """ResNet-50 on Places365 from CSAILVision's checkpoint: a file, or one in torch hub's cache.

    Class names come from `categories_places365.txt` next to the checkpoint, else from
    the list in `conf`. Validation there: short side 256, centre crop 224.

    Raises:
        WeightsError: no checkpoint (it is never downloaded), or one that does not fit.
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
    """Return the fields of LoadedModel for the penultimate features: the last linear layer's input.

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
    """Torchvision's own weights, fetched through its own API where torch hub's cache lacks them."""
    return library_weights(
        choice,
        spec.sha256,
        prefix=f"teacher {spec.name!r}",
        remedy=f"pass --teacher-weights {spec.name}=FILE",
        fetch=spec.fetch,
    )


def _fitting(
    spec: TeacherSpec, model: str, options: dict[str, Any], file: WeightsFile
) -> nn.Module:
    """Build the module with the file's weights, and its number of classes if only that differs."""
    import torchvision

    what = f"weights file {file.name}"
    try:
        module = torchvision.models.get_model(model, weights=None, **options)
        fresh = module.state_dict()
        other = {
            (tuple(fresh[name].shape), tuple(tensor.shape))
            for name, tensor in file.state.items()
            if name in fresh and fresh[name].shape != tensor.shape
        }
        counts = {in_file[0] for _, in_file in other if in_file}
        same_inputs = all(in_module[1:] == in_file[1:] for in_module, in_file in other)
        if other and same_inputs and len(counts) == 1 and "num_classes" not in options:
            module = torchvision.models.get_model(
                model, weights=None, **options, num_classes=counts.pop()
            )
    except (TypeError, ValueError) as error:
        raise TeacherError(
            f"teacher {spec.name!r}: torchvision's {model} refuses its options: {error}"
        ) from None
    load_into(module, file.state, what)
    return module


def _from_preset(choice: Any) -> Preprocessing:
    """Preprocessing from a weights' ImageClassification preset."""
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
