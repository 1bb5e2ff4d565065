"""Load models of timm, with the preprocessing that timm records for them.

Weights that are found by a model's name are safetensors. A weights file of the user may have any
format that `load_weights` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..common.errors import TeacherError, WeightsError, first_line, third_party
from ..common.plugins import import_extra
from ..common.weights import WeightsFile, load_into, load_weights
from ..store.store_options import Output
from ..video.geometry import View
from .hub import hub_file
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
    library = import_extra("timm", "timm", f"teacher {spec.name!r}", TeacherError)
    options = builder_options(spec)
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
    """Build the module with the weights of a file, or with published ones."""
    if not timm.is_model(model.split(".", 1)[0]) and ":" not in model:
        similar = timm.list_models(f"*{model.split('.', 1)[0]}*")[:5]
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise TeacherError(f"timm has no model {model!r}{hint}")
    arguments = options if file is not None else _published_options(timm, spec, model, options)
    try:
        module: nn.Module = timm.create_model(model, pretrained=file is None, **arguments)
    # Builders, and weights that do not fit, raise errors of any type.
    except Exception as error:
        raise TeacherError(
            f"teacher {spec.name!r}: timm refuses to build it: {first_line(error)}"
        ) from None
    if file is not None:
        load_into(module, file.state, f"weights file {file.name}")
    return module


def _published_options(
    timm: Any, spec: TeacherSpec, model: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Return the builder's options, with the safetensors file of a model's published weights.

    Without it timm would open a pickled checkpoint if a repository has no other file.

    Raises:
        WeightsError: The weights are not published as safetensors, or are not cached and cannot be
            fetched.
    """
    scheme, _, repository = model.partition(":")
    name, url = "", ""
    if not repository:
        with third_party(f"teacher {spec.name!r}: timm refuses to build it", TeacherError):
            config = timm.models.resolve_pretrained_cfg(
                model, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay")
            )
        # An option names a file of the user.
        if config.file:
            return options
        repository, name, url = config.hf_hub_id, config.hf_hub_filename, str(config.url or "")
    # Another scheme, such as local-dir, names a folder of the user.
    elif scheme not in ("hf-hub", "hf_hub"):
        return options
    elif not spec.fetch:
        raise WeightsError(
            f"teacher {spec.name!r}: timm would download its configuration, which is not allowed"
        )
    if not repository:
        raise WeightsError(
            f"teacher {spec.name!r}: timm publishes "
            + (f"its weights only as {url}, which is no safetensors" if url else "no weights of it")
            + f"; get a file of them and pass --teacher-weights {spec.name}=FILE"
        )
    repository, _, revision = repository.partition("@")
    hub = timm.models._hub
    names = (
        [name]
        if (name or "").endswith(".safetensors")
        else hub._get_safe_alternatives(name or hub.HF_WEIGHTS_NAME)
    )
    path = hub_file(spec, repository, [*names], revision or None)
    # Some configurations set `custom_load` for a file in another format.
    source = {"file": str(path), "custom_load": False, "source": ""}
    overlay = options.get("pretrained_cfg_overlay") or {}
    return {**options, "pretrained_cfg_overlay": {**overlay, **source}}


def _offers(module: nn.Module) -> tuple[Output, ...]:
    """Return the outputs of a model; one without a classifier has features alone."""
    outputs: tuple[Output, ...] = ("logits",) if getattr(module, "num_classes", 0) else ()
    if hasattr(module, "forward_head") and hasattr(module, "forward_features"):
        outputs = (*outputs, "features")
    return outputs


def _pooling(module: nn.Module) -> str:
    """Return the pooling of timm's forward_head, such as `forward_head, token`."""
    for owner in (module, getattr(module, "head", None)):
        global_pool = getattr(owner, "global_pool", None)
        pooling = (
            global_pool if isinstance(global_pool, str) else getattr(global_pool, "pool_type", None)
        )
        if pooling:
            return f"forward_head, {pooling}"
    return "forward_head"


def _forward(module: Any) -> Forward:
    """Return a forward pass of timm's forward_features and forward_head.

    forward_head is run without the classifier for features, and with it for logits. If only logits
    are requested, the forward method of the model is run.
    """

    def forward(images: Tensor, outputs: tuple[str, ...]) -> Mapping[str, Tensor]:
        if "features" not in outputs:
            return {"logits": module(images)}
        maps = module.forward_features(images)
        results: dict[str, Tensor] = {"features": module.forward_head(maps, pre_logits=True)}
        if MAP in outputs:
            results[MAP] = _map(module, maps)
        if "logits" in outputs:
            results["logits"] = module.forward_head(maps)
        return results

    return forward


def _map(module: Any, maps: Tensor) -> Tensor:
    """Return the features before pooling as [B, D, h, w], for a transformer from its patch tokens.

    Features that cannot be arranged in this form are returned unchanged, and `Teacher` refuses
    them.
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
    """Return the name of the pretrained weights, '' if timm does not record it."""
    return str((getattr(module, "pretrained_cfg", None) or {}).get("tag", ""))


def _view(config: dict[str, Any]) -> View:
    """Return the view of timm's evaluation.

    It is a short side of ⌊size / crop_pct⌋ and a centre crop, or a squash to the input size.
    """
    height, width = int(config["input_size"][1]), int(config["input_size"][2])
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    if height != width or config.get("crop_mode") == "squash":
        return View(resize=(height, width), crop=None, interpolation=interpolation)
    return View(
        resize=math.floor(height / config["crop_pct"]), crop=height, interpolation=interpolation
    )


def _classes(timm: Any, module: nn.Module) -> tuple[str, ...] | None:
    """Return the class names of an ImageNet subset that timm knows; None for other classes."""
    if getattr(module, "num_classes", 0) == 1000:
        return imagenet_classes()
    subset = timm.data.infer_imagenet_subset(module)
    if not subset:
        return None
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))
