"""Limits of the system are raised where possible, and otherwise named in an error."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

START = """
import resource, sys
from distinit.pipeline.common.dask_workers import cluster
from distinit.pipeline.common.errors import DistInitError

if __name__ == "__main__":
    try:
        with cluster(2, None) as client:
            print(sorted(client.run(lambda: 7).values()))
    except DistInitError as error:
        sys.exit(f"error: {error}")
"""


@pytest.mark.cluster
@pytest.mark.parametrize(("soft", "hard"), [(40, 40), (90, 90), (40, 4096)])
def test_workers_raise_the_limit_of_open_files_or_name_it(
    soft: int, hard: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    script = tmp_path_factory.mktemp("start") / "start.py"
    script.write_text(START)
    process = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    if hard == 4096:
        assert (process.returncode, process.stdout.split()) == (0, ["[7,", "7]"])
        return
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "--workers 2" in line
    assert f" {hard};" in line
