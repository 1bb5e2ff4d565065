"""Image models of transformers, by their name on the Hugging Face Hub.

Their pooled output is the feature.

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
    model.safetensors and preprocessor_config.json. The option `pooling` chooses how features are
    taken (`POOLINGS`). Code of a repository is never run.

    Raises:
        TeacherError: transformers is not installed or cannot build the model; another option.
        WeightsError: The files do not exist, cannot be fetched, or are not safetensors.
    """
    transformers = import_extra("transformers", "hf", f"teacher {spec.name!r}", TeacherError)
    options = builder_options(spec)
    asked = options.pop("pooling", None)
    if options or asked not in (None, *POOLINGS):
        key, value = next(iter(options.items()), ("pooling", asked))
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
    module = _Pooled(*_build(transformers, spec, folder, prepared.view, asked))
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
            return output.pooler_output.flatten(1)  # convnets keep [B, D, 1, 1]
        tokens = output.last_hidden_state
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        return tokens[:, 0] if self.pooling == "cls" else tokens.mean(1)


def _folder(spec: TeacherSpec, repository: str) -> Path:
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
        # transformers would load the model that the adapter names, from wherever it says.
        raise WeightsError(
            f"teacher {spec.name!r}: {folder} is an adapter to another model; merge the two first"
        )
    return folder


def _build(
    transformers: Any, spec: TeacherSpec, folder: Path, view: View, asked: str | None
) -> tuple[nn.Module, str]:
    """Return the model and how its features are taken."""
    try:
        model, loading = transformers.AutoModel.from_pretrained(
            str(folder),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            # Named, so that a configuration cannot name a kernel of the Hub.
            attn_implementation="eager",
            dtype="float32",
            output_loading_info=True,
        )
    except Exception as error:  # transformers', safetensors' or torch's
        raise TeacherError(
            f"teacher {spec.name!r}: transformers cannot load {folder} ({first_line(error)})"
        ) from None
    missing = sorted(map(str, loading["missing_keys"]))
    pooler = [key for key in missing if "pooler" in key.split(".")]
    if others := [key for key in missing if key not in pooler]:
        raise WeightsError(
            f"teacher {spec.name!r}: {folder} lacks {len(others)} tensors of the model (first {others[0]})"
        )
    if asked == "pooler_output" and pooler:
        raise TeacherError(
            f"teacher {spec.name!r}: pooling=pooler_output, but {folder} has no weights of a pooler; allowed: cls, mean"
        )
    if asked is not None:
        return model, asked
    with third_party(f"teacher {spec.name!r}: fails on an image", TeacherError):
        return model, _default_pooling(model, view, trained_pooler=not pooler)


def _default_pooling(model: Any, view: View, *, trained_pooler: bool) -> str:
    """Return the pooling of a model: its image embedding, its pooler's output, else its tokens.

    A pooler without weights in the file would be random; then the class token is taken, or the mean
    of all tokens where there is none.
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
    """Return what the model's image processor does, with the options of the user."""
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
    odd = abs(255 * float(record.get("rescale_factor", 1 / 255)) - 1) > 1e-6
    if odd and not {"mean", "std"} <= spec.options.keys():
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
        view = View(resize=256, crop=224, interpolation=_filter(record))
    if not record.get("do_normalize", True):
        return apply_view_options(preprocessing(view, (0.0,) * 3, (1.0,) * 3), spec)
    mean, std = (tuple(map(float, record[key])) for key in ("image_mean", "image_std"))
    return apply_view_options(preprocessing(view, mean, std), spec)


def _view(record: Mapping[str, Any]) -> View | None:
    """Return the view of an image processor; None if it pads, keeps the size or has several."""
    size = record.get("size") or {}
    crop = record.get("crop_size") or {}
    if not record.get("do_resize") or record.get("do_pad"):
        return None
    kind = _filter(record)
    if set(size) == {"height", "width"}:
        resize: int | tuple[int, int] = (size["height"], size["width"])
    elif set(size) == {"shortest_edge"}:
        side = int(size["shortest_edge"])
        if record.get("crop_pct"):  # ConvNeXt: below 384 a margin and a crop, else a squash
            squash = View(resize=(side, side), interpolation=kind)
            margin = int(side / record["crop_pct"])
            return View(resize=margin, crop=side, interpolation=kind) if side < 384 else squash
        resize = side
    else:
        return None
    if not record.get("do_center_crop"):
        return View(resize=resize, interpolation=kind) if isinstance(resize, tuple) else None
    if crop.get("height") is None or crop.get("height") != crop.get("width"):
        return None
    return View(resize=resize, crop=int(crop["height"]), interpolation=kind)


def _filter(record: Mapping[str, Any]) -> Literal["bilinear", "bicubic"]:
    """Return the filter that a processor names by PIL's number; all but bilinear are bicubic."""
    return "bilinear" if int(record.get("resample", 3)) == 2 else "bicubic"
