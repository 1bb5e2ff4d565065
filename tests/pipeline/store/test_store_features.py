"""Teachers whose output is features, in stores of format version 2."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from distinit.pipeline.common.errors import StoreError, StoreMismatchError, UsageError
from distinit.pipeline.store.digests import digest_bytes
from distinit.pipeline.store.encoding import Codec, cosine_error
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.layout import write_node
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.verify import verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.tests.store_recipe import Recipe, read_node

ARTIFACTS = Path(__file__).parents[2] / "data" / "v01.zip"
WIDTH = 24


@pytest.fixture(scope="module", params=["float16", "int8"])
def stored(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A recipe and its store, with one teacher of logits and one of features."""
    recipe = Recipe(
        videos=range(8),
        shard_rows=256,
        features={"t.features": WIDTH},
        features_encoding=request.param,
    )
    return recipe, recipe.make(tmp_path_factory.mktemp("features") / "s.zarr")


def everything(recipe: Any, store: TargetStore) -> np.ndarray:
    """Return the original features of a store, in the order of `rows_of(usable())`."""
    return np.concatenate([recipe.logits(int(v), "t.features") for v in store.usable()])


def test_features_are_read_as_plain_zarr_has_them(stored: tuple[Any, Path]) -> None:
    recipe, root = stored
    store = TargetStore.open(root)
    rows = store.rows_of(store.usable())
    features = everything(recipe, store)
    decoded = store.outputs("t.features", rows)
    group = zarr.open_group(root, mode="r")["teachers/t.features"]
    plain = group["features"][:][rows].astype(np.float32)
    if recipe.features_encoding == "int8":
        assert np.ptp(group["features"][:][rows].astype(int), axis=1).max() <= 255
        plain = plain * group["scale"][:][rows, None] + group["offset"][:][rows, None]
    np.testing.assert_allclose(decoded, plain, atol=1e-6)
    assert np.abs(decoded - features).max() < (
        0.01 if recipe.features_encoding == "float16" else 0.06
    )
    assert "entropy" not in group
    assert "class" not in group
    record = store.teacher("t.features")
    assert (record.output, record.width, record.classes) == ("features", WIDTH, ())
    assert store.teacher("t").output == "logits"
    a, b = features.astype(np.float64), decoded.astype(np.float64)
    cosine = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    assert store.encoding_error("t.features")["cosine_mean"] == pytest.approx(
        (1 - cosine).mean(), rel=1e-3, abs=1e-10
    )
    assert list(verify(root, load_index(root))) == []


def test_statistics_are_those_of_all_rows(stored: tuple[Any, Path], tmp_path: Path) -> None:
    root = stored[1]
    store = TargetStore.open(root)
    for name in ("t", "t.features"):
        values = store.outputs(name, store.committed_rows(name)).astype(np.float64)
        mean, scale = store.statistics(name)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-6)
        assert scale == pytest.approx(np.sqrt(((values - values.mean(0)) ** 2).mean()), rel=1e-9)
    shutil.copytree(root, tmp_path / "s.zarr")
    shutil.rmtree(tmp_path / "s.zarr/teachers/t.features/statistics/000000")
    recomputed = TargetStore.open(tmp_path / "s.zarr").statistics("t.features")
    np.testing.assert_allclose(recomputed[0], mean, rtol=1e-6)
    node = read_node(root / "teachers/t.features/statistics/000000/zarr.json")
    write_node(tmp_path / "s.zarr", "teachers/t.features/statistics", {})
    write_node(
        tmp_path / "s.zarr",
        "teachers/t.features/statistics/000000",
        {**node, "sum": node["sum"][1:]},
    )
    with pytest.raises(StoreError, match="statistics/000000"):
        TargetStore.open(tmp_path / "s.zarr").statistics("t.features")


def test_features_have_neither_logits_nor_entropy(stored: tuple[Any, Path]) -> None:
    store = TargetStore.open(stored[1])
    for read in (store.logits, store.entropy):
        with pytest.raises(UsageError, match=r"t\.features"):
            read("t.features", [0])


def test_cosine_error_is_one_minus_the_cosine() -> None:
    random = np.random.default_rng(0)
    a, b = (random.normal(0, 2, (50, 30)).astype(np.float32) for _ in range(2))
    expected = [
        1 - x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(cosine_error(a, b), expected, rtol=1e-5, atol=1e-6)
    zero = np.zeros_like(a)
    assert cosine_error(zero, zero).max() == 0
    assert cosine_error(zero, b).min() == 1
    tiny = cosine_error(a, a + random.normal(0, 1e-4, a.shape).astype(np.float32))
    assert (tiny > 0).all()
    assert tiny.max() < 1e-8


def test_pca_is_mean_plus_coefficients_times_basis() -> None:
    random = np.random.default_rng(0)
    low = random.normal(0, 1, (40, 5)) @ random.normal(0, 1, (5, 12)) + 3
    basis = np.linalg.svd(low - low.mean(0), full_matrices=False)[2][:5].astype(np.float32)
    codec = Codec("features", "pca:5", 12, basis, low.mean(0).astype(np.float32))
    values = low.astype(np.float32)
    arrays = codec.encode(values)
    assert arrays["features"].shape == (40, 5)
    assert arrays["features"].dtype == np.int8
    q = arrays["features"] * arrays["scale"][:, None] + arrays["offset"][:, None]
    np.testing.assert_allclose(codec.decode(arrays), q @ basis + low.mean(0), rtol=1e-5, atol=1e-5)
    assert np.abs(codec.decode(arrays) - values).max() < 0.1
    values[3, 2] = np.inf
    assert np.isnan(codec.decode(codec.encode(values))[3]).all()


def test_a_version_1_store_becomes_version_2_by_its_root_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(ARTIFACTS) as archive:
        archive.extractall(tmp_path)
    root = tmp_path / "store.zarr"
    before = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    attributes = TargetStore.open(root).attributes
    run = {"batch_size": 1, "precision": "fp32", "torch": "x", "device": "cpu"}
    with StoreWriter(root, sampling=attributes["sampling"]) as writer:
        writer.add_teacher("logits", ["a", "b"], {"identity": {}, "run": run})
    assert TargetStore.open(root).attributes == attributes
    assert (root / "zarr.json").read_bytes() == before[Path("zarr.json")]
    with StoreWriter(root, sampling=attributes["sampling"]) as writer:
        writer.add_teacher("f", [], {"identity": {}, "run": run}, output="features", width=7)
    changed = TargetStore.open(root).attributes
    assert changed == {**attributes, "version": 2, "requires": ["features"]}
    for path, data in before.items():
        assert path == Path("zarr.json") or (root / path).read_bytes() == data, path


def test_a_teacher_of_another_output_or_width_is_refused(stored: tuple[Any, Path]) -> None:
    recipe, root = stored
    attributes = {"identity": {"w": 1}, "run": recipe.run}
    with StoreWriter(root, sampling=recipe.sampling) as writer:
        for options in ({"output": "features", "width": WIDTH + 1}, {"output": "logits"}):
            with pytest.raises(StoreMismatchError, match=r"t\.features"):
                writer.add_teacher("t.features", [], attributes, **options)
        writer.add_teacher("t.features", [], attributes, output="features", width=WIDTH)


UNKNOWN = {
    "requires": (".", {"requires": ["features", "spans"]}, "'spans'"),
    "no requires": (".", {"requires": None}, "requires"),
    "lacks requires": (".", {"requires": []}, "features"),
    "version": (".", {"version": 3}, "version 3"),
    "output": ("teachers/t.features", {"output": "tokens"}, "'tokens'"),
    "encoding": ("teachers/t.features", {"encoding": "int4"}, "'int4'"),
    "pca of logits": ("teachers/t", {"encoding": "pca:4"}, "'pca:4'"),
    "pca without basis": ("teachers/t.features", {"encoding": "pca:4"}, "pca"),
    "no width": ("teachers/t.features", {"width": None}, "width"),
    "wrong width": ("teachers/t.features", {"width": WIDTH + 1}, str(WIDTH)),
    "zero width": ("teachers/t.features", {"width": 0}, "width"),
    "error": ("commits/teachers/t.features/000000", {"error": {"kl_mean": 0.1, "kl_p99": 1}}, "cosine_mean"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown_requirements_and_values_are_refused_by_name(
    make_store: Callable[..., Any], case: str
) -> None:
    root = make_store(videos=range(2), features={"t.features": WIDTH})[1]
    node, changes, named = UNKNOWN[case]
    write_node(root, node, {**read_node(root / node / "zarr.json"), **changes})
    with pytest.raises(StoreError, match=r"zarr\.json") as refused:
        TargetStore.open(root).outputs("t.features", [0])
    assert named in str(refused.value)


def test_other_unknown_attributes_and_arrays_are_ignored(make_store: Callable[..., Any]) -> None:
    recipe, root = make_store(videos=range(2), features={"t.features": WIDTH})
    before = TargetStore.open(root).outputs("t.features", range(30))
    for node in (".", "teachers/t.features", "commits/teachers/t.features/000000", "plans/000000"):
        record = read_node(root / node / "zarr.json")
        write_node(root, node, {**record, "later": {"a": 1}})
    for array in ("frames/later", "teachers/t.features/later"):
        zarr.open_group(root, mode="r+").create_array(array, shape=(512,), dtype="int16")
    # Commits may hold files of such arrays, with a digest or with what a later version has instead.
    later = {
        "teachers/t.features/later/c/0": b"abc",
        "frames/later/c/0/0": b"d",
        "parts/0.tar": b"",
    }
    for name, data in later.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    entries = {name: {"size": len(d), "blake2b": digest_bytes(d)} for name, d in later.items()}
    for node in ("commits/teachers/t.features/000000", "commits/frames/000000"):
        record = read_node(root / node / "zarr.json")
        files = {**record["files"], **entries, "spans/0": {"in": "parts/0.tar"}}
        write_node(root, node, {**record, "files": files})
    store = TargetStore.open(root)
    np.testing.assert_array_equal(store.outputs("t.features", range(30)), before)
    assert list(verify(root, load_index(root))) == []
    with StoreWriter(root, sampling=store.attributes["sampling"]) as writer:
        writer.add_teacher("u", ["a"], {"identity": {}, "run": recipe.run})
        assert set(writer.index.file_record("frames/video", 0) or {}) == {"size", "blake2b"}
    assert {name: (root / name).read_bytes() for name in later} == later
    (root / "teachers/t.features/later/c/0").write_bytes(b"abd")
    findings = [f for f in verify(root, load_index(root)) if "later" in f.what]
    assert [(f.shard, f.teacher) for f in findings] == [(0, None), (0, "t.features")]
    assert json.loads((root / "zarr.json").read_text())["attributes"]["distinit"]["version"] == 2
