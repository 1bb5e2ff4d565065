"""A full disk is an error and does not end the process; files that refer to others are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from distinit.pipeline.common.errors import VideoError
from distinit.pipeline.common.hdf5 import STRING, Hdf5Error, Hdf5Writer, open_hdf5
from distinit.pipeline.evaluation import predictions
from distinit.pipeline.evaluation.predictions import Predictions, PredictionsError
from distinit.pipeline.prepared import flow_files as flowfile
from distinit.pipeline.prepared.flow_files import FORMAT, VERSION, read_flow_map

LIMITED = """
import resource
import sys

import numpy as np

from distinit.pipeline.common.hdf5 import Hdf5Writer

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
caught = 0
try:
    with Hdf5Writer(sys.argv[1]) as writer:
        data = writer.file.create_dataset("a", (400_000,), "f4", chunks=(4096,), fletcher32=True)
        for start in range(0, 400_000, 4096):
            data[start : start + 4096] = 1.0
            if "check" in sys.argv:
                writer.check()
except OSError as error:
    caught += 1
    assert error.filename == sys.argv[1]
with Hdf5Writer(sys.argv[1]) as writer:
    writer.file["b"] = np.arange(3)
print("caught", caught)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [9_000, 40_000, 700_000, 1_600_000])
@pytest.mark.parametrize("check", ["check", "at the end"])
def test_a_full_disk(tmp_path: Path, size: int, check: str) -> None:
    path = tmp_path / "x.h5"
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, path, str(size), check],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "caught 1\n", "")
    with h5py.File(path) as file:
        assert file["b"][:].tolist() == [0, 1, 2]


def test_h5py_reads_a_written_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(300, 70))
    with Hdf5Writer(tmp_path / "x.h5", libver="latest") as writer:
        table = writer.file.create_dataset(
            "a", (0, 70), "f8", maxshape=(None, 70), chunks=(16, 70), compression="gzip"
        )
        for row, value in enumerate(values):
            table.resize(row + 1, axis=0)
            table[row] = value
        writer.file.attrs["name"] = "ü"
    with h5py.File(tmp_path / "x.h5") as file:
        np.testing.assert_array_equal(file["a"][:], values)
        assert file.attrs["name"] == "ü"


def test_an_error_in_the_block_is_raised(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Hdf5Writer(tmp_path / "x.h5") as writer:
        writer.file["none"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Hdf5Writer(tmp_path / "nowhere" / "x.h5")


SECRET = b"the reader's own words: not for a report"
TABLES = {"text": (STRING, 1), "numbers": ("f", 2)}


def _external(file: h5py.File, secret: Path, other: Path) -> None:
    file.create_dataset("numbers", (1, 5), "f8", external=[(str(secret), 0, len(SECRET))])


def _external_text(file: h5py.File, secret: Path, other: Path) -> None:
    kind = h5py.string_dtype("utf-8", len(SECRET))
    file.create_dataset("text", (1,), kind, external=[(str(secret), 0, len(SECRET))])


def _virtual(file: h5py.File, secret: Path, other: Path) -> None:
    layout = h5py.VirtualLayout((2, 3), "f8")
    layout[:] = h5py.VirtualSource(str(other), "numbers", (2, 3))
    file.create_virtual_dataset("numbers", layout)


def _external_link(file: h5py.File, secret: Path, other: Path) -> None:
    file["numbers"] = h5py.ExternalLink(str(other), "/numbers")


def _soft_link(file: h5py.File, secret: Path, other: Path) -> None:
    file["away"] = h5py.ExternalLink(str(other), "/")
    file["numbers"] = h5py.SoftLink("/away/numbers")


def _group(file: h5py.File, secret: Path, other: Path) -> None:
    file.create_group("numbers")["numbers"] = np.ones((2, 3))


def _named_type(file: h5py.File, secret: Path, other: Path) -> None:
    file["numbers"] = np.dtype("f8")


def _compound(file: h5py.File, secret: Path, other: Path) -> None:
    file["numbers"] = np.zeros((2, 3), [("a", "f8"), ("b", "i4")])


def _references(file: h5py.File, secret: Path, other: Path) -> None:
    file.create_dataset("numbers", (2, 3), h5py.ref_dtype)


def _other_dimensions(file: h5py.File, secret: Path, other: Path) -> None:
    file["numbers"] = np.zeros(6)


def _numbers_for_text(file: h5py.File, secret: Path, other: Path) -> None:
    file["text"] = np.zeros(6)


def _empty(file: h5py.File, secret: Path, other: Path) -> None:
    file["numbers"] = h5py.Empty("f8")


def _giant(file: h5py.File, secret: Path, other: Path) -> None:
    file.create_dataset("numbers", (10**6, 10**6), "f8", chunks=(10, 10), fletcher32=True)


def _giant_chunk(file: h5py.File, secret: Path, other: Path) -> None:
    file.create_dataset(
        "numbers", (1, 2), "f8", chunks=(2**14, 2**14), maxshape=(None, None), compression="gzip"
    )


def _other_filter(file: h5py.File, secret: Path, other: Path) -> None:
    file.create_dataset("numbers", data=np.ones((20, 20)), chunks=(10, 10), scaleoffset=3)


def _crowd(file: h5py.File, secret: Path, other: Path) -> None:
    for i in range(9):
        file[f"x{i}"] = 1.0


HOSTILE = [_external, _external_text, _virtual, _external_link, _soft_link, _group, _named_type, _compound, _references,
           _other_dimensions, _numbers_for_text, _empty, _giant, _giant_chunk, _other_filter, _crowd]  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__.strip("_"))
def test_a_file_that_refers_to_others_or_has_another_format_is_refused(
    attack: Callable[[h5py.File, Path, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = np.ones((2, 3))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        attack(file, tmp_path / "secret", tmp_path / "other.h5")
    with pytest.raises(Hdf5Error), open_hdf5(tmp_path / "x.h5", TABLES):
        pytest.fail("it was opened")


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__.strip("_"))
@pytest.mark.parametrize(
    "table", ["classes", "videos", "labels", "clip_scores", "features", "flow", "index"]
)
def test_every_reader_refuses_such_a_table(
    table: str,
    attack: Callable[[h5py.File, Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replace one table of a valid file by that of an attack."""
    # An attacker leaves out the digest.
    monkeypatch.setattr(predictions, "Hdf5Writer", lambda path, sealed: Hdf5Writer(path))
    (tmp_path / "secret").write_bytes(SECRET)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["numbers"] = np.ones((2, 3))
    path = tmp_path / "x.h5"
    flow = table in ("flow", "index")
    if flow:
        with h5py.File(path, "w") as file:
            file["flow"], file["index"], file["pts"] = (
                np.zeros((2, 2, 16, 24), "u1"),
                np.arange(3),
                np.arange(3),
            )
            source = {"digest": "d", "size": 1, "mtime_ns": 1, "frames": 3, "width": 9, "height": 9,
                      "time_base": [1, 25], "clock": "pts"}  # fmt: skip
            file["flow"].attrs.update(bound=1.0, clipped=0.0)
            file.attrs.update(
                format=FORMAT, version=VERSION, source=json.dumps(source), options="{}"
            )
    else:
        scores = Predictions.empty(["a"], ["1.mp4"], [0], 2, protocol={}, identity={}, features=3)
        scores.set_scores(0, np.ones((2, 1), np.float32), np.arange(2), 9, features=np.ones((2, 3)))
        scores.write(path)
    read, error = (read_flow_map, VideoError) if flow else (Predictions.read, PredictionsError)
    read(str(path))
    with h5py.File(path, "r+") as file:
        del file[table]
        attack(file, tmp_path / "secret", tmp_path / "other.h5")
        for name in ("numbers", "text"):
            if name in file.keys():  # noqa: SIM118 (a link may lead nowhere)
                file.move(name, table)
    flowfile._maps._tables.clear()
    with pytest.raises(error) as refused:
        read(str(path))
    assert flow or str(path) in str(refused.value)
    assert "reader's own" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n" + b"\xff" * 200, b"PK\3\4", b"text"])
def test_files_of_other_formats_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.h5").write_bytes(content)
    with pytest.raises(PredictionsError, match=r"x\.h5"):
        Predictions.read(tmp_path / "x.h5")
    with pytest.raises(VideoError):
        read_flow_map(str(tmp_path / "x.h5"))
    with pytest.raises(PredictionsError, match=r"nothing\.h5"):
        Predictions.read(tmp_path / "nothing.h5")
    with pytest.raises(PredictionsError):
        Predictions.read(tmp_path)
