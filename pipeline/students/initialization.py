"""Initialisations of a student: all forms of one option.

scratch: fresh weights.
RUN or FILE.safetensors: a student of distinit (DistInit), or one in torchvision's names.
hf://ORG/NAME, hf://ORG/NAME@REVISION: a student of distinit in a repository of the hub.
inflate:resnet18, inflate:resnet34: torchvision's ImageNet ResNet, inflated; see `inflate`.
inflate:FILE: any 2D ResNet of that depth, such as Places365's resnet18_places365.pth.tar.
kinetics, kinetics:FILE: torchvision's Kinetics-400 weights of the student, fetched or from a file.
hf:FOLDER: a video encoder of transformers, its config.json and safetensors.
package.module:factory: what a function returns, a module or a state dict in torchvision's names.
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
    """An initialisation that fits.

    Args:
        options: of the student that it makes.
        fill: loads the weights into that student.
    """

    options: StudentOptions
    fill: Callable[[Student], InitReport]


def is_hub_init(init: str) -> bool:
    """Return whether `init` is a repository of the hub; `hf:/FOLDER` is a local folder."""
    return init.startswith("hf://")


def canonical_init(init: str) -> str:
    """Return the initialisation under a name that holds from any folder."""
    kind, colon, where = init.partition(":")
    if init in (SCRATCH, "kinetics") or (kind == "inflate" and where in INFLATABLE):
        return init
    if is_hub_init(init):
        return init
    if colon and kind in _WITH_PATH:
        return f"{kind}:{os.path.abspath(where)}"
    return init if _is_factory(init) else os.path.abspath(init)


def student_file(init: str) -> str | None:
    """Return the path if `init` is a student of distinit or a file in torchvision's names.

    Return None otherwise. A file of the hub is downloaded if it is not in the cache.
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
    """Find what `init` names, and compare it with what `wanted` sets expressly.

    Args:
        init: see the forms above.
        wanted: the student that was asked for; None takes the initialisation's.
        inflation: how `inflate:` repeats kernels over time.

    Raises:
        CheckpointError: it does not fit (variant, depth, width or channels, by name, with what
            would), or is damaged.
        WeightsError: weights that do not exist, cannot be fetched, or would need a free unpickle.
        UsageError: a form that does not exist; a factory that cannot be imported or fails.
    """
    kind, colon, where = init.partition(":")
    if init == SCRATCH:
        return Initialization(
            wanted or StudentOptions(), lambda student: InitReport(SCRATCH, (), ())
        )
    if is_hub_init(init):
        return _of_student(str(hub_model(init)), init, wanted)
    if kind == "inflate":
        if not where:
            raise UsageError(
                f"--init {init}: expected inflate:resnet18, inflate:resnet34 or inflate:FILE"
            )
        return _inflated(init, where, wanted, inflation)
    if kind == "kinetics" and (colon == "" or where):
        return _kinetics(init, where, wanted)
    if kind == "hf" and where:
        return _of_transformers(init, where, wanted)
    if _is_factory(init):
        state = _from_factory(init)
        return _in_video_names(state, f"--init {init}", wanted)
    if not os.path.exists(init):
        raise CheckpointError(
            f"--init {init}: no such file or run folder; it may also be scratch, inflate:resnet18, inflate:FILE, "
            "kinetics, kinetics:FILE, hf:FOLDER, hf://ORG/NAME or package.module:factory"
        )
    return _of_student(init, init, wanted)


def _of_student(file: str, init: str, wanted: StudentOptions | None) -> Initialization:
    """Return the student of a file or run folder, under the name that was given."""
    named = wanted.architecture if wanted is not None else None
    options = _with_wanted(read_options(file, factory=named), wanted, init)
    label = None if file == init else init
    return Initialization(options, lambda student: load_backbone(student, file, label))


def _inflated(
    init: str, where: str, wanted: StudentOptions | None, inflation: Inflation
) -> Initialization:
    if where in INFLATABLE and not os.path.isfile(where):
        # Before anything is fetched.
        fitting_student(int(where.removeprefix("resnet")), wanted, f"--init {init}")
        choice = get_model_weights(where)["IMAGENET1K_V1"]
        state = library_weights(
            choice, prefix=f"--init {init}", remedy="take --init inflate:FILE"
        ).state
    elif not os.path.exists(where):
        names = " or ".join(f"inflate:{name}" for name in INFLATABLE)
        raise WeightsError(f"--init {init}: no such file; without one it is {names}")
    else:
        state = load_weights(where).state
    options = inflatable(state, wanted, f"--init {init}")

    def fill(student: Student) -> InitReport:
        inflated, origin = inflate(state, cast(Backbone, student.backbone), inflation)
        return take_backbone(student, inflated, init, origin)

    return Initialization(options, fill)


def _kinetics(init: str, where: str, wanted: StudentOptions | None) -> Initialization:
    if where:
        return _in_video_names(load_weights(where).state, f"--init {init}", wanted)
    architecture = (wanted or StudentOptions()).architecture
    try:
        choice = get_model_weights(architecture)["KINETICS400_V1"]
    except ValueError:
        raise CheckpointError(
            f"--init kinetics: torchvision has no Kinetics weights of {architecture}; what fits: --student "
            "r2plus1d_18, r3d_18 or mc3_18"
        ) from None
    # Before anything is fetched: they exist in one form.
    exist = StudentOptions(architecture=architecture)
    check_options(_with_wanted(exist, wanted, "--init kinetics"), exist, "--init kinetics")
    state = library_weights(
        choice, prefix="--init kinetics", remedy="take --init kinetics:FILE"
    ).state
    return _in_video_names(state, "--init kinetics", wanted)


def _of_transformers(init: str, folder: str, wanted: StudentOptions | None) -> Initialization:
    found = read_folder(folder)
    options = _with_wanted(found, wanted, f"--init {init}")
    check_options(options, found, f"--init {init}")

    def fill(student: Student) -> InitReport:
        return take_backbone(student, read_weights(folder, options, student.clip), init)

    return Initialization(options, fill)


def _in_video_names(
    state: Mapping[str, Tensor], label: str, wanted: StudentOptions | None
) -> Initialization:
    found = recognise(state, label)
    options = _with_wanted(found, wanted, label)
    check_options(options, found, label)
    return Initialization(
        options, lambda student: take_backbone(student, state, label.removeprefix("--init "))
    )


def _with_wanted(
    found: StudentOptions, wanted: StudentOptions | None, label: str
) -> StudentOptions:
    """Return what was found, overlaid with what was asked for expressly.

    The two are compared before anything is loaded.
    """
    if wanted is None:
        return found
    asked = wanted.model_dump(include=wanted.model_fields_set)
    if asked.get("architecture", found.architecture) != found.architecture:
        # Not the file's variant, which may be no rule of this architecture.
        asked.setdefault("variant", wanted.variant)
    try:
        return StudentOptions.model_validate({**found.model_dump(), **asked})
    except ValidationError as error:  # each is possible, the two together are not
        words = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{label}: {words}; what fits: {found.describe()}") from None


def _is_factory(init: str) -> bool:
    return is_factory(init) and init.partition(":")[0] not in _WITH_PATH


def _from_factory(init: str) -> Mapping[str, Tensor]:
    """Return the state that `package.module:factory` gives, called without arguments."""
    made = call_factory(init, f"--init {init}")
    state = made.state_dict() if isinstance(made, nn.Module) else made
    if not isinstance(state, Mapping) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UsageError(
            f"--init {init}: returned a {type(made).__name__}; expected a module or a dict of tensors"
        )
    return state
