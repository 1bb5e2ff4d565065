"""Options of `distinit finetune`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..clips.clip_options import ClipView
from ..common.settings import CliOption, Options
from ..students.student_options import SCRATCH, Inflation, StudentOptions
from ..training.loop_options import RESUME, RESUME_HELP, Budget, LoopOptions, Resume
from .evaluation_options import COPIES_HELP, PARTIAL_HELP, EvaluationOptions


class FinetuneClips(ClipView):
    """Clips for training and test."""

    clip_frames: Annotated[int, CliOption("--frames", "Sampling", "T")] = Field(
        default=8, ge=1, description="frames per clip"
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> FinetuneClips:
        # By default the size is that of the initialisation, which is read later.
        if "size" in self.model_fields_set:
            self.frame_view()
        return self


class FinetuneLoop(LoopOptions):
    """The paper's finetuning (section 4).

    It has 8 epochs of 40 000 clips and a learning rate of 0.002, divided by 10 every 2 epochs. From
    scratch the paper uses 45 epochs and a learning rate of 0.01, divided by 10 every 10 epochs, as
    preset `scratch` does.
    """

    ADAMW_DEFAULTS: ClassVar[dict[str, float]] = {"lr": 0.0003, "weight_decay": 0.05}
    # The paper's 320 000 clips are 90 per video of HMDB-51, in 8 epochs with a drop every 2.
    BUDGET: ClassVar[Budget] = Budget(90, 3_000, 320_000, 8, 0, 2)

    epochs: Annotated[int, CliOption(group="Training", metavar="N")] = Field(
        default=8, ge=1, description="epochs, counted in clips"
    )
    epoch_clips: Annotated[int | None, CliOption(group="Training", metavar="N")] = Field(
        default=40_000, ge=1, description="clips per epoch; null: one per video"
    )
    lr: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=0.002, gt=0, description="learning rate after the warm-up; with adamw 0.0003"
    )
    weight_decay: Annotated[float, CliOption(group="Training", metavar="X")] = Field(
        default=5e-3,
        ge=0,
        description="weight decay; with adamw 0.05, and none on norms and biases",
    )
    step_epochs: Annotated[int | None, CliOption(group="Training", metavar="N")] = Field(
        default=2, ge=1, description="epochs between drops of the learning rate; null: no drops"
    )


def parse_search(texts: tuple[str, ...]) -> dict[str, list[Any]]:
    """Parse texts `KEY=VALUE,VALUE` with YAML values. Raises ValueError."""
    # Imported here since it loads YAML, which `--help` does not need.
    from ..common.config import parse_setting

    choices: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (key and equals and values):
            raise ValueError(f"expected KEY=VALUE,VALUE, as in lr=0.02,0.06, got {text!r}")
        if key in choices:
            raise ValueError(f"{key!r} is given twice")
        choices[key] = [parse_setting(f"{key}={value}")[1] for value in values.split(",")]
    return choices


class FinetuneConfig(Options):
    """All options of `distinit finetune`.

    The defaults of `student` and of the frames and size of clips are those of the initialisation.
    A student that differs from its file is refused.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset(
        {"held_out", "val_clips", "patience", "export", "search", "strict", "dry_run"}
    )

    init: Annotated[str, CliOption(metavar="INIT")] = Field(
        default=SCRATCH,
        description="scratch, a student's run folder or .safetensors, hf://ORG/NAME, inflate:resnet18, inflate:FILE "
        "(a 2D ResNet), kinetics, kinetics:FILE, hf:FOLDER (a video encoder of transformers), or "
        "package.module:factory",
    )
    inflation: Annotated[Inflation, CliOption(group="Student")] = Field(
        default="scaled",
        description="how inflate: repeats kernels over time; scaled divides them by their length",
    )
    dataset: Annotated[str, CliOption(metavar="NAME")] = Field(
        description="csv:FILE with columns path, label and splitN (train, val or test); "
        "folder:DIR with train/CLASS, test/CLASS and optionally val/CLASS; kinetics:FILE; hmdb51; ucf101"
    )
    root: Annotated[str | None, CliOption(metavar="DIR")] = Field(
        default=None, description="folder of the videos of hmdb51, ucf101, kinetics: or csv:"
    )
    split: Annotated[int | Literal["all"] | None, CliOption(metavar="N|all", shown="1")] = Field(
        default=None, description="which split; all: a run per split, and the mean"
    )
    partial: Annotated[bool, CliOption()] = Field(default=False, description=PARTIAL_HELP)
    strict: Annotated[bool, CliOption()] = Field(
        default=False,
        description="refuse test videos, or recordings of them, that the run or its initialisation trains on",
    )
    copies: Annotated[str | None, CliOption(metavar="DIR")] = Field(
        default=None, description=COPIES_HELP
    )
    held_out: Annotated[float, CliOption(metavar="Q")] = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the train videos to validate with, whole recordings (column source)",
    )
    out: Annotated[str, CliOption(group="Output", metavar="RUN")] = Field(
        description="the run folder to write"
    )
    student: Annotated[StudentOptions | None, CliOption(shown="the initialisation's")] = Field(
        default=None, description="network, by default that of the initialisation"
    )
    dropout: Annotated[float, CliOption(group="Student", metavar="P")] = Field(
        default=0.0, ge=0, lt=1, description="dropout of the features before the new head"
    )
    freeze: Annotated[Literal["none", "backbone"], CliOption(group="Student")] = Field(
        default="none", description="backbone: train only the head"
    )
    val_clips: int = Field(default=3, ge=1, description="clips per validation video")
    patience: Annotated[int | None, CliOption(group="Training", metavar="N", shown="none")] = Field(
        default=None,
        ge=1,
        description="stop after N epochs without a lower validation loss",
    )
    search: Annotated[
        dict[str, list[Any]], CliOption("--search", "Training", "KEY=V,V", parse=parse_search)
    ] = Field(
        default={},
        description="choose among values of an option by the validation loss, as in lr=0.02,0.06, then "
        "train on train and validation videos; repeatable: all combinations",
    )
    export: Annotated[
        Literal["last", "best"] | None,
        CliOption(group="Output", shown="best with validation videos, else last"),
    ] = Field(default=None, description="checkpoint that is exported and tested")
    verbose: Annotated[bool, CliOption(group="Output")] = Field(
        default=False, description="print the origin of every tensor"
    )
    clips: Annotated[FinetuneClips, CliOption(shown="the initialisation's")] = Field(
        default_factory=FinetuneClips
    )
    loop: Annotated[FinetuneLoop, CliOption()] = Field(default_factory=FinetuneLoop)
    test: Annotated[EvaluationOptions, CliOption()] = Field(default_factory=EvaluationOptions)
    resume: Annotated[Resume, RESUME] = Field(default=False, description=RESUME_HELP)
    dry_run: Annotated[bool, CliOption(group="Output")] = Field(
        default=False,
        description="show config, sizes and the first batch as a picture; train nothing",
    )
