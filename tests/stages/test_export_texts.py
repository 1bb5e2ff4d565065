"""Texts of an exported HDF5 file: one length, checksums, and no room for what they are shorter than
the longest."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from distinit.pipeline.common.hdf5 import Hdf5Writer
from distinit.stages.targets_export import _text


@pytest.mark.parametrize("longest", [1, 60, 4000])
@pytest.mark.parametrize("count", [0, 1, 9000])
def test_one_long_path_does_not_multiply_the_file(count: int, longest: int, tmp_path: Path) -> None:
    texts = [f"v {i} é.mp4".encode() for i in range(count)]
    texts[count // 2 : count // 2 + 1] = [b"x" * longest] * min(count, 1)
    with Hdf5Writer(tmp_path / "x.h5", libver=("v110", "v110")) as writer:
        _text(writer.file, "path", texts)
    assert (tmp_path / "x.h5").stat().st_size < 4000 + 2 * longest + 64 * count
    with h5py.File(tmp_path / "x.h5") as file:
        table = file["path"]
        assert [bytes(text) for text in table[:]] == texts
        assert table.dtype == np.dtype(f"S{max([1, *map(len, texts)])}")
        assert bool(table.fletcher32) == (count > 0)


def test_a_bit_flipped_in_a_text_is_found(tmp_path: Path) -> None:
    with Hdf5Writer(tmp_path / "x.h5", libver=("v110", "v110")) as writer:
        _text(writer.file, "path", [f"video {i}".encode() for i in range(500)])
    with h5py.File(tmp_path / "x.h5") as file:
        place = file["path"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "x.h5").read_bytes())
    content[place.byte_offset + place.size // 2] ^= 4
    (tmp_path / "x.h5").write_bytes(content)
    with h5py.File(tmp_path / "x.h5") as file, pytest.raises(OSError, match=r"filter|checksum"):
        _ = file["path"][:]
