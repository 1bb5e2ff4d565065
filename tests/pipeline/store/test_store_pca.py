"""Compare exports in int8 and pca:D with NumPy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from pydantic import ValidationError

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreMismatchError, UsageError
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.reencode import fit_pca, sample_rows
from distinit.pipeline.store.store_options import (
    BrowseConfig,
    ExportConfig,
    InfoConfig,
    MergeConfig,
)
from distinit.pipeline.store.verify import verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages.targets_browse import targets_browse
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_info import targets_info
from distinit.stages.targets_merge import targets_merge
from distinit.tests.store_recipe import Recipe, read_node

QUIET = Console(quiet=True)
WIDTH = 24
FEATURES = {"features": {"f": WIDTH}, "teachers": {"t": 10}, "shard_rows": 256}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ten videos with logits and features."""
    recipe = Recipe(videos=range(10), **FEATURES)  # type: ignore[arg-type]
    return recipe.make(tmp_path_factory.mktemp("pca") / "s.zarr")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of `source` in pca:6."""
    out = tmp_path_factory.mktemp("pca") / "p.zarr"
    targets_export(ExportConfig(store=str(source), out=str(out), encoding="pca:6"), QUIET)
    return out


def test_the_basis_is_that_of_a_singular_value_decomposition(source: Path) -> None:
    store = TargetStore.open(source)
    everything = store.usable()
    rows = sample_rows(store, "f", 120, everything)
    assert len(rows) >= 120
    assert len(np.unique(rows)) == len(rows)
    assert set(store.read_table("video", rows)) == set(everything)
    x = store.outputs("f", rows).astype(np.float64)
    codec = fit_pca(store, "f", 6, everything)
    assert codec.basis is not None
    assert codec.mean is not None
    right = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:6]
    np.testing.assert_allclose(np.abs((codec.basis * right).sum(1)), 1, atol=1e-5)
    np.testing.assert_allclose(codec.basis @ codec.basis.T, np.eye(6), atol=1e-5)
    np.testing.assert_allclose(codec.mean, x.mean(0), atol=1e-6)


def test_the_basis_does_not_depend_on_the_order_of_videos_or_shards(
    source: Path, make_store: Callable[..., Any]
) -> None:
    order = [7, 2, 9, 0, 4, 3, 8, 1, 6, 5]
    other = TargetStore.open(make_store(videos=order, **{**FEATURES, "shard_rows": 512})[1])
    first = TargetStore.open(source)
    a, b = (fit_pca(store, "f", 6, store.usable()) for store in (first, other))
    np.testing.assert_array_equal(a.basis, b.basis)
    np.testing.assert_array_equal(a.mean, b.mean)


def test_rows_are_mean_plus_coefficients(source: Path, exported: Path) -> None:
    before, after = TargetStore.open(source), TargetStore.open(exported)
    record = after.teacher("f")
    assert (record.encoding, record.width, record.output) == ("pca:6", WIDTH, "features")
    assert after.teacher("t").encoding == "float16"
    basis, mean = record.codec.basis, record.codec.mean
    assert basis is not None
    assert mean is not None
    errors, decoded = [], []
    for v in before.usable():
        w = next(w for w in range(after.n_videos) if after.place(w) == before.place(int(v)))
        x = before.outputs("f", before.frames(int(v))[2]).astype(np.float64)
        y = after.outputs("f", after.frames(w)[2])
        projected = (x - mean) @ basis.T.astype(np.float64) @ basis + mean
        # The difference is the rounding to int8.
        assert np.abs(y - projected).max() < 0.1
        errors.append(1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))
        decoded.append(y)
    error = after.encoding_error("f")
    assert error["cosine_mean"] == pytest.approx(np.concatenate(errors).mean(), rel=1e-4)
    assert error["cosine_p99"] >= np.quantile(np.concatenate(errors), 0.99)
    np.testing.assert_allclose(after.statistics("f")[0], np.concatenate(decoded).mean(0), atol=1e-6)
    assert list(verify(exported, load_index(exported))) == []
    assert read_node(exported / "zarr.json")["requires"] == ["features", "pca"]


@pytest.mark.slow
def test_too_many_components_are_refused_with_the_largest_allowed_number(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    # The video has 20 rows.
    root = make_store(videos=[0], features={"f": WIDTH})[1]
    options = {"store": str(root), "out": str(tmp_path / "x.zarr")}
    with pytest.raises(UsageError, match=r"pca:11.*pca:10"):
        targets_export(ExportConfig(**options, encoding="pca:11"), QUIET)
    assert not (tmp_path / "x.zarr").exists()
    targets_export(ExportConfig(**options, encoding="pca:10"), QUIET)
    with pytest.raises(UsageError, match=r"x\.zarr"):
        targets_export(ExportConfig(**options, encoding="pca:9"), QUIET)
    targets_export(ExportConfig(**options, encoding="pca:10"), QUIET)


@pytest.mark.parametrize(
    ("encoding", "change"),
    [
        ("pca:0", {}),
        ("int4", {}),
        ("pca:4", {"teachers": ["t"]}),
        ("pca:25", {}),
        ("int8", {"out": "x.h5"}),
    ],
)
def test_invalid_encodings_are_refused(
    source: Path, tmp_path: Path, encoding: str, change: dict[str, Any]
) -> None:
    options = {"store": str(source), "out": "x.zarr", **change, "encoding": encoding}
    options["out"] = f"{tmp_path}/{options['out']}"
    with pytest.raises((UsageError, ValidationError), match=encoding):
        targets_export(ExportConfig(**options), QUIET)
    assert not list(tmp_path.iterdir())


def test_a_lossy_encoding_cannot_be_converted(exported: Path, tmp_path: Path) -> None:
    for encoding in ("float16", "pca:4", "int8"):
        options = ExportConfig(store=str(exported), out=str(tmp_path / "x.zarr"), encoding=encoding)
        with pytest.raises(UsageError, match="'f'"):
            targets_export(options, QUIET)


def test_logits_and_features_in_int8(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.zarr"
    targets_export(ExportConfig(store=str(source), out=str(out), encoding="int8"), QUIET)
    before, after = TargetStore.open(source), TargetStore.open(out)
    for name in ("t", "f"):
        rows = before.rows_of(before.usable()), after.rows_of(after.usable())
        x, y = before.outputs(name, rows[0]), after.outputs(name, rows[1])
        assert (np.abs(x - y).max(1) <= np.ptp(x, axis=1) / 255 * 0.51).all()
    np.testing.assert_array_equal(before.entropy("t", rows[0]), after.entropy("t", rows[1]))
    assert 0 < after.encoding_error("t")["kl_mean"] < 1e-2
    assert list(verify(out, load_index(out))) == []


@pytest.mark.slow
def test_a_store_in_pca_grows_and_merges_with_its_basis(
    exported: Path, source: Path, tmp_path: Path
) -> None:
    def export(videos: str, store: Path, name: str) -> str:
        (tmp_path / "list.txt").write_bytes(os.fsencode(videos))
        out = str(tmp_path / name)
        options = ExportConfig(
            store=str(store), out=out, videos_from=str(tmp_path / "list.txt"), shard_rows=256
        )
        targets_export(options, QUIET)
        return out

    paths = [Recipe.path(v).replace("%FF", "\udcff") for v in range(10)]
    a, b = (
        export("\n".join(part) + "\n", exported, name)
        for part, name in ((paths[:5], "a.zarr"), (paths[5:], "b.zarr"))
    )
    merged = str(tmp_path / "ab.zarr")
    targets_merge(MergeConfig(parts=[a, b], out=merged), QUIET)
    whole, store = TargetStore.open(exported), TargetStore.open(merged)
    np.testing.assert_array_equal(store.teacher("f").codec.basis, whole.teacher("f").codec.basis)
    np.testing.assert_allclose(store.statistics("f")[0], whole.statistics("f")[0], atol=1e-6)
    rows = store.rows_of(store.usable()), whole.rows_of(whole.usable())
    np.testing.assert_array_equal(store.outputs("f", rows[0]), whole.outputs("f", rows[1]))
    record = store.teacher("f")
    with StoreWriter(Path(merged), sampling=store.attributes["sampling"]) as writer:
        attributes = {"identity": record.identity, "run": record.run}
        writer.add_teacher("f", [], attributes, output="features", width=WIDTH)
    other = tmp_path / "other.zarr"
    (tmp_path / "list.txt").write_bytes(os.fsencode("\n".join(paths[5:]) + "\n"))
    targets_export(
        ExportConfig(store=str(source), out=str(other), videos_from=str(tmp_path / "list.txt"),
                      encoding="pca:6", shard_rows=256), QUIET
    )  # fmt: skip
    with pytest.raises(StoreMismatchError, match="basis"):
        targets_merge(MergeConfig(parts=[a, str(other)], out=str(tmp_path / "no.zarr")), QUIET)


def test_info_browse_and_hdf5_know_features(exported: Path, tmp_path: Path) -> None:
    info = targets_info(InfoConfig(store=str(exported)), QUIET)
    assert json.loads(json.dumps(info)) == info
    teacher = next(t for t in info["teachers"] if t["name"] == "f")
    assert (teacher["output"], teacher["width"], teacher["encoding"]) == (
        "features",
        WIDTH,
        "pca:6",
    )
    assert 0 < teacher["encoding_error"]["cosine_mean"] < 1
    targets_browse(BrowseConfig(store=str(exported), out=str(tmp_path), sample=1), QUIET)
    page = (tmp_path / "browse.html").read_text()
    assert f"f ({WIDTH} features in pca:6)" in page
    store, file = TargetStore.open(exported), tmp_path / "x.h5"
    # The second export recognizes the finished file.
    for _ in range(2):
        targets_export(ExportConfig(store=str(exported), out=str(file)), QUIET)
    with h5py.File(file) as tables:
        expected = store.outputs("f", store.rows_of(store.usable())).astype(np.float16)
        np.testing.assert_array_equal(tables["teachers/f/features"][:], expected)
        assert set(tables["teachers/f"]) == {"features"}
