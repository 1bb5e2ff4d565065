"""A file that cannot be written to its end is an error, and the process goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from distinit.pipeline.hdf5 import Hdf5Writer

LIMITED = """
import resource
import sys

import numpy as np

from distinit.pipeline.hdf5 import Hdf5Writer

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
caught = 0
try:
    with Hdf5Writer(sys.argv[1]) as writer:
        data = writer.file.create_dataset("a", (400_000,), "f4", chunks=(4096,), fletcher32=True)
        for at in range(0, 400_000, 4096):
            data[at : at + 4096] = 1.0
            if "check" in sys.argv:
                writer.check()
except OSError as error:
    caught += 1
    assert error.filename == sys.argv[1]
with Hdf5Writer(sys.argv[1]) as writer:
    writer.file["b"] = np.arange(3)
print("caught", caught)
"""


@pytest.mark.parametrize("size", [9_000, 40_000, 700_000, 1_600_000])
@pytest.mark.parametrize("check", ["check", "at the end"])
def test_no_room(tmp_path: Path, size: int, check: str) -> None:
    path = tmp_path / "x.h5"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path, str(size), check], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "caught 1\n", "")
    with h5py.File(path) as file:
        assert file["b"][:].tolist() == [0, 1, 2]


def test_what_is_written_is_read_by_h5py(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(300, 70))
    with Hdf5Writer(tmp_path / "x.h5", libver="latest") as writer:
        grown = writer.file.create_dataset("a", (0, 70), "f8", maxshape=(None, 70), chunks=(16, 70), compression="gzip")
        for row, value in enumerate(values):
            grown.resize(row + 1, axis=0)
            grown[row] = value
        writer.file.attrs["of"] = "ü"
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["a"][:], values)
        assert file.attrs["of"] == "ü"


def test_an_error_inside_is_the_one_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Hdf5Writer(tmp_path / "x.h5") as writer:
        writer.file["none"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Hdf5Writer(tmp_path / "nowhere" / "x.h5")
