"""Load image models of transformers by their name on the Hugging Face Hub.

Features are their pooled output.

Shapes: B images, h w pixels, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..common.errors import TeacherError, WeightsError, first_line, third_party
from ..common.plugins import import_extra
from ..common.weights import file_sha256
from ..video.geometry import View
from .hub import hub_folder_of, need_safetensors
from .loaded_model import (
    LoadedModel,
    Preprocessing,
    apply_view_options,
    builder_options,
    preprocessing,
)
from .teacher_options import TeacherSpec

POOLINGS = ("image_features", "pooler_output", "cls", "mean")


def hf_model(spec: TeacherSpec, repository: str) -> LoadedModel:
    """Load a model with transformers' AutoModel, from the cache, the Hub or a local folder.

    `--teacher-weights NAME=FOLDER` (or its model.safetensors) names a folder with config.json,
    model.safetensors and preprocessor_config.json. The option `pooling` sets the pooling
    (`POOLINGS`). Code of a repository is never run.

    Raises:
        TeacherError: transformers is not installed or cannot build the model, or an option is not
            allowed.
        WeightsError: The files do not exist, cannot be fetched, or are not safetensors.
    """
    transformers = import_extra("transformers", "hf", f"teacher {spec.name!r}", TeacherError)
    options = builder_options(spec)
    pooling = options.pop("pooling", None)
    if options or pooling not in (None, *POOLINGS):
        key, value = next(iter(options.items()), ("pooling", pooling))
        raise TeacherError(
            f"teacher {spec.name!r}: has no option {key}={value}; allowed: pooling={'|'.join(POOLINGS)} and "
            f"distinit's own"
        )
    folder = _folder(spec, repository)
    file = folder / "model.safetensors"
    digest = file_sha256(file) if file.is_file() else None
    if spec.sha256 is not None and digest != spec.sha256.strip().lower():
        raise WeightsError(f"weights file {file}: sha256 is {digest}, expected {spec.sha256}")
    prepared = _preprocessing(transformers, spec, folder)
    module = _Pooled(*_build(transformers, spec, folder, prepared.view, pooling))
    return LoadedModel(
        architecture=f"hf:{repository}",
        weights="file" if spec.weights else "pretrained",
        module=module,
        preprocessing=prepared,
        file=file.name if digest else None,
        file_sha256=digest,
        offers=("features",),
        pooling=module.pooling,
    )


class _Pooled(nn.Module):
    """Images [B, 3, h, w] → pooled features [B, D] of a model of transformers."""

    def __init__(self, model: Any, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, images: Tensor) -> Tensor:
        if self.pooling == "image_features":
            output = self.model.get_image_features(pixel_values=images)
            return output if isinstance(output, Tensor) else output.pooler_output
        output = self.model(pixel_values=images)
        if self.pooling == "pooler_output":
            # Convolutional networks return [B, D, 1, 1].
            return output.pooler_output.flatten(1)
        tokens = output.last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        return tokens[:, 0] if self.pooling == "cls" else tokens.mean(1)


def _folder(spec: TeacherSpec, repository: str) -> Path:
    """Return the folder with the model's configuration and weights."""
    if spec.weights is None:
        folder = hub_folder_of(spec, repository)
    elif (folder := Path(spec.weights)).is_dir():
        pass
    else:
        folder = need_safetensors(spec, folder).parent
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise WeightsError(f"teacher {spec.name!r}: {folder} has no {name}")
    if (folder / "adapter_config.json").exists():
        # transformers would load the model that the adapter names, from any place.
        raise WeightsError(
            f"teacher {spec.name!r}: {folder} is an adapter to another model; merge the two first"
        )
    return folder


def _build(
    transformers: Any, spec: TeacherSpec, folder: Path, view: View, pooling: str | None
) -> tuple[nn.Module, str]:
    """Return the model and its pooling: the one of the option, else the default of the model."""
    try:
        model, loading = transformers.AutoModel.from_pretrained(
            str(folder),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            # This is set so that a configuration cannot name a kernel on the Hub.
            attn_implementation="eager",
            dtype="float32",
            output_loading_info=True,
        )
    # transformers, safetensors and torch raise errors of any type.
    except Exception as error:
        raise TeacherError(
            f"teacher {spec.name!r}: transformers cannot load {folder} ({first_line(error)})"
        ) from None
    missing = sorted(map(str, loading["missing_keys"]))
    missing_pooler = [key for key in missing if "pooler" in key.split(".")]
    if missing_others := [key for key in missing if key not in missing_pooler]:
        raise WeightsError(
            f"teacher {spec.name!r}: {folder} lacks {len(missing_others)} tensors of the model "
            f"(first {missing_others[0]})"
        )
    if pooling == "pooler_output" and missing_pooler:
        raise TeacherError(
            f"teacher {spec.name!r}: pooling=pooler_output, but {folder} has no weights of a pooler; allowed: cls, mean"
        )
    if pooling is not None:
        return model, pooling
    with third_party(f"teacher {spec.name!r}: fails on an image", TeacherError):
        return model, _default_pooling(model, view, trained_pooler=not missing_pooler)


def _default_pooling(model: Any, view: View, *, trained_pooler: bool) -> str:
    """Return the default pooling: image embedding, pooler, class token or mean of tokens.

    A pooler without weights in the file would be random. Then features are the class token, or the
    mean of all tokens for a model without one.
    """
    if hasattr(model, "get_image_features"):
        return "image_features"
    with torch.inference_mode():
        output = model.eval()(pixel_values=torch.zeros(1, 3, *(view.fixed_shape or (224, 224))))
    if trained_pooler and getattr(output, "pooler_output", None) is not None:
        return "pooler_output"
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    return "cls" if "cls_token" in names else "mean"


def _preprocessing(transformers: Any, spec: TeacherSpec, folder: Path) -> Preprocessing:
    """Return the preprocessing of the model's image processor, with the options of the user."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        record: dict[str, Any] = processor.to_dict()
    except Exception as error:
        raise TeacherError(
            f"teacher {spec.name!r}: transformers cannot read {folder}/preprocessor_config.json "
            f"({first_line(error)})"
        ) from None
    view = _view(record)
    other_scale = abs(255 * float(record.get("rescale_factor", 1 / 255)) - 1) > 1e-6
    if other_scale and not {"mean", "std"} <= spec.options.keys():
        raise TeacherError(
            f"teacher {spec.name!r}: its processor scales pixels by {record['rescale_factor']}, not to 0–1; set "
            f"--teacher-option mean=… and std=…"
        )
    if view is None:
        if not spec.options.keys() & {"resize", "input_size"}:
            raise TeacherError(
                f"teacher {spec.name!r}: its processor resizes in a way that a view cannot ({record.get('size')}); "
                f"choose one, such as --teacher-option resize=224x224"
            )
        view = View(resize=256, crop=224, interpolation=_interpolation(record))
    if not record.get("do_normalize", True):
        return apply_view_options(preprocessing(view, (0.0,) * 3, (1.0,) * 3), spec)
    mean, std = (tuple(map(float, record[key])) for key in ("image_mean", "image_std"))
    return apply_view_options(preprocessing(view, mean, std), spec)


def _view(record: Mapping[str, Any]) -> View | None:
    """Return the view of an image processor; None if it pads, or does not resize to one size."""
    size = record.get("size") or {}
    crop = record.get("crop_size") or {}
    if not record.get("do_resize") or record.get("do_pad"):
        return None
    interpolation = _interpolation(record)
    if set(size) == {"height", "width"}:
        resize: int | tuple[int, int] = (size["height"], size["width"])
    elif set(size) == {"shortest_edge"}:
        side = int(size["shortest_edge"])
        if record.get("crop_pct"):
            # ConvNeXt crops the centre of a larger picture below 384 pixels, and else squashes it.
            if side >= 384:
                return View(resize=(side, side), interpolation=interpolation)
            resized = int(side / record["crop_pct"])
            return View(resize=resized, crop=side, interpolation=interpolation)
        resize = side
    else:
        return None
    if not record.get("do_center_crop"):
        return (
            View(resize=resize, interpolation=interpolation) if isinstance(resize, tuple) else None
        )
    if crop.get("height") is None or crop.get("height") != crop.get("width"):
        return None
    return View(resize=resize, crop=int(crop["height"]), interpolation=interpolation)


def _interpolation(record: Mapping[str, Any]) -> Literal["bilinear", "bicubic"]:
    """Return the interpolation that a processor names by PIL's number; bicubic unless bilinear."""
    return "bilinear" if int(record.get("resample", 3)) == 2 else "bicubic"
