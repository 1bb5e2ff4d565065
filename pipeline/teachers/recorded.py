"""Load a teacher from the record of a target store, without trusting the store.

A store may come from anybody. Its record alone can only select a teacher that ships with distinit,
with plain values of its options. Third-party code, downloads and other options require the name of
the teacher on the command line. Files are opened only if the command line names them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from ..common.errors import DistInitError, StoreError, TeacherError, UsageError, in_one_line
from ..common.plugins import is_factory
from .hf_models import POOLINGS
from .loaded_model import OWN_OPTIONS
from .teacher import SHIPPED, Teacher, load_teacher
from .teacher_options import TeacherSpec

_LIBRARY_MODEL = re.compile(
    r"(torchvision|timm):[A-Za-z0-9_.]+(@[A-Za-z0-9_]+)?"
    r"|open_clip:[A-Za-z0-9_.-]+(@[A-Za-z0-9_.-]+)?"
    # A name on the Hub, which cannot be a path out of its cache.
    r"|hf:[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
)
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,9})?|true|false", re.ASCII)
_PIXELS = re.compile(r"\d{1,4}(x\d{1,4})?", re.ASCII)
_OPENS_FILES = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Options of timm's builder that name files or addresses."""


def recorded_spec(provenance: Mapping[str, Any], where: str) -> TeacherSpec:
    """Return the spec of a teacher that a store records.

    Args:
        provenance: The attribute `provenance` of the teacher's node.
        where: The path of the node, for messages.

    Raises:
        UsageError: The store has no spec of the teacher.
        StoreError: The record is not a spec.
    """
    if "spec" not in provenance:
        raise UsageError(
            "the store does not record the options of the teacher, so that it cannot be loaded again"
        )
    try:
        return TeacherSpec.model_validate(provenance["spec"])
    except ValidationError as error:
        raise StoreError(
            f"{where}: provenance.spec is no record of a teacher ({in_one_line(error)})"
        ) from None


def load_spec(
    spec: TeacherSpec, *, weights: str | None = None, trusted: Collection[str] = ()
) -> Teacher:
    """Return the teacher of a `recorded_spec`, on the CPU.

    Args:
        spec: The recorded spec.
        weights: The weights file of the command line; a file that only the store names is never
            opened.
        trusted: Teachers that the command line names, spelled as in the store. Their code may run,
            their weights may be downloaded, and their options may have any value.

    Raises:
        UsageError: The teacher or its weights file must be named on the command line first.
        TeacherError: See `load_teacher`.
        WeightsError: See `load_teacher`.
    """
    if spec.name not in trusted:
        _check_plain(spec)
    for key in _OPENS_FILES if spec.name.startswith("timm:") else ():
        if key in spec.options:
            raise UsageError(
                f"teacher {spec.name!r}: the store sets its option {key!r}, which opens files"
            )
    if spec.weights is not None and weights is None:
        raise UsageError(
            f"the store names the weights file {spec.weights!r}, which is never opened by that name: "
            "pass --teacher-weights NAME=FILE"
        )
    # The option `classes` names a file; the store has the class names.
    options = {key: value for key, value in spec.options.items() if key != "classes"}
    spec = spec.model_copy(
        update={"weights": weights, "options": options, "fetch": spec.name in trusted}
    )
    try:
        return load_teacher(spec)
    except DistInitError:
        raise
    # Libraries do not check all numbers, and raise errors of any type.
    except Exception as error:
        raise TeacherError(
            f"teacher {spec.name!r}: cannot be built as the store records it ({in_one_line(error)})"
        ) from error


def _check_plain(spec: TeacherSpec) -> None:
    """Raise UsageError if loading would run third-party code or open a file that a store chose."""
    advice = f"if you trust it, allow it with --allow-teacher {spec.name!r}"
    if spec.name not in SHIPPED and not _LIBRARY_MODEL.fullmatch(spec.name):
        reason = (
            "is a function whose code would be run"
            if is_factory(spec.name)
            else "does not ship with distinit"
        )
        raise UsageError(f"teacher {spec.name!r} {reason}; {advice}")
    for key, text in spec.options.items():
        if key in ("input_size", "resize"):
            is_plain = _PIXELS.fullmatch(text) is not None
        elif key == "pooling":
            is_plain = text in POOLINGS
        else:
            is_plain = key in OWN_OPTIONS or _NUMBER.fullmatch(text) is not None
        if not is_plain:
            raise UsageError(
                f"teacher {spec.name!r}: the store sets its option {key!r} to {text[:80]!r}; {advice}"
            )
