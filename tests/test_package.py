"""The installed package: the content of the wheel, the cost of an import, and the public names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import distinit
from distinit.stages import STAGES

ROOT = Path(distinit.__file__).resolve().parent
PACKAGE_FOLDERS = ("conf", "pipeline", "stages")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(),
    reason="the tests run on an installed copy, not on the tree",
)


def python(code: str, cwd: Path) -> str:
    """Return the output of a new interpreter in another folder."""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return process.stdout.strip()


def test_the_wheel_holds_every_file_of_the_tree(tmp_path: Path) -> None:
    """The wheel is built from a copy of the tracked tree, so that files of other builds cannot hide
    a gap."""
    tree = tmp_path / "a-b"
    tracked = [
        *ROOT.glob("*.py"),
        ROOT / "pyproject.toml",
        ROOT / "README.md",
        ROOT / "LICENSE",
        ROOT / "py.typed",
    ]
    for folder in PACKAGE_FOLDERS:
        tracked += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    tracked = [path for path in tracked if "__pycache__" not in path.parts]
    for path in tracked:
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)

    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    (tree / "dist").mkdir()
    name = python(build, tree).splitlines()[-1]
    with zipfile.ZipFile(tree / "dist" / name) as wheel:
        members = {member for member in wheel.namelist() if member.startswith("distinit/")}

    expected = {
        f"distinit/{path.relative_to(ROOT).as_posix()}"
        for path in tracked
        if path.suffix == ".py"
        or path.name == "py.typed"
        or {"conf", "templates"} & set(path.relative_to(ROOT).parts)
    }
    assert members == expected
    with zipfile.ZipFile(tree / "dist" / name) as wheel:
        metadata = wheel.read(f"distinit-{distinit.__version__}.dist-info/METADATA").decode()
        licenses = [member for member in wheel.namelist() if "/licenses/" in member]
    assert f"Version: {distinit.__version__}" in metadata
    assert {Path(name).name for name in licenses} == {"LICENSE", "NOTICE"}


def test_lower_bounds_are_the_versions_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # Tools of lint, documentation and builds have no tested lower bound.
    tools = {
        "ruff",
        "mypy",
        "import-linter",
        "sphinx",
        "myst-nb",
        "furo",
        "types-PyYAML",
        "setuptools",
        "wheel",
        "distinit",
    }
    requirements = [
        Requirement(text)
        for text in sum(project["optional-dependencies"].values(), project["dependencies"])
    ]
    bounds = {
        item.name: Version(next(iter(item.specifier)).version)
        for item in requirements
        if item.name not in tools
    }
    lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = [Requirement(line) for line in lines if not line.startswith("#")]
    for minor in (11, 12, 13):
        environment = {"python_version": f"3.{minor}"}
        tested = {
            item.name: Version(next(iter(item.specifier)).version)
            for item in oldest
            if item.marker is None or item.marker.evaluate(environment)
        }
        assert tested.keys() == bounds.keys()
        assert all(tested[name] >= bound for name, bound in bounds.items())
        assert tested == bounds or minor > 11
        assert f"Programming Language :: Python :: 3.{minor}" in project["classifiers"]


def test_importing_and_help_do_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys, distinit, distinit.cli\n"
        "heavy = {'torch', 'av', 'zarr', 'numpy', 'h5py'} & set(sys.modules)\n"
        "print(sorted(heavy), bool(distinit.__version__))"
    )
    assert python(code, tmp_path) == "[] True"
    help_code = (
        "import sys\nfrom distinit.cli import cli\n"
        "targets = [['targets', name] for name in cli.commands['targets'].commands]\n"
        "for words in [*([name] for name in cli.commands), *targets]:\n"
        "    cli.main([*words, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'av', 'zarr', 'numpy', 'h5py', 'yaml', 'rich', 'jinja2'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", help_code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "--store" in done.stdout
    assert done.stderr.strip() == "[]"


def test_modules_of_decoding_processes_do_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nimport distinit.pipeline.video.pool.worker, distinit.pipeline.video.pool.decode_pool\n"
        "import distinit.pipeline.prepared.make_copy\n"
        "import distinit.pipeline.common.config, distinit.pipeline.common.console\nprint('torch' in sys.modules)"
    )
    assert python(code, tmp_path) == "False"


def test_every_public_name_loads_and_is_documented() -> None:
    stages = {name.replace("-", "_") for name in STAGES if not name.startswith("targets-")}
    assert sorted(distinit.__all__) == sorted({*distinit._MODULES, *stages})
    for name in distinit.__all__:
        assert getattr(distinit, name).__doc__, name
        assert name in dir(distinit)
    with pytest.raises(AttributeError, match="no_such_name"):
        distinit.no_such_name  # noqa: B018


def test_python_m_distinit_runs_from_any_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distinit", "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert re.fullmatch(
        rf"distinit,? (version )?{re.escape(distinit.__version__)}", done.stdout.strip()
    )
    assert done.returncode == 0
