"""Initialisations of a student: all values of `--init`.

scratch: fresh weights.
RUN or FILE.safetensors: a student of distinit (DistInit), or one in torchvision's names.
hf://ORG/NAME, hf://ORG/NAME@REVISION: a student of distinit in a repository of the hub.
inflate:resnet18, inflate:resnet34: torchvision's ImageNet ResNet, inflated; see `inflate`.
inflate:FILE: any 2D ResNet of these depths, such as Places365's resnet18_places365.pth.tar.
kinetics, kinetics:FILE: torchvision's Kinetics-400 weights, downloaded or from a file.
hf:FOLDER: a video encoder of transformers, from config.json and safetensors files.
package.module:factory: a function that returns a module or a state dict in torchvision's names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models import get_model_weights

from ..common.errors import CheckpointError, UsageError, WeightsError
from ..common.plugins import call_factory, is_factory
from ..common.weights import library_weights, load_weights
from .inflate import fitting_student, inflatable, inflate
from .student import Backbone, Student
from .student_files import (
    InitReport,
    check_options,
    load_backbone,
    read_options,
    recognise,
    take_backbone,
)
from .student_hub import hub_model
from .student_options import SCRATCH, Inflation, StudentOptions
from .transformers_video import read_folder, read_weights

INFLATABLE = ("resnet18", "resnet34")
# Kinds whose `KIND:` is followed by a path.
_WITH_PATH = ("inflate", "kinetics", "hf")


@dataclass(frozen=True)
class Initialization:
    """An initialisation, and the student that it fits.

    Args:
        options: Options of the student.
        fill: Loads the weights into a student of these options.
    """

    options: StudentOptions
    fill: Callable[[Student], InitReport]


def is_hub_init(init: str) -> bool:
    """Return whether `init` names a repository of the hub; `hf:/FOLDER` is a local folder."""
    return init.startswith("hf://")


def canonical_init(init: str) -> str:
    """Return the initialisation with an absolute path, which is valid in any working directory."""
    kind, colon, source = init.partition(":")
    if init in (SCRATCH, "kinetics") or (kind == "inflate" and source in INFLATABLE):
        return init
    if is_hub_init(init):
        return init
    if colon and kind in _WITH_PATH:
        return f"{kind}:{os.path.abspath(source)}"
    return init if _is_factory(init) else os.path.abspath(init)


def student_file(init: str) -> str | None:
    """Return the path of a student of distinit or of a file in torchvision's names.

    Return None for other initialisations. A file of the hub is downloaded unless it is in the
    cache.
    """
    if is_hub_init(init):
        return str(hub_model(init))
    kind = init.partition(":")[0]
    return (
        None if init in (SCRATCH, "kinetics") or kind in _WITH_PATH or _is_factory(init) else init
    )


def resolve_init(
    init: str, wanted: StudentOptions | None, inflation: Inflation = "scaled"
) -> Initialization:
    """Resolve `init`, and check that it fits the options that `wanted` sets explicitly.

    Args:
        init: One of the forms above.
        wanted: Options of the requested student; None takes those of the initialisation.
        inflation: How `inflate:` repeats kernels over time.

    Raises:
        CheckpointError: The initialisation is damaged, or does not fit; the error names the
            variant, depth, width or channels that differ, and the options that fit.
        WeightsError: The weights do not exist, cannot be downloaded, or would need an unrestricted
            unpickle.
        UsageError: The form does not exist, or a factory cannot be imported or fails.
    """
    kind, colon, source = init.partition(":")
    if init == SCRATCH:
        return Initialization(
            wanted or StudentOptions(), lambda student: InitReport(SCRATCH, (), ())
        )
    if is_hub_init(init):
        return _from_student(str(hub_model(init)), init, wanted)
    if kind == "inflate":
        if not source:
            raise UsageError(
                f"--init {init}: expected inflate:resnet18, inflate:resnet34 or inflate:FILE"
            )
        return _from_image_model(init, source, wanted, inflation)
    if kind == "kinetics" and (colon == "" or source):
        return _from_kinetics(init, source, wanted)
    if kind == "hf" and source:
        return _from_transformers(init, source, wanted)
    if _is_factory(init):
        state = _call_factory(init)
        return _from_video_state(state, f"--init {init}", wanted)
    if not os.path.exists(init):
        raise CheckpointError(
            f"--init {init}: no such file or run folder; it may also be scratch, inflate:resnet18, inflate:FILE, "
            "kinetics, kinetics:FILE, hf:FOLDER, hf://ORG/NAME or package.module:factory"
        )
    return _from_student(init, init, wanted)


def _from_student(file: str, init: str, wanted: StudentOptions | None) -> Initialization:
    """Return the initialisation from the student in `file`, which messages call `init`."""
    factory = wanted.architecture if wanted is not None else None
    options = _with_wanted(read_options(file, factory=factory), wanted, init)
    label = None if file == init else init
    return Initialization(options, lambda student: load_backbone(student, file, label))


def _from_image_model(
    init: str, source: str, wanted: StudentOptions | None, inflation: Inflation
) -> Initialization:
    if source in INFLATABLE and not os.path.isfile(source):
        # An initialisation that does not fit is refused before the download.
        fitting_student(int(source.removeprefix("resnet")), wanted, f"--init {init}")
        choice = get_model_weights(source)["IMAGENET1K_V1"]
        state = library_weights(
            choice, prefix=f"--init {init}", remedy="take --init inflate:FILE"
        ).state
    elif not os.path.exists(source):
        names = " or ".join(f"inflate:{name}" for name in INFLATABLE)
        raise WeightsError(f"--init {init}: no such file; without one it is {names}")
    else:
        state = load_weights(source).state
    options = inflatable(state, wanted, f"--init {init}")

    def fill(student: Student) -> InitReport:
        inflated, origin = inflate(state, cast(Backbone, student.backbone), inflation)
        return take_backbone(student, inflated, init, origin)

    return Initialization(options, fill)


def _from_kinetics(init: str, file: str, wanted: StudentOptions | None) -> Initialization:
    if file:
        return _from_video_state(load_weights(file).state, f"--init {init}", wanted)
    architecture = (wanted or StudentOptions()).architecture
    try:
        choice = get_model_weights(architecture)["KINETICS400_V1"]
    except ValueError:
        raise CheckpointError(
            f"--init kinetics: torchvision has no Kinetics weights of {architecture}; what fits: --student "
            "r2plus1d_18, r3d_18 or mc3_18"
        ) from None
    # The weights exist only with default options. Others are refused before the download.
    available = StudentOptions(architecture=architecture)
    check_options(_with_wanted(available, wanted, "--init kinetics"), available, "--init kinetics")
    state = library_weights(
        choice, prefix="--init kinetics", remedy="take --init kinetics:FILE"
    ).state
    return _from_video_state(state, "--init kinetics", wanted)


def _from_transformers(init: str, folder: str, wanted: StudentOptions | None) -> Initialization:
    stored = read_folder(folder)
    options = _with_wanted(stored, wanted, f"--init {init}")
    check_options(options, stored, f"--init {init}")

    def fill(student: Student) -> InitReport:
        return take_backbone(student, read_weights(folder, options, student.clip), init)

    return Initialization(options, fill)


def _from_video_state(
    state: Mapping[str, Tensor], label: str, wanted: StudentOptions | None
) -> Initialization:
    stored = recognise(state, label)
    options = _with_wanted(stored, wanted, label)
    check_options(options, stored, label)
    return Initialization(
        options, lambda student: take_backbone(student, state, label.removeprefix("--init "))
    )


def _with_wanted(
    stored: StudentOptions, wanted: StudentOptions | None, label: str
) -> StudentOptions:
    """Return the stored options, overlaid with those that `wanted` sets explicitly."""
    if wanted is None:
        return stored
    requested = wanted.model_dump(include=wanted.model_fields_set)
    if requested.get("architecture", stored.architecture) != stored.architecture:
        # The stored variant may not exist for the requested architecture.
        requested.setdefault("variant", wanted.variant)
    try:
        return StudentOptions.model_validate({**stored.model_dump(), **requested})
    # Stored and requested options are valid alone, but not together.
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{label}: {problem}; what fits: {stored.describe()}") from None


def _is_factory(init: str) -> bool:
    return is_factory(init) and init.partition(":")[0] not in _WITH_PATH


def _call_factory(init: str) -> Mapping[str, Tensor]:
    """Return the state dict of `package.module:factory`, called without arguments."""
    result = call_factory(init, f"--init {init}")
    state = result.state_dict() if isinstance(result, nn.Module) else result
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UsageError(
            f"--init {init}: returned a {type(result).__name__}; expected a module or a dict of tensors"
        )
    return state
