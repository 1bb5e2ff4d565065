"""Python functions of stages: their keywords are the options of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import distinit
from distinit.cli import cli
from distinit.stages import STAGES


@pytest.mark.parametrize("name", sorted(name for name in STAGES if "targets-" not in name))
def test_keywords_are_the_options_of_the_command(name: str) -> None:
    command = cli.commands[name]
    # click caches the help option, so it must be created with the names of the command.
    params = command.get_params(click.Context(command, **command.context_settings))
    options = {max(p.opts, key=len).lstrip("-").replace("-", "_") for p in params}
    keywords = set(inspect.signature(getattr(distinit, name.replace("-", "_"))).parameters)
    assert options - {"json", "debug", "help"} <= keywords


def test_errors_of_a_function_are_those_of_the_command(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    _, root = make_store(videos=range(3))
    with pytest.raises(distinit.DistInitError) as caught:
        distinit.train_student(store=root, out=tmp_path / "run", frames="many", quiet=True)
    assert "frames" in str(caught.value)
    assert "many" in str(caught.value)
    with pytest.raises(TypeError, match="did you mean 'epochs'"):
        distinit.train_student(store=root, out=tmp_path / "run", epoch=3)


def test_no_argument_of_a_function_is_ignored(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sources"):
        distinit.extract_targets(["a/"], "b/", out=tmp_path / "t.zarr")
    teacher = [{"name": "resnet50"}]
    with pytest.raises(distinit.DistInitError, match=r"teacher_output.*teacher"):
        distinit.extract_targets(
            "a/", out=tmp_path / "t.zarr", teacher=teacher, teacher_output="features"
        )


def test_options_of_a_function_are_read_as_those_of_the_command(
    tiny_store: Any, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    video = sorted(tiny_store.videos.iterdir())[0]
    result = distinit.prepare(video, out=out, size="32x40", gop=4, quiet=True)
    assert isinstance(result, distinit.Result)
    assert result.out == result["out"] == str(out)
    assert "out = " in repr(result)
    repeated = distinit.prepare([str(video)], out=str(out), size=(32, 40), gop=4, quiet=True)
    assert set(repeated) == set(result)
    with pytest.raises(AttributeError, match="nothing"):
        result.nothing  # noqa: B018
