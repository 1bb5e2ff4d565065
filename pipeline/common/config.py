"""Make a validated config of preset, file, options and `--set`, and write it next to the result.

Presets and config files have the same layout, with a section per command:

    train-student:
      student: {architecture: r2plus1d_18}
    finetune:
      ...

One file can thus describe a whole experiment, and `--config` accepts the config next to a result.
Later layers win: the model's defaults, `--preset`, `--config`, options, `--set`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .documents import load_yaml
from .errors import DistInitError, UsageError, first_line
from .files import write_whole
from .settings import Options, inner_model

C = TypeVar("C", bound=Options)

CONF = Path(__file__).resolve().parents[2] / "conf"
SECTIONS = (
    "prepare",
    "extract-targets",
    "train-student",
    "finetune",
    "evaluate",
    "predict",
    "embed",
    "export",
    "ablate",
    "report",
    "demo",
    *(
        f"targets-{name}"
        for name in (
            "info",
            "browse",
            "probe",
            "compare",
            "vocabulary",
            "hash",
            "verify",
            "merge",
            "export",
        )
    ),
)


# Keys of version 0.1 → their current names, for its configs and the identities in its checkpoints.
# Digests keep the first names, since they must never change.
RENAMED_KEYS = {
    "clips.length": "clips.clip_frames",
    "targets.filter": "targets.filter_mode",
    "loop.gpu_batch_size": "loop.micro_batch_size",
    "loop.lr_batch_size": "loop.lr_base_batch_size",
    "loop.max_broken": "loop.max_unreadable",
    "moved": "video_roots",
    "videos": "copies",
    "leave_out": "exclude",
    "leave_out_split": "exclude_split",
    "accept_run": "allow_different_numerics",
}


def current_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored section or identity with the current names of its keys."""
    return _renamed(stored, RENAMED_KEYS)


def first_keys(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with the names of its keys in version 0.1."""
    return _renamed(section, {new: old for old, new in RENAMED_KEYS.items()})


def _renamed(
    section: Mapping[str, Any], names: Mapping[str, str], prefix: str = ""
) -> dict[str, Any]:
    """Return the section with renamed keys, also one level down.

    An old key is not renamed if the section has the new one as well.
    """
    result: dict[str, Any] = {}
    for key, value in section.items():
        # Names of teachers have dots: only a renamed key is cut at one.
        name = names[f"{prefix}{key}"].rpartition(".")[2] if f"{prefix}{key}" in names else key
        inner = isinstance(value, Mapping) and not prefix
        result[key if name in section else name] = (
            _renamed(value, names, f"{key}.") if inner else value
        )
    return result


def load_config(
    model: type[C],
    command: str,
    *,
    preset: str | None = None,
    file: str | None = None,
    layers: Sequence[tuple[str, Mapping[str, Any]]] = (),
    options: Mapping[str, Any] | None = None,
    settings: Sequence[str] = (),
    replaced: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> C:
    """Return the validated config of one command.

    Args:
        model: The options model of the command.
        command: Its name, which is the section of a file.
        preset: Name of a preset.
        file: A YAML file.
        layers: Pairs of a name for messages and nested keys, which override preset and file.
        options: Dotted key → value, None for an option that was not given.
        settings: "a.b=value" with values in YAML.
        replaced: Keys of preset and file that an option makes void, as --fps does with
            sampling.every.
        flags: Dotted key → the option that sets it, for messages.

    Raises:
        UsageError: One line: the key, the origin of its value, the value, the allowed values.
    """
    base_layers: list[tuple[str, Mapping[str, Any]]] = []
    if preset is not None:
        base_layers.append((f"preset {preset}", preset_section(preset, command)))
    if file is not None:
        base_layers.append((file, current_keys(_section(read_yaml(Path(file)), command, file))))
    all_layers: list[tuple[str, Mapping[str, Any]]] = [
        (origin, _without(layer, replaced)) for origin, layer in base_layers
    ]
    all_layers += layers
    for key, value in (options or {}).items():
        if value is not None:
            all_layers.append(("", nested(key, value)))
    for setting in settings:
        key, value = parse_setting(setting)
        all_layers.append((f"--set {setting}", nested(key, value)))

    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in all_layers:
        merged = merge(merged, layer)
        origins.update(dict.fromkeys(_leaves(layer), origin))
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        raise UsageError(_explain(error, model, origins, flags or {})) from None


def write_config(path: str | os.PathLike[str], command: str, config: Options) -> None:
    """Write the config as used, atomically, in the layout that `--config` reads."""
    text = yaml.safe_dump({command: config.model_dump(mode="json")}, sort_keys=False, width=100)
    head = f"# The config as used; `distinit {command} --config FILE` reads it.\n"
    write_whole(Path(path), (head + text).encode())


def presets() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return sorted(path.stem for path in CONF.glob("*.yaml"))


def preset_section(preset: str, command: str) -> dict[str, Any]:
    """Return one command's section of a preset that ships with the package."""
    if preset not in presets():
        raise UsageError(f"--preset: no preset {preset!r}; allowed: {', '.join(presets())}")
    text = (CONF / f"{preset}.yaml").read_text(encoding="utf-8")
    return _section(_parse(text, f"preset {preset}"), command, f"preset {preset}")


def read_yaml(path: Path, option: str = "--config") -> dict[str, Any]:
    """Read a YAML file whose top is a mapping.

    Args:
        path: The file.
        option: The option that named it, for messages.

    Raises:
        UsageError: There is no such file, or it is not such YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {path}: not a text file in UTF-8") from None
    return _parse(text, f"{option} {path}")


def parse_setting(setting: str) -> tuple[str, Any]:
    """Read `a.b=value` as key and value.

    The value is YAML: 3, 1e-4, [1, 2], null, text.

    Raises:
        UsageError: It has another form.
    """
    key, equals, text = setting.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key.strip()):
        raise UsageError(f"--set {setting}: expected key=value, as in loop.lr=0.01")
    try:
        return key.strip(), load_yaml(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {setting}: not YAML: {_yaml_problem(error)}") from None


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `overrides`.

    Mappings are merged, all other values (lists, too) are replaced.
    """
    result = dict(base)
    for key, value in overrides.items():
        old = result.get(key)
        result[key] = (
            merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        )
    return result


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return a dotted key and its value as nested mappings."""
    section, dot, inner_key = key.partition(".")
    return {section: nested(inner_key, value) if dot else value}


def known_keys(model: type[Options], prefix: str = "") -> list[str]:
    """Return all dotted keys of a model, those of nested models included."""
    keys = []
    for name, field in model.model_fields.items():
        inner = inner_model(field.annotation)
        keys += known_keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and refuses the same key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        duplicate = next(
            (name for name, count in Counter(map(str, names)).items() if count > 1), None
        )
        if duplicate is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {duplicate!r} twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        value = load_yaml(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not YAML: {_yaml_problem(error)}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{source}: expected one section per command ({', '.join(SECTIONS)})")
    return value


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or first_line(error)
    return f"{problem} (line {mark.line + 1})" if mark else str(problem)


def _section(content: dict[str, Any], command: str, source: str) -> dict[str, Any]:
    unknown = [str(key) for key in content if key not in SECTIONS]
    if unknown:
        raise UsageError(
            f"{source}: unknown section {unknown[0]!r}; a file has sections {', '.join(SECTIONS)}"
        )
    section = content.get(command)
    if command not in content:
        raise UsageError(f"{source}: no section {command!r}; it has: {', '.join(content)}")
    if not isinstance(section, dict | None):
        raise UsageError(f"{source}: section {command!r} must hold keys, got {section!r}")
    return section or {}


def _without(layer: Mapping[str, Any], removed: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, removed, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in layer.items()
        if f"{prefix}{key}" not in removed
    }


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in layer.items():
        name = f"{prefix}{key}"
        keys += _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [name]
    return keys


def _explain(
    error: ValidationError,
    model: type[Options],
    origins: Mapping[str, str],
    flags: Mapping[str, str],
) -> str:
    by_key: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        key, inner_loc = _field_of(problem["loc"], model)
        # For a union pydantic reports the problems of every branch, with its name in the location.
        by_key.setdefault(key, []).append(
            {**problem, "loc": (*key.split("."), *inner_loc) if key else inner_loc}
        )
    problems = [_likeliest(each) for each in by_key.values()]
    text = _problem(problems[0], model, origins, flags)
    return text + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _field_of(
    loc: tuple[int | str, ...], model: type[Options]
) -> tuple[str, tuple[int | str, ...]]:
    """Return the dotted key of the field with a problem, and the location inside its value.

    The location has no names of a union's branches.
    """
    inner: type[Options] | None = model
    for depth, part in enumerate(loc):
        field = inner.model_fields.get(str(part)) if inner is not None else None
        if field is None:
            break
        inner = inner_model(field.annotation)
        if inner is None:
            tagged = (
                get_origin(field.annotation) in (Union, UnionType)
                and len(_branches(field.annotation)) > 1
            )
            return ".".join(map(str, loc[: depth + 1])), loc[depth + 1 + tagged :]
    return ".".join(map(str, loc)), ()


def _branches(annotation: Any) -> list[Any]:
    return [each for each in get_args(annotation) if each is not type(None)]


def _likeliest(problems: list[ErrorDetails]) -> ErrorDetails:
    """Return the problem of the union's branch whose type the value has.

    In that branch the value itself is wrong, not its type.
    """
    return next((each for each in problems if not each["type"].endswith("_type")), problems[0])


def _problem(
    problem: ErrorDetails,
    model: type[Options],
    origins: Mapping[str, str],
    flags: Mapping[str, str],
) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    origin = next(
        (source for name, source in origins.items() if key == name or key.startswith(f"{name}.")),
        "",
    )
    origin = origin or next(
        (source for name, source in origins.items() if name.startswith(f"{key}.")), ""
    )
    shown_origin = f" ({origin})" if origin else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{shown_origin}{_suggestion(key, known_keys(model))}"
    flag = next(
        (option for name, option in flags.items() if key == name or key.startswith(f"{name}.")), ""
    )
    label = f"{flag} ({key})" if flag and flag != f"--{key}" else flag or key
    if problem["type"] == "missing":
        return f"{label}: a value is needed" + ("" if flag else f", by --set {key}=… or --config")
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, DistInitError):
        return f"{label}{shown_origin}: {cause}" if key else str(cause)
    message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    message = message.replace("must be a valid", "must be a", 1).replace(
        "a integer", "an integer", 1
    )
    if problem["type"] in ("value_error", "assertion_error"):
        return f"{label}{shown_origin}: {message}" if key else message
    return f"{label}: got {problem['input']!r}{shown_origin}, {message[:1].lower()}{message[1:]}"


def _suggestion(key: str, allowed: Sequence[str]) -> str:
    """Return the end of a message about an unknown key: similar keys, or all that are allowed."""
    if key in allowed:
        # Only --set takes keys with dots: in YAML a section is a mapping.
        *sections, last = key.split(".")
        nested = "".join(f"{name}: {{" for name in sections)
        return f"; write it as nested sections, {nested}{last}: VALUE{'}' * len(sections)}"
    similar = difflib.get_close_matches(key, allowed, n=3, cutoff=0.6)
    last = key.rpartition(".")[2]
    similar += [name for name in allowed if name.rpartition(".")[2] == last and name not in similar]
    if not similar:
        by_last = {name.rpartition(".")[2]: name for name in allowed}
        similar = [by_last[match] for match in difflib.get_close_matches(last, by_last, n=3)]
    if similar:
        return f"; did you mean {' or '.join(similar[:3])}?"
    return f"; allowed: {', '.join(allowed)}"
