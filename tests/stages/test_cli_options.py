"""Options, presets and config files: every layer reaches the config, every mistake is one line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from distinit.cli import GROUPS, KeyOption, StageCommand, cli
from distinit.pipeline.common.config import (
    CONF,
    SECTIONS,
    known_keys,
    load_config,
    presets,
    write_config,
)
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.common.settings import Options, parse_pairs
from distinit.pipeline.teachers.teacher_options import parse_teachers
from distinit.stages import STAGES

MODELS = {name: model for name, (model, _) in STAGES.items()}


def model_of(command: str) -> type[Options]:
    module, name = MODELS[command].split(":")
    model: type[Options] = getattr(importlib.import_module(f"distinit.{module}"), name)
    return model


def stage_commands() -> list[StageCommand]:
    targets = cli.commands["targets"]
    assert isinstance(targets, click.Group)
    commands = [*cli.commands.values(), *targets.commands.values()]
    return [command for command in commands if isinstance(command, StageCommand)]


def params_of(command: click.Command) -> list[click.Parameter]:
    return command.get_params(click.Context(command, **cli.context_settings))


def test_options_are_generated_from_fields_of_the_models() -> None:
    commands = stage_commands()
    assert {command.section for command in commands} == set(SECTIONS) == set(MODELS)
    for command in commands:
        keys = known_keys(model_of(command.section))
        flags = [flag for param in params_of(command) for flag in param.opts]
        assert len(set(flags)) == len(flags)
        for param in params_of(command):
            if isinstance(param, KeyOption):
                assert set(param.replaces) <= set(keys)
                assert param.key in keys
                assert param.cli.group in GROUPS


@pytest.mark.parametrize(
    ("command", "option", "shown"),
    [
        ("train-student", "--epochs", "[default: 45]"),
        ("finetune", "--epochs", "[default: 8]"),
        ("finetune", "--frames", "[default: the initialisation's]"),
        ("evaluate", "--test-clips", "[default: the run's]"),
        ("predict", "--test-clips", "[default: 10]"),
        ("prepare", "--out", "[required]"),
        ("targets-verify", "--device", "[default: auto]"),
    ],
)
def test_help_shows_the_default_of_the_model(command: str, option: str, shown: str) -> None:
    stage = next(each for each in stage_commands() if each.section == command)
    help_of = {param.opts[0]: getattr(param, "help", "") for param in params_of(stage)}
    assert help_of[option].endswith(shown)


def test_every_command_has_a_help_with_examples() -> None:
    def leaves(group: click.Group) -> list[click.Command]:
        commands: list[click.Command] = []
        for command in group.commands.values():
            commands += leaves(command) if isinstance(command, click.Group) else [command]
        return commands

    for command in leaves(cli):
        assert command.help, command.name
        assert command.epilog, command.name
        assert "distinit" in command.epilog, command.name
        for param in params_of(command):
            assert isinstance(param, click.Argument) or (
                isinstance(param, click.Option) and param.help
            ), param


@pytest.mark.parametrize("preset", presets())
def test_every_section_of_every_preset_is_valid(preset: str) -> None:
    required: dict[str, dict[str, Any]] = {
        "extract-targets": {"out": "store"},
        "train-student": {"store": "store", "out": "run"},
        "finetune": {"dataset": "csv:labels.csv", "out": "run"},
    }
    sections = list(yaml.safe_load((CONF / f"{preset}.yaml").read_text()))
    assert sections
    for command in sections:
        load_config(model_of(command), command, preset=preset, options=required.get(command, {}))


def test_later_layers_win_and_the_config_as_used_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(
        "train-student:\n  loop: {lr: 1e-3, epochs: 7}\n  clips: {clip_frames: 16}\nfinetune: {}\n"
    )
    model = model_of("train-student")
    config: Any = load_config(
        model,
        "train-student",
        preset="paper",
        file=str(file),
        options={"store": "s", "out": "r", "loop.epochs": 3, "loop.seed": None},
        settings=["loop.momentum=0.8", "targets.teachers=[a, b]"],
    )
    assert config.student.variant == "vmz", "of the preset"
    assert (config.loop.lr, config.clips.clip_frames) == (1e-3, 16), "of the file, 1e-3 as a number"
    assert (config.loop.epochs, config.loop.seed) == (3, 0), "an option, and one without a value"
    assert (config.loop.momentum, list(config.targets.teachers)) == (0.8, ["a", "b"]), "of --set"

    write_config(tmp_path / "used.yaml", "train-student", config)
    assert load_config(model, "train-student", file=str(tmp_path / "used.yaml")) == config
    assert set(yaml.safe_load((tmp_path / "used.yaml").read_text())) == {"train-student"}


def test_an_option_voids_the_keys_it_replaces(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("extract-targets: {sampling: {every: 1}, teachers: [{name: resnet50}]}")
    config: Any = load_config(
        model_of("extract-targets"),
        "extract-targets",
        file=str(file),
        options={"sources": ["x"], "out": "s", "sampling.fps": 2.0},
        replaced=["sampling.every", "sampling.keyframes"],
    )
    assert (config.sampling.every, config.sampling.fps) == (None, 2.0)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["loop.lrr=1"], ["'loop.lrr'", "loop.lr"]),
        (["lr=1"], ["'lr'", "loop.lr"]),
        (["loop.lr=-1"], ["loop.lr", "-1", "than 0"]),
        (["loop.precision=fp16"], ["fp16", "'fp32' or 'bf16'"]),
        (["loop.lr"], ["--set loop.lr", "key=value"]),
        (["loop.lr=[1"], ["--set loop.lr=[1", "YAML"]),
        (["loop=3"], ["loop", "3"]),
        (["targets.picks=middle"], ["middle", "center", "random:N"]),
        (["student.architecture=r3d_18", "student.variant=vmz"], ["vmz", "r2plus1d_18"]),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_value_and_allowed_values(
    settings: list[str], parts: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(
            model_of("train-student"),
            "train-student",
            options={"store": "s", "out": "r"},
            settings=settings,
        )
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train-student: {loop: {lr: 1, lr: 2}}", ["'lr'", "line 1"]),
        ("train_student: {}", ["train_student", *SECTIONS]),
        ("finetune: {}", ["'train-student'", "finetune"]),
        ("- a list", ["section"]),
        ("train-student: 5", ["train-student", "5"]),
        ("a: [", ["YAML"]),
    ],
)
def test_a_wrong_config_file_is_one_line_with_its_name(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(model_of("train-student"), "train-student", file=str(file))
    for part in [*parts, "plan.yaml"]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_values_are_named_by_their_option() -> None:
    with pytest.raises(UsageError, match="--store"):
        load_config(
            model_of("train-student"),
            "train-student",
            options={"out": "r"},
            flags={"store": "--store"},
        )
    with pytest.raises(UsageError, match=r"'papr'.*paper"):
        load_config(model_of("train-student"), "train-student", preset="papr")


def test_teacher_options_find_their_teacher() -> None:
    specs = parse_teachers(
        ("resnet50", "torchvision:resnet18"),
        ("resnet50:resize=232", "torchvision:resnet18:mean=0.5"),
        ("resnet50=/w/a=b.pth",),
        ("torchvision:resnet18=abc",),
    )
    assert specs == [
        {"name": "resnet50", "options": {"resize": "232"}, "weights": "/w/a=b.pth"},
        {"name": "torchvision:resnet18", "options": {"mean": "0.5"}, "sha256": "abc"},
    ]
    specs = parse_teachers(("m:f",), ("depth=50", "m:f:x=1"), ("/w/a=b.pth",), ("abc",))
    assert specs == [
        {
            "name": "m:f",
            "options": {"depth": "50", "x": "1"},
            "weights": "/w/a=b.pth",
            "sha256": "abc",
        }
    ]
    assert parse_teachers((), (), (), ()) is None
    for names, option in ((("a", "b"), "k=v"), (("a",), "b:k=v"), ((), "k=v"), (("a",), "nothing")):
        with pytest.raises(UsageError, match="--teacher-option"):
            parse_teachers(names, (option,), (), ())


def test_texts_that_are_no_pairs_are_refused() -> None:
    assert parse_pairs(("a=/x", "b=/y=z")) == {"a": "/x", "b": "/y=z"}
    for texts in (("a",), ("=x",), ("a=",), ("a=1", "a=2")):
        with pytest.raises(ValueError, match=r"NAME=VALUE|twice"):
            parse_pairs(texts)


def test_unusual_values_become_valid_json() -> None:
    import numpy as np

    from distinit.pipeline.common.console import plain, printable

    values = {
        "nan": float("nan"),
        "path": Path("a"),
        "array": np.arange(2),
        "scalar": np.float32(0.5),
        3: (1, None),
    }
    text = json.dumps(plain(values), allow_nan=False)
    assert json.loads(text) == {
        "nan": None,
        "path": "a",
        "array": [0, 1],
        "scalar": 0.5,
        "3": [1, None],
    }
    assert printable("a\nb\udcff\x1b[1m é") == "a\\nb\\udcff\\x1b[1m é"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000, "a: &a [*a]", "a: 0x" + "f" * 9000, "a: " + "9" * 9000, "a: 2024-99-99",
        "a: !!python/name:os.system",
        "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 9}]}}\n" for i in range(1, 12)),
        "".join(f"k{i}: 1\n" for i in range(600_000)), "a: {? [1]: 2}",
    ],
)  # fmt: skip
def test_yaml_that_exceeds_a_limit_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    options = importlib.import_module("distinit.pipeline.extraction.extract_options")
    with pytest.raises(UsageError, match=r"c\.yaml") as caught:
        load_config(options.ExtractConfig, "extract-targets", file=str(tmp_path / "c.yaml"))
    assert "\n" not in str(caught.value)
