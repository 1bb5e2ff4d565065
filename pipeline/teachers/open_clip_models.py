"""Load models of open_clip: CLIP, SigLIP and similar ones.

Features are the embedding of the image tower. The text tower makes a classifier from texts.

Shapes: K classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..common.errors import TeacherError, UsageError, WeightsError, first_line, third_party
from ..common.plugins import import_extra
from ..common.weights import WeightsFile, load_weights
from ..video.geometry import View
from .hub import hub_file, need_safetensors
from .loaded_model import LoadedModel, apply_view_options, preprocessing, refuse_builder_options
from .teacher_options import TeacherSpec


def open_clip_model(spec: TeacherSpec, model: str, tag: str | None) -> LoadedModel:
    """Load the image tower of an open_clip architecture, with published weights or those of a file.

    Args:
        spec: The teacher.
        model: An architecture of open_clip, such as `ViT-B-32`.
        tag: The name of published weights, such as `laion2b_s34b_b79k`. It determines the
            preprocessing even if a weights file is used.

    Raises:
        TeacherError: open_clip is not installed, or has no such architecture or weights.
        WeightsError: The weights are not safetensors, cannot be fetched or do not fit.
    """
    refuse_builder_options(spec)
    loaded = load_both_towers(spec, model, tag)
    return LoadedModel(
        architecture=f"open_clip:{model}",
        weights="file" if spec.weights else str(tag),
        module=loaded.model.visual,
        preprocessing=apply_view_options(
            preprocessing(
                _view(loaded.config, spec),
                tuple(loaded.config["mean"]),
                tuple(loaded.config["std"]),
            ),
            spec,
        ),
        file=loaded.file.name,
        file_sha256=loaded.file.sha256,
        offers=("features",),
        pooling="image embedding",
    )


@dataclass(frozen=True)
class OpenClipModel:
    """Both towers of a model, its weights file, and open_clip's preprocessing."""

    model: Any
    config: dict[str, Any]
    file: WeightsFile


def load_both_towers(spec: TeacherSpec, model: str, tag: str | None) -> OpenClipModel:
    """Load both towers of an open_clip architecture; see `open_clip_model`."""
    library = import_extra("open_clip", "clip", f"teacher {spec.name!r}", TeacherError)
    if model not in library.list_models():
        similar = [name for name in library.list_models() if model.lower() in name.lower()][:5]
        raise TeacherError(
            f"open_clip has no architecture {model!r}"
            + (f"; similar: {', '.join(similar)}" if similar else "")
        )
    published = _published(library, spec, model, tag)
    path = _weights_path(library, spec, published)
    file = load_weights(path, spec.sha256)
    return OpenClipModel(*_build(library, spec, model, path, published), file)


def _published(library: Any, spec: TeacherSpec, model: str, tag: str | None) -> dict[str, Any]:
    """Return open_clip's record of published weights, with their address and preprocessing."""
    tags = library.list_pretrained_tags_by_model(model)
    if tag is None and spec.weights is None:
        raise TeacherError(
            f"teacher {spec.name!r}: name its weights, open_clip:{model}@WEIGHTS, of {', '.join(tags) or 'none'}, "
            f"or give a file: --teacher-weights {spec.name}=FILE"
        )
    if tag is not None and tag not in tags:
        raise TeacherError(
            f"open_clip's {model} has no weights {tag!r}; allowed: {', '.join(tags) or 'none'}"
        )
    published: dict[str, Any] = dict(library.get_pretrained_cfg(model, tag)) if tag else {}
    if published and bool(published.get("quick_gelu")) != bool(
        library.get_model_config(model).get("quick_gelu")
    ):
        # open_clip only warns, but the features would differ from those that were trained.
        raise TeacherError(
            f"teacher {spec.name!r}: the weights {tag!r} are of the other activation (QuickGELU): "
            f"name the architecture with or without -quickgelu"
        )
    return published


def _weights_path(library: Any, spec: TeacherSpec, published: dict[str, Any]) -> Path:
    """Return the user's weights file, or the safetensors file of published weights."""
    if spec.weights is not None:
        return need_safetensors(spec, Path(spec.weights))
    repository, _, name = str(published.get("hf_hub", "")).rpartition("/")
    # As open_clip does, look for the published name or its alternatives in safetensors.
    alternatives = library.pretrained._get_safe_alternatives(
        name or library.pretrained.HF_WEIGHTS_NAME
    )
    names = [n for n in (name, *alternatives) if n.endswith(".safetensors")]
    if not repository:
        raise WeightsError(
            f"teacher {spec.name!r}: its weights are not published as safetensors; convert them and pass "
            f"--teacher-weights {spec.name}=FILE"
        )
    return hub_file(spec, repository, names)


def _build(
    library: Any, spec: TeacherSpec, model: str, path: Path, published: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Build the model and load its weights; return it and open_clip's preprocessing."""
    text_config = library.get_model_config(model).get("text_cfg", {})
    if "hf_model_name" in text_config and not spec.fetch:
        raise WeightsError(
            f"teacher {spec.name!r}: open_clip would fetch the configuration of its text tower, which is not allowed"
        )
    with third_party(f"teacher {spec.name!r}: open_clip cannot build it", TeacherError):
        built = library.create_model(model, pretrained=None, pretrained_text=False)
    try:
        library.load_checkpoint(built, str(path))
    # open_clip and torch raise errors of several types for a state that does not fit.
    except Exception as error:
        raise WeightsError(
            f"weights file {path}: does not fit open_clip's {model} ({first_line(error)})"
        ) from None
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    config = merge_preprocess_dict(asdict(PreprocessCfg()), published)
    config["size"] = getattr(built.visual, "image_size", config["size"])
    return built, config


def _view(config: dict[str, Any], spec: TeacherSpec) -> View:
    """Return the view of open_clip's evaluation: a short side and a centre crop, or a squash."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    mode = config["resize_mode"]
    if mode == "longest" and "resize" not in spec.options:
        raise TeacherError(
            f"teacher {spec.name!r}: open_clip pads its pictures to a square, which a view cannot; "
            f"choose a resize, such as --teacher-option resize={height}x{width}"
        )
    if mode == "shortest" and height == width:
        return View(resize=height, crop=height, interpolation=interpolation)
    return View(resize=(height, width), interpolation=interpolation)


BATCH_SIZE = 64
"""Number of texts per forward pass."""


@dataclass(frozen=True)
class TextEmbeddings:
    """The embeddings of classes, and the scale and bias of their cosines.

    Args:
        weight: Embeddings [K, D], each of length 1.
        logit_scale: The factor of cosines.
        logit_bias: The bias of scaled cosines, None without one.
    """

    weight: NDArray[np.float32]
    logit_scale: float
    logit_bias: float | None


def text_embeddings(spec: TeacherSpec, prompts: Sequence[Sequence[str]]) -> TextEmbeddings:
    """Embed classes by their prompts: the mean of the prompts' embeddings, divided by its length.

    Args:
        spec: `open_clip:ARCH@WEIGHTS`, optionally with a weights file.
        prompts: One or more texts for each class.

    Raises:
        UsageError: The teacher is not a model of open_clip.
        TeacherError: open_clip is not installed or has no such model.
        WeightsError: The weights are not safetensors, cannot be fetched or do not fit.
    """
    family, _, family_name = spec.name.partition(":")
    if family != "open_clip" or not family_name:
        raise UsageError(
            f"--teacher {spec.name}: expected open_clip:ARCH@WEIGHTS, whose text tower embeds classes"
        )
    architecture, _, tag = family_name.partition("@")
    model = load_both_towers(spec, architecture, tag or None).model.eval()
    with third_party(f"teacher {spec.name!r}: its text tower fails", TeacherError):
        import open_clip

        library: Any = open_clip
        tokenize = library.get_tokenizer(architecture)
        texts = [text for class_prompts in prompts for text in class_prompts]
        with torch.inference_mode():
            batches = [
                model.encode_text(tokenize(texts[i : i + BATCH_SIZE]), normalize=True).float()
                for i in range(0, len(texts), BATCH_SIZE)
            ]
    embeddings = torch.cat(batches).split([len(class_prompts) for class_prompts in prompts])
    means = torch.stack([class_embeddings.mean(dim=0) for class_embeddings in embeddings])
    bias = getattr(model, "logit_bias", None)
    return TextEmbeddings(
        torch.nn.functional.normalize(means, dim=1).numpy(),
        float(model.logit_scale.detach().exp()),
        None if bias is None else float(bias.detach()),
    )
