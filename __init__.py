"""DistInit: video backbones from unlabelled video.

Frozen image models (teachers) run once over frames of unlabelled videos, and their outputs are
cached (targets). A video model (student) learns to predict the targets from whole clips. It is then
the initialisation for training on a small labelled data set.

The names below are the public Python API. They are loaded on first use, so that `import distinit`
and `distinit --help` do not import torch. Every stage is also a function:
`distinit.extract_targets("clips/", out="targets.zarr", teacher="resnet50")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distinit.stages import STAGES as _STAGES

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from collections.abc import Callable

    from distinit.pipeline.clips.transforms import normalize_clip
    from distinit.pipeline.common.errors import DistInitError
    from distinit.pipeline.common.stage_function import Result
    from distinit.pipeline.corpus.sources import list_videos
    from distinit.pipeline.store.reader import TargetStore
    from distinit.pipeline.students.student import build_student
    from distinit.pipeline.students.student_files import load_student
    from distinit.pipeline.students.student_options import StudentOptions
    from distinit.pipeline.targets.dataset import student_clips
    from distinit.pipeline.targets.teacher_targets import mean_outputs, soft_targets
    from distinit.pipeline.teachers.teacher import load_teacher
    from distinit.pipeline.teachers.teacher_options import TeacherSpec
    from distinit.pipeline.training.loader import EpochBatchSampler, collate
    from distinit.pipeline.video.frames import read_frames

    # The keyword arguments of these functions are the options of the commands.
    ablate: Callable[..., Result]
    demo: Callable[..., Result]
    embed: Callable[..., Result]
    evaluate: Callable[..., Result]
    export: Callable[..., Result]
    extract_targets: Callable[..., Result]
    finetune: Callable[..., Result]
    predict: Callable[..., Result]
    prepare: Callable[..., Result]
    report: Callable[..., Result]
    train_student: Callable[..., Result]

__all__ = [
    "DistInitError",
    "EpochBatchSampler",
    "Result",
    "StudentOptions",
    "TargetStore",
    "TeacherSpec",
    "ablate",
    "build_student",
    "collate",
    "demo",
    "embed",
    "evaluate",
    "export",
    "extract_targets",
    "finetune",
    "list_videos",
    "load_student",
    "load_teacher",
    "mean_outputs",
    "normalize_clip",
    "predict",
    "prepare",
    "read_frames",
    "report",
    "soft_targets",
    "student_clips",
    "train_student",
]

# The module of each name. Absolute, since a test runner may import this file under any name.
_MODULES = {
    "Result": "distinit.pipeline.common.stage_function",
    "DistInitError": "distinit.pipeline.common.errors",
    "EpochBatchSampler": "distinit.pipeline.training.loader",
    "StudentOptions": "distinit.pipeline.students.student_options",
    "TargetStore": "distinit.pipeline.store.reader",
    "TeacherSpec": "distinit.pipeline.teachers.teacher_options",
    "build_student": "distinit.pipeline.students.student",
    "collate": "distinit.pipeline.training.loader",
    "list_videos": "distinit.pipeline.corpus.sources",
    "load_student": "distinit.pipeline.students.student_files",
    "load_teacher": "distinit.pipeline.teachers.teacher",
    "mean_outputs": "distinit.pipeline.targets.teacher_targets",
    "normalize_clip": "distinit.pipeline.clips.transforms",
    "read_frames": "distinit.pipeline.video.frames",
    "soft_targets": "distinit.pipeline.targets.teacher_targets",
    "student_clips": "distinit.pipeline.targets.dataset",
}


def __getattr__(name: str) -> Any:
    if (command := name.replace("_", "-")) in _STAGES:
        from distinit.pipeline.common.stage_function import stage_function

        value = stage_function(command, *_STAGES[command])
        globals()[name] = value
        return value
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
