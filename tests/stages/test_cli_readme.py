"""Commands and Python examples of the README and the docs run as they are written."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

import click
import numpy as np
import pytest
import torch

import distinit
from distinit.cli import cli
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import UsageError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.video.encode import write_video
from distinit.stages.extract_targets import extract_targets

ROOT = Path(distinit.__file__).resolve().parent
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()
]

pytestmark = pytest.mark.skipif(not PAGES, reason="an installed copy has no README")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def shell_lines() -> list[str]:
    lines = []
    for page in PAGES:
        for block in blocks(page, "sh"):
            lines += re.sub(r"\\\n\s*", "", block).splitlines()
    for command in (*cli.commands.values(), *_group("targets").commands.values()):
        lines += (command.epilog or "").splitlines()
    return sorted({line.strip() for line in lines if line.strip().startswith("distinit ")})


def _group(name: str) -> click.Group:
    group = cli.commands[name]
    assert isinstance(group, click.Group)
    return group


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_line_in_the_docs_can_be_parsed(line: str) -> None:
    name, *args = shlex.split(line, comments=True)[1:]
    command = cli.commands[name]
    if isinstance(command, click.Group):
        name, *args = args
        command = command.commands[name]
    try:
        command.make_context(name, args)
    except (click.ClickException, UsageError) as error:
        pytest.fail(f"{line}: {error}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the store of the README's example, small and from encoded video."""
    folder = tmp_path_factory.mktemp("readme")
    noise = np.random.default_rng(0)
    (folder / "clips").mkdir()
    for name in ("a.mp4", "b.mp4"):
        frames = noise.integers(0, 255, (24, 48, 64, 3), np.uint8)
        write_video(folder / "clips" / name, frames, fps=12)
    (folder / "tiny_teacher.py").write_text(
        textwrap.dedent(
            """
            import torch

            def build():
                torch.manual_seed(0)
                return torch.nn.Sequential(
                    torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 5)
                )
            """
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = ExtractConfig.model_validate(
            {
                "sources": ["clips"],
                "out": "targets.zarr",
                "teachers": [{"name": "tiny_teacher:build", "options": {"input_size": "32"}}],
                "sampling": {"every": 2},
                "decoders": 1,
            }
        )
        assert extract_targets(config, Console(quiet=True))["ok"] == 2
    return folder


@pytest.mark.slow
def test_the_python_example_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    example = next(
        block for block in blocks(ROOT / "README.md", "python") if "TargetStore.open" in block
    )
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)
    clips, last = names["clips"], names["batch"]
    assert isinstance(last, dict)
    assert sorted(last["name"]) == sorted(clips[0, sample]["name"] for sample in range(4, 8))  # type: ignore[index]
    assert re.match(r"a\.mp4: class \d 0\.\d\d|b\.mp4: class \d 0\.\d\d", capsys.readouterr().out)


@pytest.mark.slow
def test_a_student_loads_into_torchvision_as_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distinit.pipeline.students.student_files import save_student

    (tmp_path / "runs" / "student").mkdir(parents=True)
    torch.manual_seed(0)
    student = distinit.build_student(distinit.StudentOptions(), {"resnet50": 1000}).eval()
    meta = {
        "classes": {"resnet50": [str(k) for k in range(1000)]},
        "clip_length": 8,
        "clip_size": 112,
    }
    save_student(tmp_path / "runs" / "student" / "student.safetensors", student, meta)

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(ROOT / "README.md", "python"):
        if "student.safetensors" in block or "load_student" in block:
            exec(compile(block, "README.md", "exec"), names)
    clip = torch.rand(1, 3, 4, 32, 32)
    model, loaded = names["model"], names["student"]
    assert isinstance(model, torch.nn.Module)
    assert isinstance(loaded, torch.nn.Module)
    with torch.no_grad():
        expected = student(clip)["resnet50"]
        torch.testing.assert_close(model.eval()(clip), expected)
        torch.testing.assert_close(loaded(clip)["resnet50"], expected)
