"""Student files: safetensors in torchvision's parameter names, with options in the metadata.

A single linear head is written as `fc.weight` and `fc.bias`, unless the backbone has an `fc`. So a
student with one head and the torchvision variant loads strictly into torchvision's model. Several
heads are written as `heads.<name>.weight` and `.bias`, an MLP head as `heads.<name>.hidden.*` and
`.output.*`. A head that learned scaled features is written with scale and mean in its last layer,
so that it gives features of the teacher's scale.

The metadata's `distinit` entry is one JSON object with options, heads and `StudentMeta`;
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
    """The tensors that an initialisation loaded, and those that it ignored.

    Args:
        path: Where the tensors are from.
        loaded: Names of the loaded tensors in the backbone.
        left: Names of tensors of the file that are not part of a backbone, such as heads.
        lines: One line for the log per tensor.
    """

    path: str
    loaded: tuple[str, ...]
    left: tuple[str, ...]
    lines: tuple[str, ...] = ()


class _Header(Options):
    format_version: int
    options: StudentOptions
    heads: dict[str, int]
    # Only the kinds of heads that are not linear, since version 0.1 wrote none.
    head_kinds: dict[str, HeadKind] = {}
    meta: StudentMeta


def save_start(path: str | Path, student: Student) -> None:
    """Write the current weights of the first convolution as one safetensors file, atomically.

    Raises:
        CheckpointError: The file cannot be written.
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
        path: The file to write. It is replaced as a whole.
        student: The student, with its options and heads.
        meta: Metadata for users. Keys of a flat mapping that `StudentMeta` does not have are put
            under its `extra`.
        scales: Head → mean [K] and scale, if it learned (x − mean) / scale of features x; the head
            in the file gives x.

    Raises:
        CheckpointError: The class names do not fit the heads, or the file cannot be written.

    Example:
        >>> save_student("student.safetensors", student, {"clip_length": 8, "clip_size": 112})
    """
    path = Path(path)
    try:
        meta = meta if isinstance(meta, StudentMeta) else StudentMeta.from_mapping(meta)
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
    """Return the header as ASCII; lone surrogates (from paths that are not UTF-8) are escaped."""
    # Empty fields are left out, as in files of version 0.1.
    excluded: dict[str, Any] = {} if header.head_kinds else {"head_kinds": True}
    excluded |= {} if header.meta.heads else {"meta": {"heads"}}
    return json.dumps(header.model_dump(mode="python", exclude=excluded))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = io.BytesIO(safetensors.torch.save(tensors, {**metadata, KEY: BLANK}))
    seal(data)
    write_whole(path, data.getbuffer(), CheckpointError)


def load_student(
    path: str | Path, device: torch.device | str = "cpu", *, factory: str | None = None
) -> Student:
    """Load the student of a file or a run folder, in evaluation mode, with its `meta`.

    Args:
        path: A file, or a run folder with `student.safetensors` (from train-student) or
            `model.safetensors` (from finetune), or `hf://ORG/NAME[@REVISION]`, a repository of the
            Hugging Face hub, from which `model.safetensors` is downloaded and no code is run.
        device: Device of the student.
        factory: The `package.module:factory` that makes the student, if a factory does. Its code is
            run only if the caller names it here.

    Raises:
        CheckpointError: The file does not exist, is not a student of distinit, has a newer format,
            or is damaged.

    Example:
        >>> student = load_student("runs/ours")
        >>> student(torch.zeros(1, 3, 8, 112, 112))["label"].shape
    """
    path = _resolve_file(path)
    state, header = _read(path)
    if header is None:
        raise CheckpointError(
            f"{path}: has no 'distinit' metadata, so it is not a student written by distinit; "
            "load_backbone loads its tensors if they fit"
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
    """Initialise a student's backbone from an exported student, without changing its heads.

    Args:
        student: The student to initialise.
        path: A run folder or safetensors file. A file in torchvision's names may have no metadata;
            its options are then recognised by the shapes of its tensors.
        label: Name of the source in messages; by default the file.

    Raises:
        CheckpointError: Architecture, variant, width or number of channels differ (the error names
            them and the options that fit), the file is damaged, or values are not finite.
    """
    path = _resolve_file(path)
    label = str(path) if label is None else label
    state, header = _read(path)
    stored = header.options if header else recognise(state, label)
    check_options(student.options, stored, label)
    return take_backbone(student, state, label)


def take_backbone(
    student: Student,
    state: Mapping[str, Tensor],
    label: str,
    origins: Mapping[str, str] | None = None,
) -> InitReport:
    """Load the backbone of a student from a state in its parameter names, and ignore other tensors.

    Args:
        student: The student to initialise.
        state: Name → tensor.
        label: Origin of the state, for messages.
        origins: Name → origin of the tensor, for the report.

    Raises:
        CheckpointError: A tensor is missing, has another shape, or is not finite.
    """
    current = student.backbone.state_dict()
    taken = {name: state[name] for name in current if name in state}
    # BatchNorm's batch counters are not needed, and older files do not have them.
    missing = [
        name for name in current if name not in taken and not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise CheckpointError(
            f"{label}: damaged: {len(missing)} tensors missing, first {missing[0]}"
        )
    for name, tensor in taken.items():
        if tensor.shape != current[name].shape:
            raise CheckpointError(
                f"{label}: damaged: {name} is {list(tensor.shape)}, expected {list(current[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{label}: {name} holds values that are not finite")
    student.backbone.load_state_dict(taken, strict=False)
    left = tuple(name for name in state if name not in taken)
    origins = origins or {}
    lines = [
        f"{name} {list(tensor.shape)} from {origins.get(name, name)}"
        for name, tensor in taken.items()
    ]
    lines += [f"left: {name} {list(state[name].shape)}" for name in left]
    return InitReport(label, tuple(taken), left, tuple(lines))


def read_options(path: str | Path, *, factory: str | None = None) -> StudentOptions:
    """Return the options that the student of a file or run folder was built with.

    Args:
        path: The file or run folder.
        factory: See `load_student`.

    Raises:
        CheckpointError: See `load_backbone`.
    """
    path = _resolve_file(path)
    state, header = _read(path)
    options = header.options if header else recognise(state, path)
    _require_named(options, factory, path)
    return options


def read_meta(path: str | Path) -> StudentMeta | None:
    """Return the `StudentMeta` of a file or run folder, or None if distinit did not write it.

    Raises:
        CheckpointError: The file does not exist, is damaged, or has a newer format.
    """
    _, header = _read(_resolve_file(path))
    return header.meta if header is not None else None


def _require_named(options: StudentOptions, factory: str | None, path: Path) -> None:
    if options.is_factory and options.architecture != factory:
        raise CheckpointError(
            f"{path}: its student is made by {options.architecture}, whose code would be run; name it to allow that: "
            f"--student {options.architecture} (evaluate and predict: --set factory={options.architecture}; "
            f"load_student: factory={options.architecture!r})"
        )


def _check_sizes(header: _Header, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a header that does not fit the tensors, before memory is allocated for its student."""
    for name, num_classes in header.heads.items():
        last = "output.weight" if header.head_kinds.get(name) == "mlp" else "weight"
        weight = state.get(
            f"heads.{name}.{last}", state.get("fc.weight") if len(header.heads) == 1 else None
        )
        if weight is None or weight.ndim != 2 or len(weight) != num_classes:
            weight_shape = "none" if weight is None else list(weight.shape)
            raise CheckpointError(
                f"{path}: damaged: head {name!r} has {num_classes} classes, its tensor is {weight_shape}"
            )
    shapes: Mapping[str, torch.Size] | None
    if header.options.architecture in BUILTIN_ARCHITECTURES:
        with torch.device("meta"):
            tensors = Backbone(header.options).state_dict()
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
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
    """Yield every tensor of a student under its name in files; see `save_student` for `scales`."""
    yield from student.backbone.state_dict().items()
    for name in student.classes:
        linear = student.head_kinds[name] == "linear"
        is_single = len(student.classes) == 1 and not hasattr(student.backbone, "fc")
        prefix = "fc" if linear and is_single else f"heads.{name}"
        state = student.head(name).state_dict()
        if name in (scales or {}):
            last = "" if linear else "output."
            mean, scale = (scales or {})[name]
            state[f"{last}weight"] = state[f"{last}weight"] * scale
            state[f"{last}bias"] = state[f"{last}bias"] * scale + mean.to(state[f"{last}bias"])
        yield from ((f"{prefix}.{part}", tensor) for part, tensor in state.items())


def _fill(student: Student, state: dict[str, Tensor], path: Path) -> None:
    tensors = dict(_named_tensors(student))
    wrong = sorted(tensors.keys() ^ state.keys())
    wrong += [
        name for name in tensors if name in state and tensors[name].shape != state[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: damaged: its tensors are not those of {student.options.describe()}, first {wrong[0]}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


def _resolve_file(path: str | Path) -> Path:
    """Return the safetensors file of a file path, run folder or hub address.

    Raises:
        CheckpointError: There is no such file, or a run folder holds two.
        SourceError: The file is a link that leads out of the run folder.
    """
    if is_hub_address(path):
        return hub_model(str(path))
    path = Path(path)
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file or run folder")
        return path
    files = [
        path / name for name in (STUDENT_FILE, MODEL_FILE) if is_regular_file(path / name, path)
    ]
    if not files:
        raise CheckpointError(
            f"{path}: holds no {' and no '.join((STUDENT_FILE, MODEL_FILE))}; is its run finished?"
        )
    if len(files) > 1:
        raise CheckpointError(
            f"{path}: holds {' and '.join((STUDENT_FILE, MODEL_FILE))}; name the file"
        )
    return files[0]


def _read(path: Path) -> tuple[dict[str, Tensor], _Header | None]:
    """Return the tensors, and the header if distinit wrote the file."""
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


def check_options(wanted: StudentOptions, stored: StudentOptions, label: str) -> None:
    """Check that requested options are equal to those of a file.

    Args:
        wanted: The requested options.
        stored: The options of the file.
        label: Name of the file in messages.

    Raises:
        CheckpointError: Options differ; the error names each of them, and the options that fit.
    """
    wanted_values, stored_values = wanted.model_dump(), stored.model_dump()
    differences = [
        f"{key} is {stored_values[key]!r} in the file, {value!r} was asked for"
        for key, value in wanted_values.items()
        if value != stored_values[key]
    ]
    if differences:
        fitting = " ".join(f"{key}={value}" for key, value in stored_values.items())
        raise CheckpointError(f"{label}: {'; '.join(differences)}; what fits: {fitting}")


def _check_classes(heads: dict[str, int], meta: StudentMeta, path: Path) -> None:
    for name, classes in meta.classes.items():
        if heads.get(name) != len(classes):
            raise CheckpointError(
                f"{path}: {len(classes)} class names for head {name!r}, which has {heads.get(name, 'no')} classes"
            )


def recognise(state: Mapping[str, Tensor], label: str | Path) -> StudentOptions:
    """Return the options whose backbone has exactly these shapes.

    Channels and width follow from the first convolutions; architectures and variants are tried.

    Raises:
        CheckpointError: No options fit; the message begins with the label.
    """
    unknown = CheckpointError(f"{label}: its tensors are those of no student that distinit knows")
    stem, first = state.get("stem.0.weight"), state.get("layer1.0.conv2.1.weight")
    if stem is None or stem.ndim != 5 or first is None:
        raise unknown
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for architecture in BUILTIN_ARCHITECTURES:
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
                tensors = Backbone(options).state_dict()
            fits = all(shapes.get(name) == tensor.shape for name, tensor in tensors.items())
            is_deeper = any(name.startswith("layer") and name not in tensors for name in shapes)
            if fits and not is_deeper:
                return options
    raise unknown
