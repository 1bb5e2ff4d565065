"""Malicious stores: whatever nodes, tables and links contain, no reader leaves the store, and every
command ends with a DistInitError that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs.zstd import Zstd

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DistInitError
from distinit.pipeline.store.digests import seal
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import (
    BrowseConfig,
    ExportConfig,
    InfoConfig,
    MergeConfig,
    VerifyConfig,
)
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages.targets_browse import targets_browse
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_info import targets_info
from distinit.stages.targets_merge import targets_merge
from distinit.stages.targets_verify import targets_verify
from distinit.tests.store_recipe import RUN, Recipe
from distinit.tests.thorough import is_thorough, some

QUIET = Console(quiet=True)
SAMPLING = Recipe().sampling
FINGERPRINT = {
    "probes": 1,
    "torch": "x",
    "device": "cpu",
    "basis": {"kind": "new"},
    "logits": [[0.5] * 3] * 6,
}
FEATURES = {"features": {"f": 6}, "pca": {"p": 6}}
ROOT, PLAN, FRAMES, ROWS = "", "plans/000000", "commits/frames/000000", "commits/teachers/t/000000"
TEACHER, PRINT = "teachers/t", "teachers/t/fingerprint"
PLAIN, PCA, SUMS = "teachers/f", "teachers/p", "teachers/f/statistics/000000"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good store, another part, and a file and a folder that must not change."""
    base = tmp_path_factory.mktemp("intact")
    for name, videos in (("s.zarr", range(5)), ("other.zarr", range(7, 10))):
        Recipe(videos=videos, teachers={"t": 3}, shard_rows=256, **FEATURES).make(base / name)
        with StoreWriter(base / name, sampling=SAMPLING) as writer:
            writer.add_fingerprint("t", FINGERPRINT)
    (base / "victim").mkdir()
    (base / "victim" / "precious").write_text("precious")
    (base / "canary").write_text("canary")
    return base


def read_all(store: Path) -> None:
    opened = TargetStore.open(store)
    opened.identity()
    for video in range(opened.n_videos):
        opened.video(video)
        opened.video_path(video)
        rows = opened.frames(video)[2]
        for name in opened.teachers:
            opened.outputs(name, rows)
            if opened.teacher(name).output == "logits":
                opened.entropy(name, rows)
            opened.encoding_error(name)
            opened.statistics(name)
            opened.fingerprint(name)


COMMANDS: dict[str, Callable[[Path, Path], object]] = {
    "read": lambda store, out: read_all(store),
    "info": lambda store, out: targets_info(InfoConfig(store=str(store), list_failed=True), QUIET),
    "browse": lambda store, out: targets_browse(
        BrowseConfig(store=str(store), out=str(out / "page"), sample=2), QUIET
    ),
    "merge": lambda store, out: targets_merge(
        MergeConfig(
            parts=[str(store.with_name("other.zarr")), str(store)], out=str(out / "merged.zarr")
        ),
        QUIET,
    ),
    "export": lambda store, out: targets_export(
        ExportConfig(store=str(store), out=str(out / "e.zarr")), QUIET
    ),
    "hdf5": lambda store, out: targets_export(
        ExportConfig(store=str(store), out=str(out / "e.h5")), QUIET
    ),
    "verify": lambda store, out: targets_verify(VerifyConfig(store=str(store)), QUIET),
    "extract": lambda store, out: extract(store),
    "repair": lambda store, out: targets_verify(VerifyConfig(store=str(store), repair=True), QUIET),
}


def extract(store: Path) -> None:
    """Extend the store as an extraction does, without videos."""
    with StoreWriter(store, sampling=SAMPLING) as writer:
        recipe = Recipe(videos=range(20, 22), teachers={"t": 3}, shard_rows=256)
        recipe._list(writer)
        writer.add_teacher("u", ["a", "b"], {"name": "u", "identity": {"w": 1}, "run": RUN})


def outside(base: Path) -> dict[str, bytes]:
    """Return all files except those of the attacked store and the outputs of commands."""
    files = [p for p in base.rglob("*") if p.is_file() and not p.is_symlink()]
    names = {p: p.relative_to(base).as_posix() for p in files}
    return {
        name: p.read_bytes()
        for p, name in names.items()
        if not name.startswith(("s.zarr/", "out/"))
    }


def attack(
    intact: Path, tmp_path: Path, harm: Callable[[Path], None], named: str, commands: Iterable[str]
) -> None:
    """Check that commands refuse a store after `harm` or succeed, and change nothing outside of it.

    named: text that the error has to contain.
    """
    base = tmp_path / "base"
    shutil.copytree(intact, base)
    (base / "out").mkdir()
    harm(base / "s.zarr")
    before = outside(base)
    for command in commands:
        try:
            result = COMMANDS[command](base / "s.zarr", base / "out")
        except DistInitError as error:
            message = str(error)
        else:
            # Other commands may not read the damaged part.
            if command not in ("verify", "repair"):
                continue
            message = "; ".join(f["what"] for f in result["findings"])  # type: ignore[index]
        assert named in message, command
        assert outside(base) == before, command


QUICK = ("read", "verify")
ALL = tuple(COMMANDS)
"""The last two change the store."""


def edit(store: Path, node: str, change: Callable[[dict[str, Any]], None]) -> None:
    file = store / node / "zarr.json"
    document = json.loads(file.read_text())
    change(document)
    sealed = "blake2b" in document.get("attributes", {}).get("distinit", {})
    file.write_bytes(seal(document) if sealed else json.dumps(document).encode())


def set_members(record: Any, keys: dict[str, Any]) -> None:
    """Set members of a record; a key with colons names an inner one, and ... removes it."""
    for key, value in keys.items():
        *outer, last = key.split(":")
        inner = record
        for name in outer:
            inner = inner[int(name) if isinstance(inner, list) else name]
        position = int(last) if isinstance(inner, list) else last
        if value is ...:
            del inner[position]
        else:
            inner[position] = value


def set_keys(store: Path, node: str, keys: dict[str, Any]) -> None:
    """Set keys of a node (`set_members`)."""
    edit(store, node, lambda document: set_members(document["attributes"]["distinit"], keys))


def commit_file(name: str, **record: Any) -> dict[str, Any]:
    return {"files": {name: {"size": 2092, "blake2b": "0" * 32, **record}}}


NODES: list[tuple[str, dict[str, Any]]] = [
    *[(ROOT, {"store_id": v}) for v in ("../victim", "", 5, None, "F" * 32, ["a"], "0" * 33, ...)],
    *[(ROOT, {"shard_rows": v}) for v in (0, -256, 255, "512", 2**40, 256.0, True, [])],
    *[(ROOT, {"sampling": v}) for v in ([], None, {"every": 0}, {"every": 10**30}, {"fps": "x"}, {"no": 1}, ...)],
    *[(ROOT, {"part": v}) for v in ("1/x", "1/99999999999", 5)],
    (ROOT, {"created": 5}),
    *[
        (PLAN, {"teachers": ["t", v]})
        for v in ("t/../../../victim", "../../victim", "..", ".", "", "/etc", "a\0b", "x" * 5000, 5, "t", "é")
    ],
    *[(PLAN, {"teachers": v}) for v in ("t", {"t": 1}, 5)],
    *[(PLAN, {"corpora": [{"name": v, "root": "/x"}]}) for v in ("../x", "", ".", "/etc", "a\0b", "x" * 5000, 5, None)],
    *[(PLAN, {"corpora": v}) for v in ([5] * 3, [{"name": "a"}] * 3, {"name": "a"}, [{"name": "a", "root": "/"}] * 3)],
    *[(PLAN, {"videos": v}) for v in (-1, 10**9, 1e3, "5", 10**400, True, [1], 2**31)],
    *[("plans/000001", {"segments": v}) for v in (-1, 10**9, 5.0, "5", None)],
    *[("plans/000001", {"shards": v}) for v in (-1, 10**9, 5.0, "5", 10**30)],
    *[
        (FRAMES, commit_file(v))
        for v in ("x/c/0/../../../../victim/precious", "../victim/precious", "/etc/passwd", "frames/video/c/1", "",
                  "frames/video/c/0/../0", "frames/video/zarr.json", "teachers/t/entropy/c/0", "a\0b", "x" * 9999)
    ],
    *[
        (FRAMES, commit_file("frames/video/c/0", blake2b=v))
        for v in ("../victim", "0" * 31, "/" * 32, "A" * 32, 5, None, "0" * 32 + "\n")
    ],
    *[(FRAMES, commit_file("frames/video/c/0", size=v)) for v in (-1, 2**62, "5", 1.5, None)],
    *[(FRAMES, {"files": v}) for v in ([], "x", {"frames/video/c/0": 5}, ...)],
    *[
        (FRAMES, {"segment": v})
        for v in ([-1] * 5, [10**12] * 5, [0.5] * 5, ["a"] * 5, [[0]] * 5, [0], [10**30] * 5, 5, [None] * 5, {}, ...)
    ],
    *[(FRAMES, {"first_row": v}) for v in ([-5] * 5, [10**9] * 5, "abcde")],
    *[(FRAMES, {"rows": v}) for v in ([10**9] * 5, [-1] * 5, [256] * 5)],
    *[(FRAMES, {"failed": v}) for v in ({"x": "y"}, {"-1": "y"}, {"99": "y"}, {"0": 5}, ["y"], {"٣": "y"})],
    *[(FRAMES, {"notes": v}) for v in ({"99": "y"}, {"0": None}, 5, {"0": "y" * 10**6})],
    *[(FRAMES, {"overflow": v}) for v in ({"0": "x"}, {"99": 5}, {"0": -1}, 5)],
    *[(FRAMES, {"counted": v}) for v in (["a"], [10**9], [-1], {"0": 1}, [99], [0.0])],
    *[(FRAMES, {"run": v}) for v in (5, {"mixed": []}, {"batch_size": 10**9}, {"mixed": [5]}, ...)],
    *[(ROWS, {"rows": v}) for v in (-1, 10**9, 1000, "x", None, ...)],
    *[(ROWS, {"error": v}) for v in ({}, 5, {"kl_mean": "x", "kl_p99": 0.1}, {"kl_mean": True, "kl_p99": 0.1})],
    *[(ROWS, {"failed": v}) for v in ({"99": "y"}, {"x": "y"}, [])],
    *[
        (ROWS, commit_file(v))
        for v in ("teachers/t/../../../victim/precious", "teachers/t/scale/c/0", "teachers/u/entropy/c/0",
                  "frames/video/c/0", "teachers/t/logits/c/0", "teachers/t/logits/c/0/1")
    ],
    *[(ROWS, commit_file("teachers/t/entropy/c/0", blake2b="../victim"))],
    *[(TEACHER, {"encoding": v}) for v in ("float64", 5, None, ["int8"], ...)],
    *[(TEACHER, {"identity": v}) for v in ([], "x", None, ...)],
    *[(TEACHER, {"run": v}) for v in ([], {"batch_size": -1}, {"precision": 5}, ...)],
    *[(TEACHER, {"provenance": v}) for v in (5, [], "os:system")],
    *[(PRINT, {"logits": v}) for v in (5, [], [5], [[10**400]] * 6, [["x"]] * 6, [[{}]] * 6, [[1.0], [1.0, 2.0]] * 3)],
    *[(PRINT, {"probes": v}) for v in ("x", -1, 10**400, None, ...)],
    *[(PRINT, {"basis": v}) for v in ([], "new", ...)],
    *[(ROOT, {"requires": v}) for v in (5, [5], "features", ["features"], ["features", "x"], [], ["pca"] * 2, ...)],
    *[(PLAIN, {"output": v}) for v in (5, None, ["features"], "tokens", "logits", ...)],
    *[(PLAIN, {"width": v}) for v in (0, -1, 7, 2**40, "6", 6.0, None, ...)],
    *[(PLAIN, {"encoding": v}) for v in ("pca:4", "pca:", "pca:4 ", 5, ...)],
    *[(PCA, {"encoding": v}) for v in ("pca:0", "pca:7", "pca:5", "pca:99999", "pca:-4", "pca:٤", "PCA:4", "float16")],
    *[(PCA, {"pca": v}) for v in (5, {}, {"basis": "0" * 32}, {"basis": "../x", "mean": "0" * 32},
                                  {"basis": "0" * 32, "mean": "0" * 32}, ...)],
    *[(SUMS, {"sum": v}) for v in (5, [], ["x"] * 6, [[]] * 6, [10**400] * 6, [1.0] * 7, [0.0] * 6, ...)],
    *[(SUMS, {"square": v}) for v in ("x", None, -1.0, [], ...)],
    *[(SUMS, {"rows": v}) for v in (-1, 10**6, "x", ...)],
    *[("commits/teachers/f/000000", {"error": v}) for v in ({}, {"kl_mean": 0.1, "kl_p99": 0.2}, {"cosine_mean": "x"})],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("node", "keys"),
    some(NODES, 5),
    ids=some(
        (f"{i}-{node or 'root'}-{next(iter(keys))}" for i, (node, keys) in enumerate(NODES)), 5
    ),
)
def test_a_node_with_invalid_values_is_named(
    intact: Path, tmp_path: Path, node: str, keys: dict[str, Any]
) -> None:
    commands = ALL if NODES.index((node, keys)) % 21 == 0 else QUICK
    # A count that is only too large contradicts the tables, which are named then.
    named = "/" if 10**9 in keys.values() and node.startswith("plans/") else node or "s.zarr"
    attack(intact, tmp_path, lambda store: set_keys(store, node, keys), named, commands)


def set_meta(store: Path, array: str, keys: dict[str, Any]) -> None:
    """Set members of an array's metadata (`set_members`)."""
    edit(store, array, lambda document: set_members(document, keys))


SHARD, INNER = "chunk_grid:configuration:chunk_shape", "codecs:0:configuration:chunk_shape"
ARRAYS: list[tuple[str, dict[str, Any]]] = [
    ("frames/video", {INNER: [0]}),
    ("frames/index", {INNER: [10**9]}),
    ("frames/pts", {SHARD: [0]}),
    ("frames/pts", {SHARD: [-256]}),
    ("frames/pts", {SHARD: [10**12]}),
    ("frames/pts", {SHARD: "x"}),
    ("frames/video", {"shape": [-20]}),
    ("frames/video", {"shape": [10**30]}),
    ("frames/video", {"shape": []}),
    ("frames/video", {"shape": [256, 256]}),
    ("frames/video", {"data_type": "object"}),
    ("frames/video", {"data_type": {"name": "int32"}}),
    ("frames/video", {"fill_value": "x"}),
    ("frames/video", {"codecs": []}),
    ("frames/video", {"codecs:0:name": "numcodecs.pickle"}),
    ("frames/video", {"codecs:0:configuration:codecs": [{"name": "bytes"}]}),
    ("frames/video", {"codecs:0:configuration:index_location": "start"}),
    ("frames/video", {"codecs:0:configuration": ...}),
    ("frames/video", {"chunk_grid": ...}),
    ("frames/video", {"chunk_key_encoding:configuration:separator": "../"}),
    ("teachers/t/logits", {"shape": [256, 10**9], INNER: [16, 10**9], SHARD: [256, 10**9]}),
    ("teachers/t/logits", {"shape": [256, 0]}),
    ("teachers/t/logits", {"shape": [256, 4], INNER: [16, 4], SHARD: [256, 4]}),
    ("teachers/t/logits", {"data_type": "int8", "fill_value": 0}),
    ("teachers/t/logits", {"storage_transformers": [{"name": "x"}]}),
    ("teachers/t/entropy", {SHARD: [512]}),
    ("teachers/t/entropy", {"data_type": "float64"}),
    ("teachers/t/class", {"shape": [10**12]}),
    ("teachers/t/class", {SHARD: [0]}),
    ("teachers/t/class", {"data_type": "bytes"}),
    ("videos/path", {SHARD: [0]}),
    ("videos/path", {SHARD: [1], "shape": [10**9]}),
    ("videos/path", {"codecs:0:name": "bytes"}),
    ("videos/corpus", {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle"}]}),
    ("videos/digest", {"shape": [5, 10**9], SHARD: [16384, 10**9]}),
    ("videos/size", {"shape": [2]}),
    ("videos/fps", {"zarr_format": 2}),
    ("videos/path", {"node_type": "group"}),
    ("segments/video", {"shape": [2**31]}),
    ("segments/bound", {"fill_value": "NaN"}),
    ("segments/shard", {"shape": "x"}),
    ("teachers/f/features", {"data_type": "int8", "fill_value": 0}),
    ("teachers/f/features", {"shape": [256, 10**9], INNER: [16, 10**9], SHARD: [256, 10**9]}),
    ("teachers/p/features", {"shape": [256, 6], INNER: [16, 6], SHARD: [256, 6]}),
    ("teachers/p/scale", {"data_type": "float64"}),
    ("teachers/p/basis", {"shape": [4, 10**9], SHARD: [4, 10**9]}),
    ("teachers/p/basis", {"shape": [5, 6]}),
    ("teachers/p/basis", {"data_type": "float64"}),
    ("teachers/p/basis", {"codecs": [{"name": "bytes"}, {"name": "numcodecs.pickle"}]}),
    ("teachers/p/mean", {"shape": [10**12]}),
    ("teachers/p/mean", {SHARD: [0]}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("array", "keys"),
    some(ARRAYS, 2),
    ids=some((f"{i}-{array}-{next(iter(keys))}" for i, (array, keys) in enumerate(ARRAYS)), 2),
)
def test_an_array_with_invalid_metadata_is_named(
    intact: Path, tmp_path: Path, array: str, keys: dict[str, Any]
) -> None:
    commands = ALL if ARRAYS.index((array, keys)) % 14 == 0 else QUICK
    attack(intact, tmp_path, lambda store: set_meta(store, array, keys), array, commands)


@pytest.mark.parametrize(
    "keys",
    [
        {"codecs:0:configuration": None},
        {"codecs:0:configuration": []},
        {"codecs:0:configuration:endian": "middle"},
        {"codecs:1:configuration": 5},
        {"dimension_names": True},
    ],
    ids=["none", "list", "endian", "number", "dimensions"],
)
def test_metadata_that_only_zarr_checked_is_named(
    intact: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    attack(
        intact, tmp_path, lambda store: set_meta(store, "videos/size", keys), "videos/size", QUICK
    )


DEEP = b'{"attributes": {"distinit": ' + b'{"a": ' * 200 + b"1" + b"}" * 202
TEXTS = {
    "empty": b"", "binary": b"\xff\xfe\x00", "deep": b"[" * 100_000, "digits": b"1" * 5000,
    "null": b"null", "list": b"[]",
    "no attributes": b'{"attributes": null}', "list of pairs": b'{"attributes": {"distinit": [["a", 1]]}}',
    "deep objects": DEEP,
}  # fmt: skip
FILES = ["", PLAN, FRAMES, ROWS, TEACHER, PRINT, "frames/video", "teachers/t/logits", "teachers/t/class",
         "videos/path", "videos/fps", "segments/bound", PCA, "teachers/p/basis", SUMS]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "text"), some(product(FILES, TEXTS), 5))
def test_a_node_that_is_not_json_is_named(
    intact: Path, tmp_path: Path, folder: str, text: str
) -> None:
    def harm(store: Path) -> None:
        (store / folder / "zarr.json").write_bytes(TEXTS[text])

    attack(
        intact,
        tmp_path,
        harm,
        folder or "s.zarr",
        ALL if text == "deep" and is_thorough() else QUICK,
    )


PATHS = [
    *(f"{folder}/zarr.json".lstrip("/") for folder in FILES),
    "teachers", "teachers/t", "teachers/t/logits", "teachers/t/logits/c", "teachers/t/logits/c/0/0", "commits",
    "commits/frames", "commits/teachers", "commits/teachers/t", FRAMES, ROWS, "frames", "frames/video/c/0", "plans",
    PLAN, "videos", "videos/path", "videos/path/c/0", "videos/duration/c/0", "segments", "segments/video/c/0", PRINT,
    "teachers/p/basis", "teachers/p/basis/c/0/0", "teachers/p/mean/c", "teachers/f/features/c/0/0",
    "teachers/f/statistics", SUMS,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "path"), some(product(["link", "pipe"], PATHS), 3))
def test_a_link_or_a_pipe_in_a_store_is_not_followed(
    intact: Path, tmp_path: Path, path: str, kind: str
) -> None:
    """The link leads to the original, so that following it would not be noticed by the content."""

    def harm(store: Path) -> None:
        target = store.with_name("moved")
        (store / path).rename(target)
        if kind == "link":
            (store / path).symlink_to(target)
        elif target.is_dir():
            pytest.skip("a folder")
        else:
            os.mkfifo(store / path)

    attack(
        intact,
        tmp_path,
        harm,
        path.removesuffix("/zarr.json"),
        ALL if kind == "link" and is_thorough() else QUICK,
    )


BOMB = 100_000_000


def zeros_without_size() -> bytes:
    """Return a zstd frame of `BOMB` zero bytes in run-length blocks, without their number."""
    blocks = BOMB // 100_000
    headers = ((100_000 << 3) | (1 << 1) | (i == blocks - 1) for i in range(blocks))
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(
        header.to_bytes(3, "little") + b"\0" for header in headers
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "kind"),
    # Half of the combinations include every column and every kind.
    some(
        product(
            ["videos/path", "videos/fps", "segments/bound", "teachers/t/class", "teachers/p/mean"],
            ["with size", "without size", "sparse"],
        ),
        2,
    ),
)
def test_a_chunk_that_would_fill_the_memory_is_refused(
    intact: Path, tmp_path: Path, column: str, kind: str
) -> None:
    packed = zeros_without_size() if kind == "without size" else bytes(Zstd().encode(bytes(BOMB)))

    def harm(store: Path) -> None:
        chunk = store / column / "c/0"
        if kind == "sparse":
            os.truncate(chunk, 2**40)
        else:
            chunk.write_bytes(packed + int(google_crc32c.value(packed)).to_bytes(4, "little"))

    tracemalloc.start()
    try:
        attack(intact, tmp_path, harm, f"{column}/c/0", QUICK)
        assert tracemalloc.get_traced_memory()[1] < BOMB / 2
    finally:
        tracemalloc.stop()


def test_verify_ends_where_the_folder_of_plans_is_a_link(intact: Path, tmp_path: Path) -> None:
    def harm(store: Path) -> None:
        (store / "plans").rename(store.with_name("moved"))
        (store / "plans").symlink_to(store.with_name("moved"))

    attack(intact, tmp_path, harm, "plans", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["staging", "teachers/u", "commits/teachers/u"])
@pytest.mark.parametrize("command", ["extract", "repair", "verify"])
def test_a_link_at_a_path_to_write_is_not_followed(
    intact: Path, tmp_path: Path, path: str, command: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(intact, base)
    (base / "s.zarr" / path).symlink_to(base / "victim")
    before = outside(base)
    with contextlib.suppress(DistInitError):
        COMMANDS[command](base / "s.zarr", base / "out")
    assert outside(base) == before


def test_a_link_to_the_store_itself_is_followed(intact: Path, tmp_path: Path) -> None:
    (tmp_path / "link.zarr").symlink_to(intact / "s.zarr")
    assert targets_verify(VerifyConfig(store=str(tmp_path / "link.zarr")), QUIET)["ok"]
    read_all(tmp_path / "link.zarr")


@pytest.mark.slow
def test_a_damaged_commit_is_dropped_and_filled_again(intact: Path, tmp_path: Path) -> None:
    recipe = Recipe(videos=range(5), teachers={"t": 3}, shard_rows=256, **FEATURES)
    for node in (FRAMES, ROWS):
        store = tmp_path / node.replace("/", "-")
        shutil.copytree(intact / "s.zarr", store)
        expected = TargetStore.open(store).logits("t", np.arange(20))
        (store / node / "zarr.json").write_text("{")
        with pytest.raises(DistInitError, match=node):
            StoreWriter(store, sampling=SAMPLING)
        assert targets_verify(VerifyConfig(store=str(store), repair=True), QUIET)["dropped"] >= 1
        with StoreWriter(store, sampling=SAMPLING) as writer:
            writer.commit(recipe.stage(writer, 0), RUN)
        assert targets_verify(VerifyConfig(store=str(store)), QUIET)["ok"]
        assert np.array_equal(TargetStore.open(store).logits("t", np.arange(20)), expected)
