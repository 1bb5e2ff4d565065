"""The documentation agrees with the code: the CLI reference, examples in Python, the layout."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import distinit
from distinit.tests.conftest import TinyStore

ROOT = Path(distinit.__file__).resolve().parent
DOCS = ROOT / "docs"

# Names in the code that CONTRIBUTING.md refers to.
NAMES = {
    "pipeline/teachers/teacher.py": ["_BY_NAME"],
    "pipeline/teachers/loaded_model.py": ["LoadedModel"],
    "pipeline/teachers/teacher_options.py": ["TeacherSpec"],
    "pipeline/students/student_options.py": ["BUILTIN_ARCHITECTURES"],
    "pipeline/evaluation/listing.py": ["Listing"],
    "pipeline/evaluation/labels.py": ["load_labels"],
    "pipeline/training/distillation_options.py": ["Loss", "LOSSES"],
    "pipeline/training/losses.py": ["HeadLoss"],
}

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="an installed copy has no docs")


def test_the_cli_reference_is_what_help_prints() -> None:
    written = runpy.run_path(str(DOCS / "write_cli_reference.py"))["reference"]()

    assert (DOCS / "cli.md").read_text(encoding="utf-8") == written, "run: make docs"


def test_every_package_has_a_line_in_contributing_and_architecture() -> None:
    packages = {f"pipeline/{path.parent.name}/" for path in ROOT.glob("pipeline/*/__init__.py")}
    layout = set(
        re.findall(
            r"^\| `([\w/]+/|\w+\.py)` \|",
            (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    )
    assert packages <= layout
    assert all((ROOT / name).exists() for name in layout)
    layers = (DOCS / "architecture.md").read_text(encoding="utf-8")
    assert all(f"`{name.split('/')[1]}`" in layers for name in packages)


def test_files_and_names_of_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = set(re.findall(r"[`(]((?:pipeline|benchmarks|tests|docs)/[\w/.-]+\.\w+)", text))
    assert len(files) > 5
    assert not [name for name in files if not (ROOT / name).is_file()]
    for file, names in NAMES.items():
        for name in names:
            assert f"`{name}`" in text
            assert re.search(rf"^(def |class )?{name}\b", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", ["architecture", "getting-started", "concepts"])
def test_examples_in_python_run(
    page: str,
    tiny_store: TinyStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "targets.zarr").symlink_to(tiny_store.path)
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), {})
        printed = capsys.readouterr().out.splitlines()
        # A comment after a print gives its output.
        commented = re.findall(r"^print\(.*\)  # (?:.*: )?(\[.*\])$", block, re.MULTILINE)
        for line, expected in zip(printed, commented, strict=False):
            np.testing.assert_allclose(
                np.fromstring(line.strip("[]"), sep=" "),
                np.fromstring(expected.strip("[]"), sep=" "),
                atol=0.011,
            )
