"""Columns are read from their files as zarr reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from distinit.pipeline.common.errors import StoreError
from distinit.pipeline.store.columns import Column

ROWS, CHUNK = 23, 5
RANGES = [(0, 23), (0, 0), (3, 5), (4, 11), (10, 15), (22, 23)]
PACKINGS: dict[str, list[Any]] = {
    "neither": [],
    "zstd": [ZstdCodec()],
    "crc32c": [Crc32cCodec()],
    "both": [ZstdCodec(), Crc32cCodec()],
}


def column(folder: Path) -> Column:
    return Column(folder, "a/column", json.loads((folder / "zarr.json").read_bytes()))


def make(folder: Path, kind: str, packing: str, **options: Any) -> zarr.Array:
    random = np.random.default_rng(5)
    row = {"float32": (3,), "uint8": (16,)}.get(kind, ())
    values = random.integers(0, 100, (ROWS, *row)).astype(np.float64)
    array = zarr.create_array(
        folder,
        shape=values.shape,
        chunks=(CHUNK, *row),
        dtype=str if kind == "str" else kind,
        fill_value={"str": "", "float64": np.nan}.get(kind, 0),
        compressors=PACKINGS[packing],
        **options,
    )
    if kind == "str":
        array[:] = np.array([f"é{value:.0f}" * (i % 4) for i, value in enumerate(values)], object)
    else:
        array[:] = values.astype(kind)
    return array


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", ["str", "float64", "float32", "uint8", "int64"])
def test_any_range_is_read_as_zarr_reads_it(tmp_path: Path, kind: str, packing: str) -> None:
    array = make(tmp_path / "a", kind, packing)
    # Rows of a missing chunk have the fill value.
    (tmp_path / "a" / "c" / "/".join("1" + "0" * (array.ndim - 1))).unlink()
    opened = column(tmp_path / "a")
    assert opened.shape == array.shape
    for start, stop in RANGES:
        expected = np.asarray(array[start:stop])
        actual = opened.read(start, stop)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)


def test_big_endian_numbers_are_read(tmp_path: Path) -> None:
    array = make(
        tmp_path / "a",
        "int64",
        "both",
        serializer={"name": "bytes", "configuration": {"endian": "big"}},
    )
    np.testing.assert_array_equal(column(tmp_path / "a").read(0, ROWS), array[:])


@pytest.mark.parametrize("packing", ["crc32c", "both"])
@pytest.mark.parametrize("kind", ["str", "int64"])
def test_a_flipped_bit_names_its_chunk(tmp_path: Path, kind: str, packing: str) -> None:
    make(tmp_path / "a", kind, packing)
    file = tmp_path / "a" / "c" / "2"
    intact = file.read_bytes()
    for position in range(0, len(intact), 7):
        flipped = bytes([intact[position] ^ 4])
        file.write_bytes(intact[:position] + flipped + intact[position + 1 :])
        with pytest.raises(StoreError, match="a/column/c/2"):
            column(tmp_path / "a").read(0, ROWS)
        assert len(column(tmp_path / "a").read(0, 2 * CHUNK)) == 2 * CHUNK


@pytest.mark.parametrize("kind", ["str", "int64"])
def test_a_chunk_of_other_rows_is_refused(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "a", kind, "neither")
    file = tmp_path / "a" / "c" / "0"
    intact = file.read_bytes()
    # zarr also ignores bytes after the last text.
    for data in (b"", intact[:-1], *([intact + intact] if kind == "int64" else [])):
        file.write_bytes(data)
        with pytest.raises(StoreError, match="a/column/c/0"):
            column(tmp_path / "a").read(0, 1)
