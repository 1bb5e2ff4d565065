"""The notebooks of examples/ run from the first to the last cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import distinit

NOTEBOOK = Path(distinit.__file__).resolve().parent / "examples" / "quickstart.ipynb"

pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="an installed copy has no examples")


def outputs(notebook: Any) -> list[dict[str, Any]]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.slow
def test_the_quickstart_runs_and_is_stored_with_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # as the command line has it
    stored = nbformat.read(NOTEBOOK, 4)
    run = nbformat.read(NOTEBOOK, 4)
    for cell in run.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    client = nbclient.NotebookClient(
        run, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    made = list(tmp_path.glob("distinit-*/student/student.safetensors"))
    assert len(made) == 1
    for notebook in (stored, run):
        texts = [output.get("data", {}).get("text/plain", "") for output in outputs(notebook)]
        assert any("complete = True" in text and "ok = 12" in text for text in texts)
        assert any(text.startswith("extracting: 141/141 frames") for text in texts)
        assert not [output for output in outputs(notebook) if output.output_type == "error"]
        assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    # Frames, frames with classes, entropies, clips, loss.
    assert pictures(stored) == pictures(run) == 5
