"""Video encoders of transformers as students: VideoMAE, ViViT, TimeSformer.

They are built from options, and their weights are read from safetensors files of a local folder.
Nothing is downloaded, and no code of a model's repository is run.

Shape letters: B clips, C channels, T frames of a clip, H W pixels, D features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.errors import CheckpointError, UsageError, third_party
from ..common.plugins import import_extra
from ..common.weights import load_weights
from .student_options import HF_MODELS, StudentOptions

# Keys of a configuration that follow from the clip.
_CLIP_KEYS = ("image_size", "num_frames", "num_channels")


class VideoEncoder(nn.Module):
    """A transformers video model without its classifier: clips [B, C, T, H, W] to features [B, D].

    The features are the inputs of the model's classifier: the mean over tokens for VideoMAE, and
    the class token for ViViT and TimeSformer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.model.classifier = nn.Identity()

    def forward(self, clip: Tensor) -> Tensor:
        """Return the features; transformers takes clips as [B, T, C, H, W]."""
        features: Tensor = self.model(pixel_values=clip.transpose(1, 2)).logits
        return features


def transformers_backbone(options: StudentOptions, clip: tuple[int, int]) -> nn.Module:
    """Build a video encoder with fresh weights.

    Args:
        options: Options with `hf:MODEL`, and keys of the model's configuration.
        clip: (T, side) of the clips, unless the options set other sizes.

    Raises:
        UsageError: transformers is not installed, or the model does not accept an option.
    """
    transformers = import_extra("transformers", "hf", f"student {options.architecture!r}")
    with third_party(f"student {options.architecture!r}", UsageError):
        config = _config(transformers, options, clip)
        return VideoEncoder(transformers.AutoModelForVideoClassification.from_config(config))


def read_folder(folder: str) -> StudentOptions:
    """Return the options of the model in a local folder, from its config.json.

    Raises:
        CheckpointError: config.json cannot be read, or describes another kind of model.
        UsageError: transformers is not installed.
    """
    transformers = import_extra("transformers", "hf", f"--init hf:{folder}")
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = content["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not a readable configuration of transformers") from None
    if kind not in HF_MODELS:
        raise CheckpointError(f"{path}: model_type is {kind!r}, allowed: {', '.join(HF_MODELS)}")
    defaults = _model_defaults(transformers, kind)
    # VideoMAE computes its positional embeddings, so that its weights fit any clip.
    ignored = {"num_channels", *(("image_size", "num_frames") if kind == "videomae" else ())}
    differing = {
        key: value
        for key, value in content.items()
        if key in defaults and key not in ignored and (value != defaults[key] or key in _CLIP_KEYS)
    }
    channels = content.get("num_channels", 3)
    if channels not in (2, 3):
        raise CheckpointError(f"{path}: num_channels is {channels!r}, allowed: 2, 3")
    return StudentOptions.model_validate(
        {"architecture": f"hf:{kind}", "channels": channels, "options": differing}
    )


def read_weights(folder: str, options: StudentOptions, clip: tuple[int, int]) -> dict[str, Tensor]:
    """Return the weights of a local folder, under the names of the student's backbone.

    Raises:
        CheckpointError: There is no safetensors file, or tensors are missing or of another shape.
    """
    label = f"--init hf:{folder}"
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{label}: holds no .safetensors; other formats are not read")
    state = {name: tensor for file in files for name, tensor in load_weights(file).state.items()}
    transformers = import_extra("transformers", "hf", label)
    with third_party(label, CheckpointError):
        config = _config(transformers, options, clip)
        auto = transformers.AutoModelForVideoClassification
        model_class = auto._model_mapping[type(config)]
        model, loading_info = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True
        )
    # A pre-trained encoder has neither the classifier nor the norm before it.
    missing = [
        key for key in loading_info["missing_keys"] if not key.startswith(("classifier", "fc_norm"))
    ]
    mismatched = loading_info["mismatched_keys"]
    if missing or mismatched:
        first = min(missing or [str(each[0]) for each in mismatched])
        raise CheckpointError(f"{label}: {first} is missing or of another shape")
    return {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("classifier")
    }


def _model_defaults(transformers: Any, kind: str) -> dict[str, Any]:
    """Return the keys and defaults of a configuration that not all models have.

    Keys of all models are excluded, because they can name code or files (attention implementations,
    quantization).
    """
    common = transformers.PretrainedConfig().to_dict()
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    return {key: value for key, value in defaults.items() if key not in common}


def _config(transformers: Any, options: StudentOptions, clip: tuple[int, int]) -> Any:
    kind = options.architecture.removeprefix("hf:")
    defaults = _model_defaults(transformers, kind)
    unknown = next((key for key in options.options if key not in defaults), None)
    if unknown is not None:
        raise UsageError(
            f"student.options.{unknown}: {options.architecture} takes: {', '.join(sorted(defaults))}"
        )
    sizes = {"num_frames": clip[0], "image_size": clip[1], "num_channels": options.channels}
    return transformers.AutoConfig.for_model(kind, **{**sizes, **options.options})
