"""Digests of nodes and tables detect every flipped bit; stores without digests can be read, checked
and extended."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DistInitError, StoreError
from distinit.pipeline.store.digests import check_document, is_sealed, seal, split_ranges
from distinit.pipeline.store.layout import video_specs, write_node
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import VerifyConfig
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages.targets_verify import targets_verify
from distinit.tests.flips import flips
from distinit.tests.old_stores import without_digests
from distinit.tests.store_recipe import read_node
from distinit.tests.thorough import is_thorough

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=12,
)


@pytest.fixture
def root(make_store: Callable[..., tuple[Any, Path]]) -> Path:
    """A finished store of 40 videos and a teacher of 10 classes."""
    return make_store(videos=range(20))[1]


def write(root: Path) -> StoreWriter:
    return StoreWriter(root, sampling=TargetStore.open(root).attributes["sampling"])


def content(store: TargetStore) -> dict[str, Any]:
    """Return everything that a reader gets from a store."""
    values: dict[str, Any] = {"identity": store.identity(), "corpora": store.corpora}
    values["videos"] = [repr(store.video(i)) for i in range(store.n_videos)]
    for spec in video_specs():
        name = spec.path.split("/")[1]
        values[name] = store.column(name).tolist()
    for name, record in store.teachers.items():
        rows = store.committed_rows(name)
        values[name] = (
            record,
            store.outputs(name, rows).tobytes(),
            store.entropy(name, rows).tobytes() if record.output == "logits" else None,
            store.statistics(name)[0].tobytes() if record.output == "features" else None,
        )
        values[f"{name} fingerprint"] = store.fingerprint(name)
        values[f"{name} frames"] = [
            store.read_table(table, rows).tolist() for table in ("video", "index", "pts")
        ]
    return values


def read_or_refused(root: Path) -> dict[str, Any] | None:
    """Return the content of a store, None if a reader refuses it."""
    try:
        return content(TargetStore.open(root))
    except StoreError:
        return None


def findings(root: Path) -> str:
    """Return the findings of verify or its error as text; empty for an undamaged store."""
    try:
        result = targets_verify(VerifyConfig(store=str(root)), Console(quiet=True))
    except DistInitError as error:
        return str(error)
    return "\n".join(f"{f['shard']} {f['teacher']} {f['what']}" for f in result["findings"])


@pytest.mark.slow
def test_every_flipped_bit_is_found_with_its_file_and_never_read(
    make_store: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    features = {"features": {"f": 12}, "features_encoding": "int8", "pca": {"p": 12}}
    root = make_store(videos=range(20), **features)[1]
    with write(root) as writer:
        writer.add_fingerprint("t", {"probes": 1, "logits": [[0.0] * 10] * 6, "torch": "2", "device": "cpu",
                                     "basis": {"kind": "new"}})  # fmt: skip
    expected, num_flips = content(TargetStore.open(root)), 0
    assert findings(root) == ""
    per_kind = 30 if is_thorough() else 1
    for flip in flips(root, tmp_path / "copy", seed=0, per_kind=per_kind):
        text = findings(flip.path)
        folder = flip.file.removesuffix("/zarr.json")
        is_named = (
            folder in text
            or ("commits/" in folder and str(int(folder[-6:])) in text)
            or folder == "zarr.json"
        )
        assert text, f"not detected: {flip}"
        assert is_named, f"{flip}: {text}"
        assert num_flips % 4 or read_or_refused(flip.path) in (expected, None), flip
        num_flips += 1
    assert num_flips > 30 * per_kind


@pytest.mark.slow
def test_a_flipped_bit_of_features_their_basis_and_sums_is_found(
    make_store: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    """Flip so many bits that values of rows are changed, not only fill."""
    root = make_store(videos=range(2), shard_rows=256, features={"f": 3}, pca={"p": 5})[1]
    arrays = ("features", "scale", "offset", "basis", "mean")
    kinds = [f"teachers/[fp]/{array}/c/*" for array in arrays]
    kinds.append("teachers/[fp]/statistics/*/zarr.json")
    per_kind = 300 if is_thorough() else 5
    flipped_arrays = list[str]()
    for flip in flips(root, tmp_path / "copy", seed=0, per_kind=per_kind, kinds=kinds):
        # Chunks of tables are named by their array.
        assert flip.file.partition("/c/")[0].removesuffix("/zarr.json") in findings(flip.path), flip
        flipped_arrays.append(flip.file.split("/")[2])
    assert {*arrays, "statistics"} == set(flipped_arrays)


@pytest.mark.slow
def test_sums_of_other_rows_are_found(
    make_store: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    """A changed node may have a valid digest."""
    root = make_store(videos=range(20), shard_rows=256, features={"f": 12}, pca={"p": 12})[1]
    for teacher in ("f", "p"):
        node = f"teachers/{teacher}/statistics/000001"
        record = read_node(root / node / "zarr.json")
        for change in (
            {"rows": record["rows"] + 1},
            {"sum": [*record["sum"][:-1], record["sum"][-1] + 1e-3]},
            {"sum": record["sum"][1:]},
            {"square": record["square"] * (1 + 1e-6)},
        ):
            write_node(root, node, {**record, **change})
            assert findings(root).splitlines() == [
                f"1 {teacher} {node} holds other sums than those of its rows"
            ]
        write_node(root, node, record)
    assert findings(root) == ""


@pytest.mark.slow
def test_a_store_without_digests_is_read_verified_and_grown(root: Path) -> None:
    expected = content(TargetStore.open(root))
    assert (
        targets_verify(VerifyConfig(store=str(root)), Console(quiet=True))["unchecked_files"] == 0
    )
    without_digests(root)
    assert content(TargetStore.open(root)) == expected
    result = targets_verify(VerifyConfig(store=str(root)), Console(quiet=True))
    assert result["ok"]
    assert result["unchecked_files"] > 30
    before = TargetStore.open(root).n_videos
    names = [spec.path.split("/")[1] for spec in video_specs()]
    columns = {name: TargetStore.open(root).column(name)[:2] for name in names}
    with write(root) as writer:
        writer.add_videos({**columns, "path": ["new 1", "new 2"]}, writer.index.corpora)
    assert TargetStore.open(root).n_videos == before + 2
    result = targets_verify(VerifyConfig(store=str(root)), Console(quiet=True))
    assert result["ok"]
    assert result["unchecked_files"] > 0
    # A plan has a digest of this row.
    zarr.open_array(root / "videos/fps", mode="r+")[before + 1] = 77.0
    assert "videos/fps" in findings(root)


def kill(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_a_video_identified_again_has_its_former_or_its_new_digest(
    root: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    columns = {"fps": [12.5], "size": [99]}
    with write(root) as writer:
        if killed:
            monkeypatch.setattr(zarr.Array, "__setitem__", kill)
            with pytest.raises(KeyboardInterrupt):
                writer.identify([3], columns)
            monkeypatch.undo()
        else:
            writer.identify([3], columns)
    store = TargetStore.open(root)
    assert (float(store.column("fps")[3]) == 12.5) is not killed
    assert findings(root) == ""
    zarr.open_array(root / "videos/fps", mode="r+")[3] = 13.0
    assert "videos/fps" in findings(root)


@pytest.mark.slow
@given(st.dictionaries(st.text(), JSON, max_size=4), st.data())
def test_a_sealed_document_reads_back_and_no_flip_passes(
    record: dict[str, Any], data: st.DataObject
) -> None:
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"distinit": record}}
    text = seal(document)
    assert is_sealed(text)
    # The new digest does not depend on the old one.
    assert text == seal(json.loads(text))
    parsed = check_document("x", text, required=True)["attributes"]["distinit"]
    assert {**parsed, "blake2b": 0} == {**record, "blake2b": 0}
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    flipped = bytearray(text)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreError, match=r"^x: "):
        check_document("x", bytes(flipped), required=True)


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 40))
def test_ranges_cover_rows_once_and_cross_no_border(start: int, length: int, chunk: int) -> None:
    ranges = split_ranges(start, start + length, chunk)
    rows = np.concatenate([np.arange(a, b) for a, b in ranges] or [np.empty(0, int)])
    assert rows.tolist() == list(range(start, start + length))
    assert all(a // chunk == (b - 1) // chunk for a, b in ranges)


def test_renamed_classes_are_refused(root: Path) -> None:
    classes = ["a", "b"]
    identity = {"classes_sha256": hashlib.sha256("\n".join(classes).encode()).hexdigest()}
    with write(root) as writer:
        writer.add_teacher("u", classes, {"name": "u", "identity": identity, "run": {}})
    assert TargetStore.open(root).teacher("u").classes == ("a", "b")
    zarr.open_array(root / "teachers/u/class", mode="r+")[1:2] = np.array(["c"], dtype=object)
    assert "teachers/u/class" in findings(root)
    with pytest.raises(StoreError, match="teachers/u/class"):
        TargetStore.open(root)


@pytest.mark.slow
@pytest.mark.parametrize("node", ["commits/frames/000000", "commits/teachers/t/000000"])
def test_a_writer_names_the_command_that_repairs_a_damaged_commit(node: str, root: Path) -> None:
    sampling = TargetStore.open(root).attributes["sampling"]
    file = root / node / "zarr.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError) as caught:
        StoreWriter(root, sampling=sampling)
    assert node in str(caught.value)
    assert f"distinit targets verify --repair {root}`" in str(caught.value)
    assert (
        targets_verify(VerifyConfig(store=str(root), repair=True), Console(quiet=True))["dropped"]
        >= 1
    )
    with write(root):
        pass
