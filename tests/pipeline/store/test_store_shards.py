"""Shard files that are written without zarr-python have its bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from distinit.pipeline.store.layout import ArraySpec, create_array, shard_file
from distinit.pipeline.store.shards import ShardedRows, encode_shard

ROWS, CHUNK = 48, 16
NAN = float("nan")
KINDS: list[tuple[str, float, tuple[int, ...]]] = [
    ("int32", -1, ()),
    ("int64", 0, ()),
    ("uint64", 0, ()),
    ("uint8", 0, (5,)),
    ("int8", 0, (3, 4)),
    ("float16", NAN, (7,)),
    ("float32", NAN, ()),
    ("float32", 0.0, (2,)),
    ("float64", 1.5, (2,)),
]


def by_zarr(folder: Path, spec: ArraySpec, values: np.ndarray) -> bytes | None:
    create_array(folder, spec, ROWS, ROWS)
    whole = np.full((ROWS, *spec.row), spec.fill, spec.dtype)
    whole[: len(values)] = values
    zarr.open_array(folder / spec.path, mode="r+")[:] = whole
    path = shard_file(folder, spec, 0)
    return path.read_bytes() if path.exists() else None


@st.composite
def shards(draw: st.DrawFn) -> tuple[ArraySpec, np.ndarray]:
    """An array and rows of its only shard: random values, chunks of fill, zeros of both signs."""
    dtype, fill, row = draw(st.sampled_from(KINDS))
    count = draw(st.integers(0, ROWS))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    values: Any = random.normal(0, 50, (count, *row)).astype(dtype)
    for first in range(0, count, CHUNK):
        constant = draw(st.sampled_from([None, fill, 0.0, -0.0]))
        if constant is not None:
            values[first : first + CHUNK] = constant
    return ArraySpec("a", dtype, fill, ("frame", *"xy"[: len(row)]), row, CHUNK, True), values


@settings(deadline=None, max_examples=60)
@given(shards())
def test_a_shard_has_the_bytes_that_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, shard: tuple[ArraySpec, np.ndarray]
) -> None:
    spec, values = shard
    folder = tmp_path_factory.mktemp("shard")
    data = encode_shard(values, float(spec.fill), shard_rows=ROWS, chunk_rows=CHUNK)
    assert data == by_zarr(folder, spec, values)
    if data is not None:
        reader = ShardedRows(
            folder / spec.path, json.loads((folder / spec.path / "zarr.json").read_text())
        )
        np.testing.assert_array_equal(reader.read(np.arange(len(values))), values)
