"""Students as files: safetensors in torchvision's parameter names, everything else in its metadata.

One linear head is written as torchvision's `fc.weight` and `fc.bias` (unless the backbone has an
`fc` of its own), several as `heads.<name>.weight` and `.bias`, so that a student of one head and
the torchvision variant loads strictly into torchvision's own model. An MLP head is written as
`heads.<name>.hidden.*` and `.output.*`. A head that learned features at a scale of their own is
written with that scale and mean in its last layer, so that it gives the teacher's.

The metadata's `distinit` entry is one JSON object, the options and heads next to the `StudentMeta`;
`format_version` is 1. Its `distinit-sha256` entry is a digest of the whole file, see `sealed`;
files of version 0.1 have none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from ..common.documents import is_regular_file
from ..common.errors import CheckpointError
from ..common.files import write_whole
from ..common.run_dir import MODEL_FILE, STUDENT_FILE
from ..common.sealed import BLANK, KEY, open_checked, seal
from ..common.settings import Options
from .external import library_shapes
from .student import Backbone, Student, build_student
from .student_hub import hub_model, is_hub_address
from .student_options import BUILTIN_ARCHITECTURES, STEM, HeadKind, StudentMeta, StudentOptions

FORMAT_VERSION = 1


@dataclass(frozen=True)
class InitReport:
    """Which tensors an initialisation loaded, and which of the file it ignored.

    Args:
        path: where they are from.
        loaded: names in the backbone.
        left: in the file, but not part of a backbone: its heads.
        lines: one per tensor: what was loaded from what, what was left.
    """

    path: str
    loaded: tuple[str, ...]
    left: tuple[str, ...]
    lines: tuple[str, ...] = ()


class _Header(Options):
    format_version: int
    options: StudentOptions
    heads: dict[str, int]
    # Of the heads that are not linear; left out where all are, as version 0.1 wrote it.
    head_kinds: dict[str, HeadKind] = {}
    meta: StudentMeta


def save_start(path: str | Path, student: Student) -> None:
    """Write the first convolution as it is now, atomically, under its name.

    Raises:
        CheckpointError: the file cannot be written.
    """
    stem = student.backbone.state_dict()[STEM].detach().cpu().contiguous()
    _write(Path(path), {STEM: stem}, {"format": "pt"})


def save_student(
    path: str | Path,
    student: Student,
    meta: StudentMeta | Mapping[str, Any],
    scales: Mapping[str, tuple[Tensor, float]] | None = None,
) -> None:
    """Write a student as one safetensors file, atomically.

    Args:
        path: the file, which is old or new afterwards, never half.
        student: its weights, options and heads.
        meta: what a user must know; keys of a flat mapping that `StudentMeta` does not have are put
            under its `extra`.
        scales: head → mean [K] and scale of what it learned as (x − mean) / scale; the head of the
            file gives x.

    Raises:
        CheckpointError: class names that do not fit the heads, or a file that cannot be written.

    Example:
        >>> save_student("student.safetensors", student, {"clip_length": 8, "clip_size": 112})
    """
    path = Path(path)
    try:
        meta = meta if isinstance(meta, StudentMeta) else StudentMeta.of(meta)
        meta = meta.completed(student.options.channels)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: cannot be described: {' '.join(str(error).split())}"
        ) from None
    _check_classes(student.classes, meta, path)
    header = _Header(
        format_version=FORMAT_VERSION,
        options=student.options,
        heads=student.classes,
        head_kinds={name: kind for name, kind in student.head_kinds.items() if kind != "linear"},
        meta=meta,
    )
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in _named_tensors(student, scales or {})
    }
    _write(path, tensors, {"format": "pt", "distinit": _as_json(header)})


def _as_json(header: _Header) -> str:
    """Return the header as ASCII, in which lone surrogates (paths not in UTF-8) are escapes."""
    # What is empty was not written by version 0.1.
    without: dict[str, Any] = {} if header.head_kinds else {"head_kinds": True}
    without |= {} if header.meta.heads else {"meta": {"heads"}}
    return json.dumps(header.model_dump(mode="python", exclude=without))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = io.BytesIO(safetensors.torch.save(tensors, {**metadata, KEY: BLANK}))
    seal(data)
    write_whole(path, data.getbuffer(), CheckpointError)


def load_student(
    path: str | Path, device: torch.device | str = "cpu", *, factory: str | None = None
) -> Student:
    """Load the student of a file or a run folder, in evaluation mode, with its `meta`.

    Args:
        path: a file, or a run folder with `student.safetensors` (from train-student) or
            `model.safetensors` (from finetune), or `hf://ORG/NAME[@REVISION]`, a repository of the
            Hugging Face hub, of which `model.safetensors` is downloaded and nothing is run.
        device: where the student is put.
        factory: a file whose student is made by a `package.module:factory` is loaded only where the
            caller names that very factory here, since its code is run.

    Raises:
        CheckpointError: no such file, not a student of this package, a newer format, damaged.

    Example:
        >>> student = load_student("runs/ours")
        >>> student(torch.zeros(1, 3, 8, 112, 112))["label"].shape
    """
    path = _file_of(path)
    state, header = _read(path)
    if header is None:
        raise CheckpointError(
            f"{path}: has no 'distinit' metadata, so it is not a student written by distinit; "
            "load_backbone takes its tensors if they fit"
        )
    _require_named(header.options, factory, path)
    _check_sizes(header, state, path)
    student = build_student(
        header.options,
        header.heads,
        clip=(header.meta.clip_length, header.meta.clip_size),
        head_kinds=header.head_kinds,
    )
    _fill(student, state, path)
    student.meta = header.meta
    return student.eval().to(device)


def load_backbone(student: Student, path: str | Path, label: str | None = None) -> InitReport:
    """Initialise a student's backbone from an exported student; its heads stay as they are.

    Takes a run folder or a safetensors file, also one in torchvision's names without metadata,
    whose kind is then told by its shapes.

    Args:
        student: takes the tensors.
        path: the folder or file.
        label: where it is from, in messages; by default the file.

    Raises:
        CheckpointError: another architecture, variant, width or number of channels (named, with the
            options that fit), a damaged file, or values that are not finite.
    """
    path = _file_of(path)
    label = str(path) if label is None else label
    state, header = _read(path)
    found = header.options if header else recognise(state, label)
    check_options(student.options, found, label)
    return take_backbone(student, state, label)


def take_backbone(
    student: Student,
    state: Mapping[str, Tensor],
    label: str,
    origin: Mapping[str, str] | None = None,
) -> InitReport:
    """Load a state in a student's own names into its backbone; the rest of the state is ignored.

    Args:
        student: takes the tensors.
        state: name → tensor.
        label: where the state is from, for messages.
        origin: name → what it was made of, for the report.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or not finite.
    """
    own = student.backbone.state_dict()
    taken = {name: state[name] for name in own if name in state}
    # BatchNorm's batch counters are of no use here, and older files lack them.
    missing = [
        name for name in own if name not in taken and not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise CheckpointError(
            f"{label}: damaged: {len(missing)} tensors missing, first {missing[0]}"
        )
    for name, tensor in taken.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{label}: damaged: {name} is {list(tensor.shape)}, expected {list(own[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{label}: {name} holds values that are not finite")
    student.backbone.load_state_dict(taken, strict=False)
    left = tuple(name for name in state if name not in taken)
    made_of = origin or {}
    lines = [
        f"{name} {list(tensor.shape)} from {made_of.get(name, name)}"
        for name, tensor in taken.items()
    ]
    lines += [f"left: {name} {list(state[name].shape)}" for name in left]
    return InitReport(label, tuple(taken), left, tuple(lines))


def read_options(path: str | Path, *, factory: str | None = None) -> StudentOptions:
    """Return the options that the student of a file or run folder was built with.

    Args:
        path: the file or run folder.
        factory: see `load_student`.

    Raises:
        CheckpointError: as `load_backbone`.
    """
    path = _file_of(path)
    state, header = _read(path)
    found = header.options if header else recognise(state, path)
    _require_named(found, factory, path)
    return found


def read_meta(path: str | Path) -> StudentMeta | None:
    """Return the `StudentMeta` of a file or run folder; None for one that distinit did not write.

    Raises:
        CheckpointError: no such file, damaged, of a newer format.
    """
    _, header = _read(_file_of(path))
    return header.meta if header is not None else None


def _require_named(options: StudentOptions, factory: str | None, path: Path) -> None:
    if options.is_factory and options.architecture != factory:
        raise CheckpointError(
            f"{path}: its student is made by {options.architecture}, whose code would be run; name it to allow that: "
            f"--student {options.architecture} (of evaluate and predict --set factory={options.architecture}, of "
            f"load_student factory={options.architecture!r})"
        )


def _check_sizes(header: _Header, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a header whose student is larger than the tensors, before it takes any memory."""
    for name, classes in header.heads.items():
        last = "output.weight" if header.head_kinds.get(name) == "mlp" else "weight"
        weight = state.get(
            f"heads.{name}.{last}", state.get("fc.weight") if len(header.heads) == 1 else None
        )
        if weight is None or weight.ndim != 2 or len(weight) != classes:
            found = "none" if weight is None else list(weight.shape)
            raise CheckpointError(
                f"{path}: damaged: head {name!r} has {classes} classes, its tensor is {found}"
            )
    shapes: Mapping[str, torch.Size] | None
    if header.options.architecture in BUILTIN_ARCHITECTURES:
        with torch.device("meta"):
            own = Backbone(header.options).state_dict()
        shapes = {name: tensor.shape for name, tensor in own.items()}
    else:
        shapes = library_shapes(header.options, (header.meta.clip_length, header.meta.clip_size))
    wrong = [
        name
        for name, shape in (shapes or {}).items()
        if name not in state or state[name].shape != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: damaged: its tensors are not those of {header.options.describe()}, first {wrong[0]}"
        )


def _named_tensors(
    student: Student, scales: Mapping[str, tuple[Tensor, float]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a student under its exported name; `scales` as of `save_student`."""
    yield from student.backbone.state_dict().items()
    for name in student.classes:
        linear = student.head_kinds[name] == "linear"
        alone = linear and len(student.classes) == 1 and not hasattr(student.backbone, "fc")
        prefix = "fc" if alone else f"heads.{name}"
        state = student.head(name).state_dict()
        if name in (scales or {}):
            last = "" if linear else "output."
            mean, scale = (scales or {})[name]
            state[f"{last}weight"] = state[f"{last}weight"] * scale
            state[f"{last}bias"] = state[f"{last}bias"] * scale + mean.to(state[f"{last}bias"])
        yield from ((f"{prefix}.{part}", tensor) for part, tensor in state.items())


def _fill(student: Student, state: dict[str, Tensor], path: Path) -> None:
    own = dict(_named_tensors(student))
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong:
        raise CheckpointError(
            f"{path}: damaged: its tensors are not those of {student.options.describe()}, first {wrong[0]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def _file_of(path: str | Path) -> Path:
    """Return the safetensors file that a path means.

    Raises:
        CheckpointError: there is none, or a run folder holds two.
        SourceError: a link out of a run folder.
    """
    if is_hub_address(path):
        return hub_model(str(path))
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file or run folder")
        return path
    inside = [
        path / name for name in (STUDENT_FILE, MODEL_FILE) if is_regular_file(path / name, path)
    ]
    if not inside:
        raise CheckpointError(
            f"{path}: holds no {' and no '.join((STUDENT_FILE, MODEL_FILE))}; is its run finished?"
        )
    if len(inside) > 1:
        raise CheckpointError(
            f"{path}: holds {' and '.join((STUDENT_FILE, MODEL_FILE))}; name the file"
        )
    return inside[0]


def _read(path: Path) -> tuple[dict[str, Tensor], _Header | None]:
    """Tensors and, where distinit wrote the file, the header."""
    with open_checked(path, "pt") as file:
        metadata = file.metadata() or {}
        state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if "distinit" not in metadata:
        return state, None
    try:
        content = json.loads(metadata["distinit"])
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format version {version}, this distinit reads {FORMAT_VERSION}: update it"
            )
        return state, _Header.model_validate(content)
    except CheckpointError:
        raise
    # The errors of JSON and pydantic are ValueErrors.
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged 'distinit' metadata ({type(error).__name__})"
        ) from None


def check_options(wanted: StudentOptions, found: StudentOptions, label: str) -> None:
    """Compare the options that were asked for with those of a file.

    Args:
        wanted: asked for.
        found: of the file.
        label: names the file.

    Raises:
        CheckpointError: each option that differs, and the options that would fit.
    """
    asked, has = wanted.model_dump(), found.model_dump()
    differing = [
        f"{key} is {has[key]!r} in the file, {asked[key]!r} was asked for"
        for key in asked
        if asked[key] != has[key]
    ]
    if differing:
        fitting = " ".join(f"{key}={value}" for key, value in has.items())
        raise CheckpointError(f"{label}: {'; '.join(differing)}; what fits: {fitting}")


def _check_classes(heads: dict[str, int], meta: StudentMeta, path: Path) -> None:
    for name, classes in meta.classes.items():
        if heads.get(name) != len(classes):
            raise CheckpointError(
                f"{path}: {len(classes)} class names for head {name!r}, which has {heads.get(name, 'no')} classes"
            )


def recognise(state: Mapping[str, Tensor], label: str | Path) -> StudentOptions:
    """Return the options whose backbone has just these shapes.

    Input channels and width are read off the stem, the rest is found by trying.

    Raises:
        CheckpointError: There are none; the message begins with the label.
    """
    unknown = CheckpointError(f"{label}: its tensors are those of no student that distinit knows")
    stem, first = state.get("stem.0.weight"), state.get("layer1.0.conv2.1.weight")
    if stem is None or stem.ndim != 5 or first is None:
        raise unknown
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for architecture in ("r2plus1d_18", "r3d_18", "r2plus1d_34", "r3d_34", "mc3_18"):
        for variant in (
            ("torchvision", "vmz") if architecture.startswith("r2plus1d") else ("torchvision",)
        ):
            try:
                options = StudentOptions.model_validate(
                    {
                        "architecture": architecture,
                        "variant": variant,
                        "width": len(first) / 64,
                        "channels": stem.shape[1],
                    }
                )
            except ValidationError:
                raise unknown from None
            with torch.device("meta"):
                own = Backbone(options).state_dict()
            fits = all(shapes.get(name) == tensor.shape for name, tensor in own.items())
            deeper = any(name.startswith("layer") and name not in own for name in shapes)
            if fits and not deeper:
                return options
    raise unknown
