"""Teachers from timm, with the preprocessing that timm records for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..common.errors import TeacherError, WeightsError, first_line
from ..common.weights import WeightsFile, load_into, load_weights
from ..store.store_options import Output
from ..video.geometry import View
from .loaded_model import (
    MAP,
    Forward,
    LoadedModel,
    apply_view_options,
    builder_options,
    imagenet_classes,
    preprocessing,
)
from .teacher_options import TeacherSpec


def timm_model(spec: TeacherSpec, model: str) -> LoadedModel:
    """Load a timm model by name, with its pretrained weights unless a file is given.

    Raises:
        TeacherError: timm is not installed, or has no such model or option.
        WeightsError: The weights cannot be fetched or do not fit.
    """
    try:
        import timm
        import timm.data
    except ImportError:
        raise TeacherError(
            f"teacher {spec.name!r} needs timm: pip install 'distinit[timm]'"
        ) from None
    library: Any = timm  # its types leave out what `timm.data` re-exports
    options = builder_options(spec)
    if not (spec.weights or spec.fetch):
        raise WeightsError(
            f"teacher {spec.name!r}: timm would download its weights, which is not allowed"
        )
    file = load_weights(spec.weights, spec.sha256) if spec.weights else None
    module = _create(library, spec, model, options, file)
    config = library.data.resolve_model_data_config(module)
    classes = _classes(library, module) if file is None else None
    return LoadedModel(
        architecture=f"timm:{model}",
        weights="file" if file else (_tag(module) or "pretrained"),
        module=module,
        preprocessing=apply_view_options(
            preprocessing(_view(config), tuple(config["mean"]), tuple(config["std"])), spec
        ),
        classes=classes,
        file=file.name if file else None,
        file_sha256=file.sha256 if file else None,
        options=options,
        offers=_offers(module),
        forward=_forward(module),
        maps="features" in _offers(module),
        pooling=_pooling(module),
    )


def _create(
    timm: Any, spec: TeacherSpec, model: str, options: dict[str, Any], file: WeightsFile | None
) -> nn.Module:
    try:
        module: nn.Module = timm.create_model(model, pretrained=file is None, **options)
    except Exception as error:
        # RuntimeError for an unknown model; for weights it cannot fetch, whatever the hub's client
        # raises.
        if not timm.is_model(model.split(".", 1)[0]) and ":" not in model:
            near = timm.list_models(f"*{model.split('.', 1)[0]}*")[:5]
            also = f"; near: {', '.join(near)}" if near else ""
            raise TeacherError(f"timm has no model {model!r}{also}") from None
        line = first_line(error)
        if isinstance(error, TypeError) or file is not None:
            raise TeacherError(f"teacher {spec.name!r}: timm refuses to build it: {line}") from None
        raise WeightsError(
            f"teacher {spec.name!r}: its weights are not on this machine and cannot be fetched ({line}); "
            f"bring the file and pass --teacher-weights {spec.name}=FILE"
        ) from None
    if file is not None:
        load_into(module, file.state, f"weights file {file.name}")
    return module


def _offers(module: nn.Module) -> tuple[Output, ...]:
    """Return what a model gives: features alone without a classifier, as encoders come."""
    outputs: tuple[Output, ...] = ("logits",) if getattr(module, "num_classes", 0) else ()
    if hasattr(module, "forward_head") and hasattr(module, "forward_features"):
        outputs = (*outputs, "features")
    return outputs


def _pooling(module: nn.Module) -> str:
    """Return the pooling that timm's forward_head does, as `forward_head, token`."""
    for owner in (module, getattr(module, "head", None)):
        pool = getattr(owner, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if kind:
            return f"forward_head, {kind}"
    return "forward_head"


def _forward(module: Any) -> Forward:
    """Return timm's forward pass in its two halves, the second without and with the classifier.

    For logits alone the model's own forward is run.
    """

    def forward(images: Tensor, outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        if "features" not in outputs:
            return {"logits": module(images)}
        maps = module.forward_features(images)
        found: dict[str, Tensor] = {"features": module.forward_head(maps, pre_logits=True)}
        if MAP in outputs:
            found[MAP] = _map(module, maps)
        if "logits" in outputs:
            found["logits"] = module.forward_head(maps)
        return found

    return forward


def _map(module: Any, maps: Tensor) -> Tensor:
    """Return the features before pooling as [B, D, h, w]: of a transformer its patch tokens.

    Whatever has no such form is returned as it is, which `Teacher` refuses.
    """
    if maps.ndim == 4:
        nhwc = getattr(module, "output_fmt", "NCHW") == "NHWC"
        return maps.permute(0, 3, 1, 2) if nhwc else maps
    sizes = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    tokens = maps[:, getattr(module, "num_prefix_tokens", 0) :] if maps.ndim == 3 else maps
    if sizes is None or tokens.ndim != 3 or math.prod(sizes) != tokens.shape[1]:
        return maps
    return tokens.transpose(1, 2).unflatten(2, tuple(sizes))


def _tag(module: nn.Module) -> str:
    return str((getattr(module, "pretrained_cfg", None) or {}).get("tag", ""))


def _view(config: dict[str, Any]) -> View:
    """Return timm's evaluation view.

    It is a short side of ⌊size / crop_pct⌋ and a centre crop, or a squash to the input.
    """
    height, width = int(config["input_size"][1]), int(config["input_size"][2])
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    if height != width or config.get("crop_mode") == "squash":
        return View(resize=(height, width), crop=None, interpolation=interpolation)
    return View(
        resize=math.floor(height / config["crop_pct"]), crop=height, interpolation=interpolation
    )


def _classes(timm: Any, module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of the ImageNet subsets that timm knows; None for others."""
    if getattr(module, "num_classes", 0) == 1000:
        return imagenet_classes()
    subset = timm.data.infer_imagenet_subset(module)
    if not subset:
        return None
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
