"""Encodings against plain float64 arithmetic, and stores that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError, StoreMismatchError
from distinit.pipeline.store import encoding as enc
from distinit.pipeline.store.encoding import Codec, divergence, storable, total_error
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.layout import write_node
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import ExportConfig, InfoConfig, PlainEncoding
from distinit.pipeline.store.verify import verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_info import targets_info
from distinit.tests.store_recipe import read_node


def kl(z: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Return KL(softmax z ‖ softmax decoded) by its definition, in float64."""
    p, q = (np.exp(x.astype(np.float64) - x.max(1, keepdims=True)) for x in (z, decoded))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0).sum(1)


@given(
    st.sampled_from(get_args(PlainEncoding)),
    st.integers(1, 60),
    st.floats(-3, 3),
    st.floats(-2, 4.5),
    st.integers(0, 99),
)
def test_errors_of_logits_are_within_the_rounding(
    name: PlainEncoding, k: int, log_spread: float, log_shift: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    z = (random.normal(0, 10**log_spread, (5, k)) + random.choice([-1, 1]) * 10**log_shift).astype(
        np.float32
    )
    z[0] = z[0, 0]
    codec = Codec("logits", name, k)
    stored = codec.encode(z)
    decoded = codec.decode(stored)
    scale = np.abs(z).max(1)
    assert (
        np.abs(decoded - z).max(1) <= codec.rounding(stored) * 1.001 + 4e-7 * scale + 1e-7
    ).all()
    if name == "int8":
        assert (decoded.argmax(1) == z.argmax(1)).all() or (
            np.abs(decoded.max(1) - z.max(1)) <= 1e-5 * scale + 1e-6
        ).all()
        assert np.ptp(stored["logits"][1:].astype(int), axis=1).max() <= 255


@given(st.floats(-3.5, 1), st.integers(0, 99))
def test_the_error_is_the_kl_divergence(log_error: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    z = random.normal(0, 3, (4, 300)).astype(np.float32)
    # A shift of all logits does not change the softmax.
    decoded = (z + random.normal(0, 10**log_error, z.shape) + 5).astype(np.float32)
    np.testing.assert_allclose(divergence(z, decoded), kl(z, decoded), rtol=2e-3, atol=1e-9)


def test_int8_with_an_offset_is_more_accurate_than_without() -> None:
    z = np.random.default_rng(0).gumbel(0, 2, (500, 1000)).astype(np.float32)
    scale = np.abs(z).max(1, keepdims=True) / 127
    symmetric = divergence(z, np.rint(z / scale) * scale).mean()
    half, full = (
        divergence(z, codec.decode(codec.encode(z)))
        for codec in (Codec("logits", name, 1000) for name in ("float16", "int8"))
    )
    assert full.mean() < 0.8 * symmetric
    assert full.mean() < 5e-4
    assert half.mean() < 5e-6
    parts = [
        (n, enc.error_record(full[a : a + n])) for a, n in ((0, 7), (7, 0), (7, 93), (100, 400))
    ]
    total = total_error(parts)
    assert total["kl_mean"] == pytest.approx(full.mean(), rel=1e-5)
    assert total["kl_p99"] >= np.quantile(full, 0.99, method="higher")


@pytest.mark.parametrize("name", get_args(PlainEncoding))
def test_rows_that_cannot_be_stored_become_fill(name: PlainEncoding) -> None:
    z = np.random.default_rng(0).normal(0, 3, (6, 8)).astype(np.float32)
    z[1, 2], z[2, 0], z[3, 1], z[4, 4] = np.nan, np.inf, -np.inf, 7e4
    assert storable(z).tolist() == [True, False, False, False, False, True]
    codec = Codec("logits", name, 8)
    decoded = codec.decode(codec.encode(z))
    assert np.isnan(decoded[1:5]).all()
    assert np.isfinite(decoded[[0, 5]]).all()
    huge = np.array([[65504, -65504, 0]], np.float32)
    assert np.isfinite(codec.decode(codec.encode(huge))).all()
    assert len(codec.decode(codec.encode(z[:0]))) == 0


@pytest.mark.slow
def test_an_int8_store_reads_as_any_other(make_store: Callable[..., Any], tmp_path: Path) -> None:
    recipe, root = make_store(teachers={"t": 60}, encoding="int8")
    _, wide = make_store("wide.zarr", teachers={"t": 60})
    store = TargetStore.open(root)
    frames = xr.open_zarr(root, group="teachers/t", consolidated=False)
    plain = (frames["logits"] * frames["scale"] + frames["offset"]).values
    errors = []
    for v in store.usable():
        rows = store.frames(int(v))[2]
        z = recipe.logits(int(v), "t")
        np.testing.assert_allclose(store.logits("t", rows), plain[rows], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(
            store.entropy("t", rows), TargetStore.open(wide).entropy("t", rows)
        )
        errors.append(kl(z, store.logits("t", rows)))
    assert np.isnan(plain[np.setdiff1d(np.arange(len(plain)), store.committed_rows("t"))]).all()
    info = targets_info(InfoConfig(store=str(root)), Console(quiet=True))["teachers"][0]
    assert info["encoding"] == "int8"
    assert info["encoding_error"]["kl_mean"] == pytest.approx(
        np.concatenate(errors).mean(), rel=1e-3
    )
    assert info["encoding_error"]["kl_p99"] >= np.quantile(np.concatenate(errors), 0.99) * 0.999
    assert list(verify(root, load_index(root))) == []
    targets_export(ExportConfig(store=str(root), out=str(tmp_path / "x.h5")), Console(quiet=True))
    with h5py.File(tmp_path / "x.h5") as file:
        exported = np.concatenate(
            [store.logits("t", store.frames(int(v))[2]) for v in store.usable()]
        )
        np.testing.assert_allclose(file["teachers/t/logits"][:], exported, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", get_args(PlainEncoding))
def test_zarrs_other_codec_pipeline_reads_the_same(
    make_store: Callable[..., Any], encoding: PlainEncoding
) -> None:
    """The pipeline that users may enable misread shards without checksums; those of a store have
    checksums."""
    if not hasattr(pytest.importorskip("zarr.core.codec_pipeline"), "FusedCodecPipeline"):
        pytest.skip("zarr before 3.3")
    root = make_store(teachers={"t": 60}, encoding=encoding)[1]
    with zarr.config.set({"codec_pipeline.path": "zarr.core.codec_pipeline.FusedCodecPipeline"}):
        group = zarr.open_group(root, mode="r")
        arrays = {
            name: group[f"teachers/t/{name}"][:] for name in (*enc.arrays_of(encoding), "entropy")
        }
        parts = [group[f"teachers/t/{name}"][10:700] for name in arrays]
    store = TargetStore.open(root)
    rows = store.committed_rows("t")
    for (name, values), part in zip(arrays.items(), parts, strict=True):
        np.testing.assert_array_equal(values[rows], store.read_stored("t", name, rows))
        np.testing.assert_array_equal(part, values[10:700])


def test_the_encoding_is_part_of_a_teacher_and_an_unknown_one_is_refused(
    make_store: Callable[..., Any],
) -> None:
    recipe, root = make_store(encoding="int8")
    attributes = {"name": "t", "identity": {"w": 1}, "run": recipe.run}
    with StoreWriter(root, sampling=recipe.sampling) as writer:
        # By default the encoding is that of the store.
        writer.add_teacher("t", ["c"] * 10, attributes)
        with pytest.raises(
            StoreMismatchError,
            match=r'teacher \'t\': encoding is "int8" in the store, "float16" in',
        ):
            writer.add_teacher("t", ["c"] * 10, attributes, encoding="float16")
        node = read_node(root / "teachers/t/zarr.json")
        write_node(root, "teachers/t", {**node, "encoding": "int4"})
    with pytest.raises(
        StoreError,
        match=r"teachers/t/zarr.json: encoding 'int4', this distinit reads float16, int8",
    ):
        TargetStore.open(root)


@pytest.mark.slow
def test_verify_finds_rows_of_another_frame_under_either_encoding(
    make_store: Callable[..., Any],
) -> None:
    """A shard whose rows are shifted by one, committed as if it were right."""
    for name in get_args(PlainEncoding):
        recipe, root = make_store(f"{name}.zarr", encoding=name, videos=range(4))
        node_path = root / "commits/teachers/t/000000"
        node = read_node(node_path / "zarr.json")
        with StoreWriter(root, sampling=recipe.sampling) as writer:
            z = np.concatenate([recipe.logits(v, "t") for v in range(4)])
            rolled = Codec("logits", name, 10).encode(np.roll(z, 1, axis=0))["logits"]
            zarr.open_array(root / "teachers/t/logits", mode="r+")[: len(z)] = rolled
            file = "teachers/t/logits/c/0/0"
            data = (root / file).read_bytes()
            from distinit.pipeline.store.digests import digest_bytes

            node["files"][file] = {"size": len(data), "blake2b": digest_bytes(data)}
            write_node(writer.root, "commits/teachers/t/000000", node)
        findings = [str(f) for f in verify(root, load_index(root))]
        assert len(findings) == 1
        assert "nats off its logits" in findings[0]
