"""Load a teacher again from what a target store records of it, without trusting the store.

A store may come from anybody. By itself, its record only chooses among the teachers that distinit
ships, built with plain values. Code, downloads and other options need a name on the command line;
files are only those given there.
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
    # A name on the Hub; nothing that could be a path out of its cache.
    r"|hf:[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
)
_NUMBER = re.compile(r"-?\d{1,9}(\.\d{1,9})?|true|false", re.ASCII)
_PIXELS = re.compile(r"\d{1,4}(x\d{1,4})?", re.ASCII)
_OPENS_FILES = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Options of timm's builder that lead it to files and addresses."""


def recorded_spec(provenance: Mapping[str, Any], where: str) -> TeacherSpec:
    """Return how the teacher that a store records was asked for.

    Raises:
        UsageError: The store does not say it.
        StoreError: The record is none.
    """
    if "spec" not in provenance:
        raise UsageError(
            "the store does not say how the teacher was asked for, so that it cannot be loaded again"
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
        spec: How the teacher was asked for, as the store records it.
        weights: The weights file given on the command line; a file that only the store names is
            never opened.
        trusted: Teachers named on the command line, as the store spells them: their code may run,
            their weights may be downloaded, and their options may have any value.

    Raises:
        UsageError: What has to be named on the command line first.
        TeacherError, WeightsError: As `load_teacher`.
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
    # The classes are a file; the store has the names.
    options = {key: value for key, value in spec.options.items() if key != "classes"}
    spec = spec.model_copy(
        update={"weights": weights, "options": options, "fetch": spec.name in trusted}
    )
    try:
        return load_teacher(spec)
    except DistInitError:
        raise
    # A library meets numbers that it never checks, and has errors of its own.
    except Exception as error:
        raise TeacherError(
            f"teacher {spec.name!r}: cannot be built as the store records it ({in_one_line(error)})"
        ) from error


def _check_plain(spec: TeacherSpec) -> None:
    """Raise UsageError if loading would run third-party code or open a file that a store chose."""
    allow = f"if you trust it, allow it with --allow-teacher {spec.name!r}"
    if spec.name not in SHIPPED and not _LIBRARY_MODEL.fullmatch(spec.name):
        what = (
            "is a function whose code would be run"
            if is_factory(spec.name)
            else "does not ship with distinit"
        )
        raise UsageError(f"teacher {spec.name!r} {what}; {allow}")
    for key, text in spec.options.items():
        if key in ("input_size", "resize"):
            plain = _PIXELS.fullmatch(text) is not None
        elif key == "pooling":
            plain = text in POOLINGS
        else:
            plain = key in OWN_OPTIONS or _NUMBER.fullmatch(text) is not None
        if not plain:
            raise UsageError(
                f"teacher {spec.name!r}: the store sets its option {key!r} to {text[:80]!r}; {allow}"
            )
