"""The script of GPU measurements keeps what is done, records what fails, and continues."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distinit.tests.conftest import TinyStore

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "speed" / "gpu.py"


def run(out: Path, videos: Path, *words: str) -> tuple[int, str]:
    command = [sys.executable, str(GPU), "--videos", str(videos), "--device", "cpu", "--small"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


def record(out: Path, step: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{step}.json").read_text())
    return found


@pytest.mark.slow
def test_steps_are_recorded_and_done_ones_are_skipped(
    tiny_store: TinyStore, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status, _ = run(out, tiny_store.videos, "--out", str(out), "--steps", "train8", "copies")
    assert status == 1
    failed = record(out, "train8")
    assert (failed["status"], "speed.zarr" in failed["error"]) == ("failed", True)
    copies = record(out, "copies")
    assert copies["status"] == "done"
    assert len(list((out / "copies").rglob("*.mp4"))) == 12

    (out / "speed.zarr").symlink_to(tiny_store.path)
    status, _ = run(out, tiny_store.videos, "--resume", str(out), "--steps", "copies", "train8")
    assert status == 0
    assert record(out, "copies") == copies
    (row,) = record(out, "train8")["result"]["rows"]
    rates = row["clips_per_s"]
    assert row["real_over_at_once"] == pytest.approx(rates["real"] / rates["at once"])
