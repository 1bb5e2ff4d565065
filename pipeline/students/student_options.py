"""Options of a student and of its export, and the metadata in its file. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..clips.clip_options import NORMALIZATION
from ..common.plugins import is_factory
from ..common.settings import CliOption, Options
from ..store.store_options import Output

Inflation = Literal["scaled", "replicated"]
HeadKind = Literal["linear", "mlp"]
SCRATCH = "scratch"

# Architectures that distinit builds itself, at any width.
BUILTIN_ARCHITECTURES = ("r2plus1d_18", "r2plus1d_34", "r3d_18", "r3d_34", "mc3_18")

# Video encoders of transformers, by their model type, as in `hf:videomae`.
HF_MODELS = ("videomae", "vivit", "timesformer")

# Torchvision's name for the first convolution of r3d, mc3 and R(2+1)D, [F, C, T, H, W].
STEM = "stem.0.weight"


class StudentOptions(Options):
    """Options of a student's backbone, without its heads.

    `variant` is the rule for the middle width of R(2+1)D's factorised convolutions: `torchvision`
    computes it once per block, `vmz` (the code of the paper's authors) once per convolution. Their
    shapes differ, so neither loads the weights of the other. Other architectures have one variant.

    `architecture` may also name another video model of torchvision (`s3d`, `mvit_v2_s`), which is
    used without its classifier; `timm:NAME`, an image model that is applied to each frame;
    `hf:MODEL`, a video encoder of transformers; or `package.module:factory`, a function that
    returns a module from clips [B, C, T, H, W] to features [B, D] or [B, D, t, h, w]. `options` are
    the arguments of these builders.
    """

    architecture: Annotated[str, CliOption("--student", "Student", "r2plus1d_18|r3d_18")] = Field(
        default="r2plus1d_18",
        description="the backbone; also r2plus1d_34, r3d_34, mc3_18, torchvision's s3d, mvit_v2_s, "
        "swin3d_t and others, timm:NAME on each frame, hf:videomae, hf:vivit, hf:timesformer, "
        "module:factory",
    )
    variant: Annotated[Literal["torchvision", "vmz"], CliOption(group="Student")] = Field(
        default="torchvision",
        description="R(2+1)D's middle width: once per block, or once per convolution as in the "
        "paper's code",
    )
    width: Annotated[float, CliOption(group="Student", metavar="X")] = Field(
        default=1.0, gt=0, le=8, description="factor on every number of channels"
    )
    # Channels of a clip: 3 for RGB, 2 for optical flow.
    channels: Literal[2, 3] = 3
    options: dict[str, Any] = Field(
        default={}, description="arguments of torchvision's builder or of the factory"
    )

    @field_validator("architecture")
    @classmethod
    def _check_architecture(cls, name: str) -> str:
        kind, colon, model = name.partition(":")
        if kind == "hf" and colon and model not in HF_MODELS:
            allowed = ", ".join(f"hf:{each}" for each in HF_MODELS)
            raise ValueError(
                f"{name!r} is not known; there are: {allowed}; finetune --init hf:FOLDER reads a folder"
            )
        if name in BUILTIN_ARCHITECTURES or (colon and kind in ("hf", "timm")) or is_factory(name):
            return name
        # Imported here, because a config of distinit's architectures needs no torch.
        from torchvision.models import list_models, video

        torchvision_models = [
            model for model in list_models(module=video) if model not in BUILTIN_ARCHITECTURES
        ]
        if name not in torchvision_models:
            allowed = ", ".join((*BUILTIN_ARCHITECTURES, *torchvision_models))
            raise ValueError(
                f"{name!r} is not known; there are: {allowed}, timm:NAME, hf:MODEL and "
                "package.module:factory"
            )
        return name

    @property
    def is_factory(self) -> bool:
        """Whether building this student runs code of a module that the options name."""
        return is_factory(self.architecture) and not self.architecture.startswith(("hf:", "timm:"))

    @model_validator(mode="after")
    def _check_combinations(self) -> StudentOptions:
        is_builtin = self.architecture in BUILTIN_ARCHITECTURES
        if not is_builtin and self.width != 1.0:
            raise ValueError(
                f"width is {self.width:g}; {self.architecture} has only 1, other widths exist for: "
                f"{', '.join(BUILTIN_ARCHITECTURES)}"
            )
        if is_builtin and self.options:
            raise ValueError(f"options {', '.join(self.options)}: {self.architecture} takes none")
        if self.variant == "vmz" and not self.architecture.startswith("r2plus1d"):
            raise ValueError(
                f"variant 'vmz' is a rule of r2plus1d_18 and r2plus1d_34; {self.architecture} has only 'torchvision'"
            )
        return self

    def describe(self) -> str:
        """Return one phrase for messages: `r2plus1d_18 (variant vmz, width 0.5, 3 channels)`."""
        if self.architecture not in BUILTIN_ARCHITECTURES:
            arguments = "".join(f", {key} {value}" for key, value in self.options.items())
            return f"{self.architecture} ({self.channels} channels{arguments})"
        return f"{self.architecture} (variant {self.variant}, width {self.width:g}, {self.channels} channels)"


class HeadMeta(Options):
    """The kind of output that a head was trained on, and the loss.

    A head of features has the teacher's scale after smooth-l1 or mse. After cosine only the
    direction of its features is meaningful.
    """

    output: Output
    loss: str


class StudentMeta(Options):
    """Metadata of an exported student, in addition to its options.

    Attributes:
        classes: Class names by head, in the order of its logits; a head may be left out.
        heads: Output and loss by head, if a head was trained on features; empty if all give logits.
        clip_length: T, the number of frames of a clip.
        clip_size: H and W of a clip, in pixels.
        resize: Height and width that a frame is resized to before the crop, if known.
        mean: One number per channel: of pixels in 0–1, or of displacements in pixels for optical
            flow. None means the default.
        std: Likewise.
        extra: JSON-able. Origin of the student: store, teachers, data set, …
    """

    classes: dict[str, list[str]] = {}
    heads: dict[str, HeadMeta] = {}
    clip_length: int = Field(default=8, ge=1, le=10_000)
    clip_size: int = Field(default=112, ge=1, le=10_000)
    resize: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    extra: dict[str, Any] = {}

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> StudentMeta:
        """Make the metadata from a flat mapping; keys that are not fields are put under `extra`."""
        values = {key: value for key, value in content.items() if key in cls.model_fields}
        extra = {key: value for key, value in content.items() if key not in cls.model_fields}
        return cls.model_validate({**values, "extra": {**values.get("extra", {}), **extra}})

    def completed(self, channels: int) -> StudentMeta:
        """Return a copy with the default normalisation of RGB or optical flow where it has none.

        Raises:
            ValueError: `mean` or `std` does not have one number per channel.
        """
        mean, std = NORMALIZATION[channels]
        mean, std = self.mean or mean, self.std or std
        if not len(mean) == len(std) == channels:
            raise ValueError(
                f"mean has {len(mean)} and std {len(std)} numbers, expected {channels}, one per channel"
            )
        return self.model_copy(update={"mean": mean, "std": std})


ExportForm = Literal["onnx", "torch-export", "torchscript", "hub"]
ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt"}


class GraphConfig(Options):
    """All options of `distinit export`."""

    model: Annotated[str, CliOption("MODEL")] = Field(
        description="a run folder or a safetensors file of train-student or finetune"
    )
    to: Annotated[ExportForm, CliOption(group="Output")] = Field(description="what to write")
    out: Annotated[str, CliOption(group="Output", metavar="PATH")] = Field(
        description="the file to write (.onnx, .pt2, .pt), or the folder of hub"
    )
    tolerance: float = Field(
        default=1e-3,
        gt=0,
        description="largest accepted difference from the student's outputs, in units of the largest "
        "output",
    )
    factory: str | None = Field(
        default=None, description="package.module:factory whose code the model may run"
    )
