"""The Python function of a stage, with the options of its command as keyword arguments.

    result = distinit.extract_targets("clips/", out="targets.zarr", teacher="resnet50")

Names are those of the command line with underscores. Strings are parsed as on the command line.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, short
from .settings import CliOption, Options, fields_of, inner_model, paths_as_text, value_type


class Result(Mapping[str, Any]):
    """The result of a stage, as `--json` prints it: a mapping whose keys are attributes as well.

    Example:
        result = distinit.finetune(init="runs/student", dataset="csv:labels.csv", out="runs/ours")
        result.metrics["top1"], result["out"]
    """

    def __init__(self, function: str, values: Mapping[str, Any]) -> None:
        self._function = function
        self._values = dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(
                f"the result of {self._function} has no {name!r}; it has: {', '.join(self)}"
            )
        return self._values[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        lines = (f"  {key} = {short(value)}" for key, value in self._values.items())
        return "\n".join((f"{self._function}:", *lines))


@dataclass(frozen=True)
class _Keyword:
    """A keyword argument: the dotted key that it sets, and the command-line form of its field."""

    key: str
    text: str
    default: Any
    cli: CliOption
    repeated: bool


def stage_function(command: str, model_path: str, stage_path: str) -> Callable[..., Result]:
    """Make the function of a stage.

    Args:
        command: Name of the command, which is also the section of a config file.
        model_path: module:name of the options model, below `distinit`; importing it loads no torch.
        stage_path: module:name of the stage, imported when the function is called.
    """
    name = command.replace("-", "_")
    model = load(model_path)
    keywords = _keywords(model)
    arguments = [word for word, each in keywords.items() if each.cli.name[:1] not in ("", "-")]
    argument = arguments[0] if arguments else None

    def run(
        *positional: Any,
        preset: str | None = None,
        config: str | os.PathLike[str] | None = None,
        set: Mapping[str, Any] | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> Result:
        from .config import load_config
        from .console import Console

        options = _by_name(name, keywords, argument, positional, options)
        values = {
            each.key: _value(word, each, options) for word, each in keywords.items() if each.key
        }
        stage_config = load_config(
            model,
            command,
            preset=preset,
            file=None if config is None else os.fspath(config),
            options={**values, **(set or {})},
            replaced=[
                f"{each.key.rpartition('.')[0]}.{key}".lstrip(".")
                for each in keywords.values()
                if values.get(each.key) is not None
                for key in each.cli.replaces
            ],
            flags={each.key: word for word, each in keywords.items()},
        )
        with Console(quiet=quiet) as console:
            return Result(name, load(stage_path)(stage_config, console))

    run.__name__ = run.__qualname__ = name
    run.__module__ = "distinit"
    run.__doc__ = _docstring(command, keywords)
    run.__signature__ = _signature(keywords, argument)  # type: ignore[attr-defined]
    return run


def _by_name(
    function: str,
    keywords: Mapping[str, _Keyword],
    argument: str | None,
    positional: Sequence[Any],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all arguments of a call by name.

    Raises:
        TypeError: Wrong arguments, as Python raises it.
    """
    unknown = next((word for word in options if word not in keywords), None)
    if unknown is not None:
        similar = difflib.get_close_matches(unknown, keywords, 1)
        hint = f"; did you mean {similar[0]!r}?" if similar else ""
        raise TypeError(f"{function}() has no option {unknown!r}{hint}")
    if not positional:
        return dict(options)
    repeated = argument is not None and keywords[argument].repeated
    single = not repeated or isinstance(positional[0], list | tuple)
    if argument is None or argument in options or (len(positional) > 1 and single):
        raise TypeError(f"{function}() takes positional arguments for: {argument or 'nothing'}")
    return {**options, argument: positional[0] if single else list(positional)}


def _docstring(command: str, keywords: Mapping[str, _Keyword]) -> str:
    lines = [f"    {word}: {each.text}" for word, each in keywords.items() if each.text]
    return "\n".join(
        [
            f"Run `distinit {command}`; its help text has examples.",
            "",
            "Args:",
            *lines,
            "    preset: the name of a preset that ships with the package.",
            "    config: a YAML file, as the ones written next to results.",
            "    set: values for any other key, by dotted key.",
            "    quiet: no lines and no progress, warnings only.",
            "",
            "Returns:",
            "    A `Result`, what `--json` prints.",
            "",
            "Raises:",
            "    DistInitError: as the command, which prints its message.",
        ]
    )


def _signature(keywords: Mapping[str, _Keyword], argument: str | None) -> inspect.Signature:
    parameter = inspect.Parameter
    params = [] if argument is None else [parameter(argument, parameter.POSITIONAL_OR_KEYWORD)]
    defaults = {word: each.default for word, each in keywords.items() if word != argument}
    defaults |= {"preset": None, "config": None, "set": None, "quiet": False}
    params += [
        parameter(word, parameter.KEYWORD_ONLY, default=value) for word, value in defaults.items()
    ]
    return inspect.Signature(params)


def _keywords(model: type[Options], prefix: str = "") -> dict[str, _Keyword]:
    keywords: dict[str, _Keyword] = {}
    for name, field in fields_of(model).items():
        cli = next((each for each in field.metadata if isinstance(each, CliOption)), None)
        inner = inner_model(field.annotation)
        if inner is not None and cli is not None:
            keywords |= _keywords(inner, f"{prefix}{name}.")
            continue
        if cli is None and prefix:
            continue
        cli = cli or CliOption()
        word = cli.name.lstrip("-").replace("-", "_") if cli.name.startswith("--") else name
        default = field.get_default(call_default_factory=True)
        default = inspect.Parameter.empty if field.is_required() else default
        keywords[word] = _Keyword(
            prefix + name,
            field.description or "",
            default,
            cli,
            value_type(field.annotation).repeated,
        )
        for flag, _, text in cli.parts:
            part = flag[2:].replace("-", "_")
            keywords[part] = _Keyword("", text, None, CliOption(), True)
    return keywords


def _value(word: str, keyword: _Keyword, options: Mapping[str, Any]) -> Any:
    """Return the value for the config: strings parsed as on the command line, others unchanged."""
    value = paths_as_text(options.get(word))
    parts = [flag[2:].replace("-", "_") for flag, _, _ in keyword.cli.parts]
    if value is None and not any(part in options for part in parts):
        return None
    texts = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if keyword.cli.parse is not None and all(isinstance(text, str) for text in texts):
        part_texts = [_texts(options.get(part)) for part in parts]
        repeated = keyword.repeated if keyword.cli.repeated is None else keyword.cli.repeated
        if not repeated and len(texts) != 1:
            return value
        typed = tuple(texts) if repeated else texts[0]
        return keyword.cli.parse(typed, *part_texts)
    for part in parts:
        if options.get(part) is not None:
            raise UsageError(
                f"{part}: allowed only if {word} is a string, got {short(value)}; write it as part of that value"
            )
    if keyword.repeated and isinstance(value, str):
        return [value]
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return tuple(f"{key}={each}" for key, each in value.items())
    return (value,) if isinstance(value, str) else tuple(value)


def load(path: str) -> Any:
    """Import `module:name`, below `distinit`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"distinit.{module}"), name)
