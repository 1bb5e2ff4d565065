"""A store behind a URL has the rows of the local store, over real servers on loopback, and caches
them."""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from distinit.pipeline.common import urls
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError
from distinit.pipeline.common.urls import is_url
from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store import remote
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.storage import absolute
from distinit.pipeline.store.store_options import InfoConfig
from distinit.pipeline.store.writer import StoreWriter
from distinit.stages.targets_info import targets_info

pytestmark = pytest.mark.network


@dataclass
class Server:
    """A folder behind HTTP without listings.

    ranges: whether it supports ranges. num_errors: number of next responses that have status 503.
    requests: path and number of sent bytes of each.
    """

    root: Path
    ranges: bool = True
    num_errors: int = 0
    url: str = ""
    requests: list[tuple[str, int]] = field(default_factory=list)

    def bytes_of(self, part: str) -> int:
        return sum(n for path, n in self.requests if part in path)


@contextmanager
def serve(root: Path, **changes: Any) -> Iterator[Server]:
    state = Server(root, **changes)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            file = root / self.path.strip("/")
            data, status = (file.read_bytes(), 200) if file.is_file() else (b"", 404)
            if state.num_errors:
                state.num_errors, data, status = state.num_errors - 1, b"", 503
            elif status == 200 and state.ranges and "Range" in self.headers:
                first, last = (
                    int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-")
                )
                data, status = (data[first : last + 1], 206) if first < len(data) else (b"", 416)
            state.requests.append((self.path, len(data)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def small_files_and_no_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make these small stores be read as large ones are."""
    monkeypatch.setattr(remote, "WHOLE_FILE_BYTES", 1500)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(remote, "WAITS_S", (0.0, 0.0))
    monkeypatch.setenv("DISTINIT_CACHE", str(tmp_path / "cache"))


def same(a: TargetStore, b: TargetStore) -> None:
    assert a.identity() == b.identity()
    assert a.usable().tolist() == b.usable().tolist()
    for v in range(a.n_videos):
        assert repr(a.video(v)) == repr(b.video(v))
        for x, y in zip(a.frames(v), b.frames(v), strict=True):
            np.testing.assert_array_equal(x, y)
        rows = a.frames(v)[2]
        for name in a.teachers:
            np.testing.assert_array_equal(a.outputs(name, rows), b.outputs(name, rows))
            if a.teacher(name).output == "logits":
                np.testing.assert_array_equal(a.entropy(name, rows), b.entropy(name, rows))
    for name in a.teachers:
        for x, y in zip(a.statistics(name), b.statistics(name), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("ranges", [True, False])
def test_rows_over_http_equal_the_local_ones_and_are_fetched_once(
    make_store: Callable[..., Any], ranges: bool
) -> None:
    _, root = make_store(
        teachers={"t": 10, "second": 5},
        uncommitted=[2],
        encoding="int8" if ranges else "float16",
        features={"f": 12},
        pca={"p": 40},
    )
    with serve(root.parent, ranges=ranges) as server:
        store = TargetStore.open(f"{server.url}/s.zarr/")
        rows = store.frames(0)[2][:3]
        store.logits("t", rows)
        file = (root / "teachers/t/logits/c/0/0").stat().st_size
        if ranges:
            # One block and the index are fetched.
            assert 0 < server.bytes_of("t/logits/c/0") <= 3 * 1024 < file
        same(TargetStore.open(root), store)
        num_requests = len(server.requests)
        reopened = TargetStore.open(f"{server.url}/s.zarr")
        same(TargetStore.open(root), reopened)
        # Only nodes and missing chunks, which have the fill value, are requested again.
        assert not [
            path
            for path, sent in server.requests[num_requests:]
            if sent and not path.endswith("zarr.json")
        ]
    # The server has stopped, so all is read from the cache.
    same(TargetStore.open(root), pickle.loads(pickle.dumps(reopened)))


def test_a_store_in_memory_and_a_store_that_grows(
    make_store: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The protocol `memory` is read like s3 and others.
    monkeypatch.setattr(urls, "PROTOCOLS", (*urls.PROTOCOLS, "memory"))
    recipe, root = make_store(uncommitted=[1], features={"f": 12}, pca={"p": 40})
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/bucket/s.zarr", recursive=True)
    before = TargetStore.open("memory://bucket/s.zarr")
    same(TargetStore.open(root), before)
    with StoreWriter(root, sampling=recipe.sampling) as writer:
        writer.commit(recipe.stage(writer, 1), recipe.run)
        writer.add_teacher("late", ["x"], {"name": "late", "identity": {"w": 1}, "run": recipe.run})
    memory.put(str(root), "/bucket/", recursive=True)
    after = TargetStore.open("memory://bucket/s.zarr", cache=tmp_path / "cache")
    assert list(after.teachers) == ["t", "f", "p", "late"]
    after.teachers.pop("late"), (local := TargetStore.open(root)).teachers.pop("late")
    same(local, after)
    assert len(after.usable(["t"])) > len(before.usable())
    with pytest.raises(StoreError, match="local folder"):
        _ = after.path


def test_two_copies_that_grew_differently_are_not_mixed_up(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    recipe, root = make_store(videos=range(5))
    for name in ("c", "d"):
        copy = shutil.copytree(root, tmp_path / f"{name}.zarr")
        with StoreWriter(copy, sampling=recipe.sampling) as writer:
            columns: dict[str, list[Any]] = {s.path.split("/")[1]: [1] for s in fmt.video_specs()}
            columns |= {"path": [f"{name}.mp4"], "corpus": [2], "digest": [[1] * 16]}
            writer.add_videos(columns, [*writer.index.corpora, {"name": name, "root": f"/{name}"}])
    with serve(tmp_path) as server:
        for name in ("c", "d"):
            store = TargetStore.open(f"{server.url}/{name}.zarr")
            assert (store.video(5).corpus, store.video(5).path) == (name, f"{name}.mp4")


def test_a_damaged_cache_is_fetched_again_and_damage_of_the_store_is_named(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    _, root = make_store()
    with serve(root.parent) as server:
        url = f"{server.url}/s.zarr"
        store = TargetStore.open(url)
        rows = store.frames(5)[2]
        expected = store.logits("t", rows)
        for file in (tmp_path / "cache/stores").glob("*/shards/*/*"):
            file.write_bytes(bytes(b ^ 255 for b in file.read_bytes()))
        np.testing.assert_array_equal(TargetStore.open(url).logits("t", rows), expected)
        server.num_errors = 2
        np.testing.assert_array_equal(TargetStore.open(url).logits("t", rows), expected)

        shard = root / "teachers/t/logits/c/0/0"
        data = bytearray(shard.read_bytes())
        data[3] ^= 1
        shard.write_bytes(data)
        with pytest.raises(StoreError, match=r"http.*logits/c/0/0: chunk 0 fails its crc32c"):
            TargetStore.open(url, cache=tmp_path / "other").logits("t", rows[:1] * 0)
        shard.write_bytes(data[:700])
        with pytest.raises(StoreError, match=r"http.*logits/c/0/0"):
            TargetStore.open(url, cache=tmp_path / "third").logits("t", rows)
        shard.unlink()
        with pytest.raises(StoreError, match="a committed shard is missing"):
            TargetStore.open(url, cache=tmp_path / "third").logits("t", rows)
        server.num_errors = 99
        with pytest.raises(StoreError, match=r"http.*cannot be read.*503"):
            TargetStore.open(url)
    with pytest.raises(StoreError, match="cannot be read"):
        TargetStore.open(url)


class Rows:
    """A data set over a store, as a loader's workers read it."""

    def __init__(self, store: TargetStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.n_videos

    def __getitem__(self, v: int) -> float:
        return float(self.store.logits("t", self.store.frames(v)[2]).sum())


def test_loader_workers_read_through_one_cache(make_store: Callable[..., Any]) -> None:
    _, root = make_store()
    expected = [Rows(TargetStore.open(root))[v] for v in range(40)]
    with serve(root.parent) as server:
        store = TargetStore.open(f"{server.url}/s.zarr")
        # Open the connection of the parent process before it forks.
        _ = store.frames(0)
        loader = DataLoader(
            Rows(store), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        assert [float(x) for x in loader] == expected


def test_a_file_that_another_process_is_writing_is_not_damaged(
    make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = make_store()
    expected = [Rows(TargetStore.open(root))[v] for v in range(5)]
    # The digest of bytes that were read before the other process had written all of them.
    monkeypatch.setattr(remote, "digest_file", lambda fd, size: "0" * 32)
    with serve(root.parent) as server:
        rows = Rows(TargetStore.open(f"{server.url}/s.zarr"))
        assert [rows[v] for v in range(5)] == expected


def test_a_url_without_a_store_is_named(make_store: Callable[..., Any], tmp_path: Path) -> None:
    _, root = make_store()
    with serve(root.parent) as server:
        with pytest.raises(StoreError, match=rf"{server.url}/none.zarr: no such target store"):
            TargetStore.open(f"{server.url}/none.zarr")
        with pytest.raises(StoreError, match="not a target store"):
            TargetStore.open(f"{server.url}/s.zarr/frames")
        info = targets_info(InfoConfig(store=f"{server.url}/s.zarr"), Console(quiet=True))
        local = targets_info(InfoConfig(store=str(root)), Console(quiet=True))
        assert {k: info[k] for k in info if k not in ("store", "bytes", "bytes_a_row")} == {
            k: local[k] for k in local if k not in ("store", "bytes", "bytes_a_row")
        }
        with pytest.raises(StoreError, match="DISTINIT_CACHE"):
            TargetStore.open(f"{server.url}/s.zarr", cache=root / "zarr.json")
    assert is_url("s3://b/t.zarr")
    assert is_url("simplecache::http://h/t.zarr")
    assert not any(map(is_url, ("t.zarr", "/a:b/t.zarr", "file:///a", "a:b", str(root))))
    assert absolute("s3://b/t.zarr") == "s3://b/t.zarr"
    same(TargetStore.open(root), TargetStore.open(f"file://{root}"))
