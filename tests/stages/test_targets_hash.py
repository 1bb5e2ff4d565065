"""Hashes of cached frames: at extraction, filled in later, killed, copied, verified."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.index import load_index
from distinit.pipeline.store.layout import write_node
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import (
    ExportConfig,
    HashConfig,
    InfoConfig,
    MergeConfig,
    VerifyConfig,
)
from distinit.pipeline.store.verify import verify
from distinit.pipeline.store.writer import StoreWriter
from distinit.pipeline.video.frames import read_frames
from distinit.pipeline.video.perceptual_hash import HASH_VIEW, grey, hash_p, hash_r
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_hash import targets_hash
from distinit.stages.targets_info import targets_info
from distinit.stages.targets_merge import targets_merge
from distinit.stages.targets_verify import targets_verify
from distinit.tests.conftest import TinyStore
from distinit.tests.store_recipe import read_node

QUIET = Console(quiet=True)


def hash_files(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.glob("frames/hash_*/c/**/*"))
        if p.is_file()
    }


def without_hashes(tiny: TinyStore, root: Path, version: int = 2) -> Path:
    shutil.copytree(tiny.path, root)
    shutil.rmtree(root / "commits/hashes")
    if version == 1:
        for folder in root.glob("frames/hash_*"):
            shutil.rmtree(folder)
        record = read_node(root / "zarr.json")
        del record["requires"]
        write_node(root, ".", {**record, "version": 1})
    else:
        for folder in root.glob("frames/hash_*/c"):
            shutil.rmtree(folder)
    return root


def test_extraction_hashes_every_cached_frame(tiny_store: TinyStore) -> None:
    store = TargetStore.open(tiny_store.path)
    assert len(store.hashed_rows()) == store.n_rows > 0
    for video in store.usable()[:2].tolist():
        index, pts, rows = store.frames(video)
        path = store.video_path(video)
        pictures = grey(read_frames(path, index, HASH_VIEW, expect=(index, pts)).images)
        p, r, rms = store.hashes(rows)
        np.testing.assert_array_equal(p, hash_p(pictures))
        np.testing.assert_array_equal(r, hash_r(pictures)[0])
        np.testing.assert_array_equal(rms, hash_r(pictures)[1])
    info = targets_info(InfoConfig(store=str(tiny_store.path)), QUIET)
    assert info["hashed_rows"] == info["rows"]
    assert list(verify(tiny_store.path, load_index(tiny_store.path))) == []


def test_hashes_without_the_commit_of_their_frames(tiny_store: TinyStore, tmp_path: Path) -> None:
    root = tmp_path / "s.zarr"
    shutil.copytree(tiny_store.path, root)
    shutil.rmtree(root / "commits" / "frames" / "000000")
    findings = list(verify(root, load_index(root, damaged=True)))
    assert any("not committed" in finding.what for finding in findings)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_hashes_are_filled_in_as_at_extraction(
    tiny_store: TinyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    root = without_hashes(tiny_store, tmp_path / "s.zarr", version)
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert len(TargetStore.open(root).hashed_rows()) == 0
    options = HashConfig(store=str(root))
    with monkeypatch.context() as patch:

        def killed(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(StoreWriter, "_write_in_group", killed)  # files are there, the node is not
        with pytest.raises(KeyboardInterrupt):
            targets_hash(options, QUIET)
    assert len(TargetStore.open(root).hashed_rows()) == 0
    result = targets_hash(options, QUIET)
    assert result["hashed"] == result["rows"] == TargetStore.open(tiny_store.path).n_rows
    assert hash_files(root) == hash_files(tiny_store.path) != {}
    changed = {
        p.relative_to(root).as_posix() for p, data in before.items() if p.read_bytes() != data
    }
    assert changed == ({"zarr.json"} if version == 1 else set())
    assert list(verify(root, load_index(root))) == []
    assert targets_hash(options, QUIET)["hashed"] == result["hashed"]


@pytest.mark.slow
def test_a_video_that_is_gone_is_named_and_tried_again(
    own_store: TinyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = without_hashes(own_store, tmp_path / "s.zarr")
    name = next(iter(TargetStore.open(root).corpora))
    gone = own_store.videos / "v00 é.mp4"
    gone.rename(tmp_path / "aside")
    options = HashConfig(store=str(root), video_roots={name: str(own_store.videos)})
    result = targets_hash(options, QUIET)
    assert [Path(path).name for path in result["failed"]] == [gone.name]
    assert result["hashed"] == result["rows"] - 12
    assert list(verify(root, load_index(root))) == []
    (tmp_path / "aside").rename(gone)
    again = Path(shutil.copytree(root, tmp_path / "again.zarr"))
    result = targets_hash(options, QUIET)
    assert (result["hashed"], result["failed"]) == (result["rows"], {})
    assert hash_files(root) == hash_files(own_store.path)
    # An added teacher fills them in as well, where nothing of a shard is hashed or not all of it.
    monkeypatch.syspath_prepend(str(own_store.path.parent / "modules"))
    for store in (again, without_hashes(own_store, tmp_path / "none.zarr", version=1)):
        specs = [{"name": "tiny_teachers:teacher", "outputs": ["features"],
                  "options": {"name": "late", "input_size": "32", "k": "4", "gain": "1"}}]  # fmt: skip
        values = {"sources": [str(own_store.videos)], "out": store, "teachers": specs}
        extract_targets(ExtractConfig.model_validate(values), QUIET)
        assert TargetStore.open(store).index.unhashed == {}
        assert hash_files(store) == hash_files(own_store.path)


@pytest.mark.slow
def test_copies_of_a_store_keep_them(tiny_store: TinyStore, tmp_path: Path) -> None:
    a, merged = tmp_path / "a.zarr", tmp_path / "m.zarr"
    targets_export(ExportConfig(store=str(tiny_store.path), out=str(a)), QUIET)
    targets_merge(MergeConfig(parts=[str(a)], out=str(merged)), QUIET)
    whole = TargetStore.open(tiny_store.path)
    expected = whole.hashes(whole.rows_of(whole.usable()))
    for path in (a, merged):
        store = TargetStore.open(path)
        assert len(store.hashed_rows()) == whole.n_rows
        for values, right in zip(
            store.hashes(store.rows_of(store.usable())), expected, strict=True
        ):
            np.testing.assert_array_equal(values, right)
        assert list(verify(path, load_index(path))) == []


@pytest.mark.slow
def test_a_flipped_bit_is_found_and_repaired_alone(tiny_store: TinyStore, tmp_path: Path) -> None:
    root = tmp_path / "s.zarr"
    shutil.copytree(tiny_store.path, root)
    file = root / "frames/hash_r/c/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="hash_r"):
        TargetStore.open(root).hashes([0])
    findings = list(verify(root, load_index(root)))
    assert len(findings) == 1
    assert "frames/hash_r" in str(findings[0])
    lines = list[str]()

    class Heard(Console):
        def info(self, text: str) -> None:
            lines.append(text)

    result = targets_verify(VerifyConfig(store=str(root), repair=True), Heard(quiet=True))
    assert result["dropped"] == 1
    (line,) = (text for text in lines if "dropped" in text)
    assert f"distinit targets hash {root}" in line
    assert "extract-targets" not in line
    targets_hash(HashConfig(store=str(root)), QUIET)
    assert hash_files(root) == hash_files(tiny_store.path)
    for change in (
        {"rows": 3},
        {"rows": -1},
        {"files": {"frames/pts/c/0": {}}},
        {"failed": {"x": ""}},
    ):
        node = read_node(root / "commits/hashes/000000/zarr.json")
        write_node(root, "commits/hashes/000000", {**node, **change})
        if change == {"rows": 3}:
            assert [f.shard for f in verify(root, load_index(root))] == [0]
        else:
            with pytest.raises(StoreError, match="commits/hashes/000000"):
                TargetStore.open(root)
        write_node(root, "commits/hashes/000000", node)
