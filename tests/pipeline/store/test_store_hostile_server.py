"""Servers that send wrong, slow or too much data, and stores that name files of others:
reading ends early with an error that names the URL."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import yarl

from distinit.pipeline.common.errors import StoreError
from distinit.pipeline.store import cache, remote, web
from distinit.pipeline.store import layout as fmt
from distinit.pipeline.store.digests import seal
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.writer import StoreWriter
from distinit.tests.thorough import some

pytestmark = pytest.mark.network

# Bytes of a node or text chunk in these tests; the files of the store are smaller.
LIMIT = 300_000
KINDS = [
    "zarr.json",
    "plans/000000/zarr.json",
    "segments/shard/zarr.json",
    "segments/first/c/0",
    "videos/path/c/0",
    "commits/frames/000000/zarr.json",
    "teachers/t/zarr.json",
    "teachers/t/class/c/0",
    "teachers/t/logits/zarr.json",
    "teachers/t/logits/c/0/0",
    "teachers/f/features/c/0/0",
    "teachers/f/statistics/000000/zarr.json",
    "teachers/p/basis/c/0/0",
    "teachers/p/mean/zarr.json",
    "frames/pts/c/0",
]
FEATURES = {"features": {"f": 6}, "pca": {"p": 6}}
NODES = [kind for kind in KINDS if kind.endswith("zarr.json")]

Trick = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Server:
    """A folder behind HTTP.

    tricks: the function that answers a path, or */NAME. requests: path and headers of each.
    """

    root: Path
    url: str = ""
    tricks: dict[str, Trick] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    sent: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serve(root: Path, host: str = "127.0.0.1") -> Iterator[Server]:
    state = Server(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            path = self.path.partition("?")[0]
            trick = state.tricks.get(path) or state.tricks.get(f"*/{path.rpartition('/')[2]}")
            with suppress(OSError):
                (trick or send_file)(self)

        def log_message(self, *args: Any) -> None:
            return

    def send_file(handler: BaseHTTPRequestHandler) -> None:
        file = root / handler.path.partition("?")[0].strip("/")
        answer(
            handler, file.read_bytes() if file.is_file() else b"", 200 if file.is_file() else 404
        )

    with ThreadingHTTPServer((host, 0), Handler) as server:
        server.daemon_threads = True
        server.state = state  # type: ignore[attr-defined]
        state.url = f"http://{host}:{server.server_port}"
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        thread.start()
        try:
            yield state
        finally:
            state.stop.set()
            server.shutdown()
            thread.join()


def answer(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, **headers: str) -> None:
    """Send a whole response, or the requested range."""
    if status == 200 and "Range" in handler.headers:
        first, last = (int(x) for x in handler.headers["Range"].removeprefix("bytes=").split("-"))
        data, status = data[first : last + 1], 206
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def without_end(handler: BaseHTTPRequestHandler, piece: bytes, **headers: str) -> None:
    """Send a piece repeatedly until the server is stopped."""
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    state = handler.server.state  # type: ignore[attr-defined]
    while not state.stop.is_set():
        handler.wfile.write(piece)
        state.sent += len(piece)


def endless(handler: BaseHTTPRequestHandler) -> None:
    without_end(handler, b" " * 65536)


def endless_in_chunks(handler: BaseHTTPRequestHandler) -> None:
    handler.protocol_version = "HTTP/1.1"
    without_end(handler, b"8000\r\n" + b" " * 0x8000 + b"\r\n", Transfer_Encoding="chunked")


def claims_a_terabyte(handler: BaseHTTPRequestHandler) -> None:
    without_end(handler, b" " * 65536, Content_Length=str(1 << 40))


def bomb(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, gzip.compress(bytes(50_000_000), 9), 201 - 1, Content_Encoding="gzip")


def drip(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.state.stop.wait(0.05):  # type: ignore[attr-defined]
        handler.wfile.write(b" ")


def drip_of_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n")
    while not handler.server.state.stop.wait(0.05):  # type: ignore[attr-defined]
        handler.wfile.write(b"A: b\r\n")


def silence(handler: BaseHTTPRequestHandler) -> None:
    handler.server.state.stop.wait(90)  # type: ignore[attr-defined]


def silence_after_a_byte(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.server.state.stop.wait(90)  # type: ignore[attr-defined]


def redirect(url: str) -> Trick:
    return lambda handler: answer(handler, b"", 302, Location=url)


@pytest.fixture(autouse=True)
def small_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small stores be read as large ones are, and failed requests be repeated at once."""
    for name, value in (
        ("WHOLE_FILE_BYTES", 1500),
        ("BLOCK_BYTES", 1024),
        ("MAX_FILE_BYTES", LIMIT),
        ("WAITS_S", (0.0,)),
    ):
        monkeypatch.setattr(remote, name, value)
    monkeypatch.setenv("DISTINIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce timeouts of a minute to two seconds, which is enough on a busy machine."""
    for name, value in (("STALL_S", 1.5), ("SLOW_S", 2.0), ("SLOW_RATE", 1000)):
        monkeypatch.setattr(web, name, value)


def read_all(url: str, **options: Any) -> np.ndarray:
    """Return everything that a training reads from a store, as one array."""
    store = TargetStore.open(url, **options)
    parts = []
    for v in range(store.n_videos):
        _ = store.video(v)
        rows = store.frames(v)[2]
        parts += [store.outputs(name, rows).ravel() for name in store.teachers]
    parts += [store.statistics(name)[0] for name in store.teachers]
    return np.concatenate(parts)


def refused(
    server: Server, trick: Trick, kind: str, within: float = 15, named: str | None = None
) -> str:
    """Return the message of the error for a trick on one file; check that it is raised in time."""
    server.tricks = {f"/s.zarr/{kind}": trick}
    start = time.monotonic()
    with pytest.raises(StoreError) as caught:
        read_all(f"{server.url}/s.zarr")
    assert time.monotonic() - start < within
    # With aiohttp 3.9 the headers may end up in the response to another request, for a file of the
    # same array.
    drips = getattr(trick, "__name__", "") == "drip_of_headers"
    file = kind.split("/c/")[0] if drips else kind.removesuffix("/zarr.json")
    assert f"{server.url}/s.zarr/{named or file}" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_ends_at_the_largest_size_of_a_file(
    make_store: Callable[..., Any], kind: str
) -> None:
    _, root = make_store(videos=range(12), **FEATURES)
    # Two tricks for each kind, so that every trick is applied to half of the kinds.
    tricks = [endless, endless_in_chunks, claims_a_terabyte, bomb]
    for trick in some(tricks, 2, KINDS.index(kind) % 2):
        with serve(root.parent) as server:
            refused(server, trick, kind)
            # The buffers of sockets take some of these bytes.
            assert server.sent < 30_000_000, trick.__name__


@pytest.mark.usefixtures("short_timeouts")
def test_a_slow_or_silent_server_ends_in_an_error(make_store: Callable[..., Any]) -> None:
    _, root = make_store(videos=range(12))

    def read(kind: str, trick: Trick) -> None:
        with serve(root.parent) as server:
            refused(server, trick, kind, within=60)

    kinds = ["zarr.json", "videos/path/c/0", "teachers/t/logits/c/0/0"]
    tricks = [drip, drip_of_headers, silence, silence_after_a_byte]
    # All of them wait, so they run at the same time.
    with ThreadPoolExecutor(len(kinds) * len(tricks)) as threads:
        list(threads.map(read, *zip(*itertools.product(kinds, tricks), strict=True)))


def test_unrequested_compression_is_read_within_bounds(
    make_store: Callable[..., Any],
) -> None:
    _, root = make_store(videos=range(12), **FEATURES)
    plain = read_all(str(root))

    def pack(handler: BaseHTTPRequestHandler) -> None:
        assert handler.headers["Accept-Encoding"] == "identity"
        file = root.parent / handler.path.strip("/")
        del handler.headers["Range"]
        answer(handler, gzip.compress(file.read_bytes()), Content_Encoding="gzip")

    with serve(root.parent) as server:
        server.tricks = {f"/s.zarr/{kind}": pack for kind in KINDS if (root / kind).exists()}
        np.testing.assert_array_equal(read_all(f"{server.url}/s.zarr"), plain)
        message = refused(server, lambda h: answer(h, b"x", Content_Encoding="br"), "zarr.json")
        assert "br" in message
        server.tricks = {}
        refused(
            server,
            lambda h: answer(h, gzip.compress(b"{}" * 99)[:-9], Content_Encoding="gzip"),
            "zarr.json",
        )


LOCATIONS = [
    "file:///etc/hostname",
    "ftp://127.0.0.1/a",
    "data:,{}",
    "",
    "http://[",
    "gopher:x",
    "//127.0.0.1:1/x",
]


# A third of the combinations includes all locations and all nodes.
@pytest.mark.parametrize(("location", "kind"), some(itertools.product(LOCATIONS, NODES), 3))
def test_redirects_lead_only_to_http(
    make_store: Callable[..., Any], kind: str, location: str
) -> None:
    _, root = make_store(videos=range(6), **FEATURES)
    with serve(root.parent) as server:
        refused(server, redirect(location), kind)


def test_a_redirect_to_nowhere_is_named(make_store: Callable[..., Any]) -> None:
    _, root = make_store(videos=range(6))
    with serve(root.parent) as server:
        message = refused(server, lambda handler: answer(handler, b"", 302), "zarr.json")
        assert "Location" in message


def test_redirects_end_and_short_ones_are_followed(make_store: Callable[..., Any]) -> None:
    _, root = make_store(videos=range(6))
    with serve(root.parent) as server:
        refused(server, redirect("/s.zarr/zarr.json"), "zarr.json")
        assert len(server.requests) == web.REDIRECTS + 1
        server.tricks = {
            f"/hop{n}": redirect(f"/hop{n - 1}" if n else "/moved.zarr/zarr.json")
            for n in range(web.REDIRECTS)
        }
        server.tricks["/s.zarr/zarr.json"] = redirect(f"/hop{web.REDIRECTS - 2}")
        os.symlink(root, root.parent / "moved.zarr")
        np.testing.assert_array_equal(read_all(f"{server.url}/s.zarr"), read_all(str(root)))


def test_https_is_not_left_for_http() -> None:
    for url, location in (
        ("https://h/a", "http://h/a"),
        ("https://h/a", "file:///a"),
        ("http://h/a", "s3://b/a"),
    ):
        with pytest.raises(web.ResponseError):
            web._redirected(yarl.URL(url), location)
    assert str(web._redirected(yarl.URL("http://h/a"), "https://u:p@h/b")) == "https://h/b"
    assert web._same_host(yarl.URL("http://h/a"), yarl.URL("https://h/b"))
    for other in ("http://h:81/a", "http://i/a", "https://h:444/a"):
        assert not web._same_host(yarl.URL("http://h/a"), yarl.URL(other))


@pytest.mark.parametrize("way", ["url", "headers", "client", "cookies"])
def test_secrets_are_sent_only_to_their_host(make_store: Callable[..., Any], way: str) -> None:
    import aiohttp

    _, root = make_store(videos=range(6))
    with serve(root.parent) as server, serve(root.parent, "127.0.0.2") as other:
        url, options = f"{server.url}/s.zarr", dict[str, Any]()
        if way == "url":
            url = url.replace("//", "//user:5ecret@") + "?token=5ecret"
        elif way == "headers":
            options = {
                "headers": {"X-Api-Key": "5ecret", "Authorization": "5ecret", "Cookie": "a=5ecret"}
            }
        elif way == "client":
            options = {
                "client_kwargs": {
                    "headers": {"X-Api-Key": "5ecret"},
                    "auth": aiohttp.BasicAuth("u", "5ecret"),
                }
            }
        else:
            options = {"client_kwargs": {"cookies": {"a": "5ecret"}}}
        server.tricks = {
            "*/zarr.json": lambda handler: redirect(f"{other.url}{handler.path.partition('?')[0]}")(
                handler
            )
        }
        read_all(url, storage_options=options)
        assert other.requests
        for path, headers in other.requests:
            assert "5ecret" not in path
            assert not {"authorization", "cookie", "x-api-key", "referer"}.intersection(
                map(str.lower, headers)
            )
        sent = [{k.lower(): v for k, v in headers.items()} for _, headers in server.requests]
        if way != "cookies":
            assert all({"authorization", "x-api-key"}.intersection(headers) for headers in sent)
        if way == "url":
            assert all(path.endswith("?token=5ecret") for path, _ in server.requests)


def test_a_missing_chunk_is_read_after_the_server_is_repaired(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    _, root = make_store(videos=range(12))
    plain = TargetStore.open(root)
    columns = ("videos/path", "videos/size", "segments/video", "segments/bound", "teachers/t/class")
    for kind in (f"{column}/c/0" for column in columns):
        for trick in (lambda h: answer(h, b"", 404), lambda h: answer(h, b"<html>sorry</html>")):
            with serve(root.parent) as server:
                refused(server, trick, kind, named=kind.removesuffix("/c/0"))
                server.tricks = {}
                store = TargetStore.open(f"{server.url}/s.zarr")
                assert [store.video(v) for v in range(12)] == [plain.video(v) for v in range(12)]
    # Stores of version 0.1 have no digests: a missing chunk is requested again by the next run.
    without_digests(root)
    with serve(root.parent) as server:
        server.tricks = {"/s.zarr/videos/size/c/0": lambda h: answer(h, b"", 404)}
        assert TargetStore.open(f"{server.url}/s.zarr").video(0).size == -1
        server.tricks = {}
        assert TargetStore.open(f"{server.url}/s.zarr").video(0).size == plain.video(0).size


# The reader requests 8 plans, then 16.
@pytest.mark.parametrize(("plans", "number"), [(4, 0), (4, 2), (9, 7), (10, 8)])
def test_a_plan_that_is_missing_before_another_is_named(
    make_store: Callable[..., Any], plans: int, number: int
) -> None:
    recipe, root = make_store(videos=range(6))
    columns: dict[str, list[Any]] = {spec.path.split("/")[1]: [1] for spec in fmt.video_specs()}
    with StoreWriter(root, sampling=recipe.sampling) as writer:
        while writer.index.n_plans < plans:
            columns |= {"path": [f"{writer.index.n_plans}.mp4"], "digest": [[1] * 16]}
            writer.add_videos(columns, writer.index.corpora)
    file = root / f"plans/{number:06d}/zarr.json"
    with serve(root.parent) as server:
        refused(server, lambda handler: answer(handler, b"", 404), f"plans/{number:06d}/zarr.json")
        # A server may send such a status while it starts.
        once = [404]
        server.tricks = {
            f"/s.zarr/plans/{number:06d}/zarr.json": lambda handler: (
                answer(handler, b"", once.pop()) if once else answer(handler, file.read_bytes())
            )
        }
        assert TargetStore.open(f"{server.url}/s.zarr").n_videos == TargetStore.open(root).n_videos
        assert not once


@pytest.mark.parametrize(
    "change",
    [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"", lambda d: d[::-1], lambda d: d * 2],
)
@pytest.mark.parametrize(
    "kind", ["teachers/t/logits/c/0/0", "teachers/p/features/c/0/0", "frames/video/c/0"]
)
def test_files_of_another_length_or_content_are_refused(
    make_store: Callable[..., Any], change: Callable[[bytes], bytes], kind: str
) -> None:
    _, root = make_store(videos=range(12), **FEATURES)
    data = (root / kind).read_bytes()
    with serve(root.parent) as server:
        # Only ranges of these files are read, and those are unchanged.
        if change(data).startswith(data) and "teachers" in kind:
            server.tricks = {f"/s.zarr/{kind}": lambda handler: answer(handler, change(data))}
            np.testing.assert_array_equal(read_all(f"{server.url}/s.zarr"), read_all(str(root)))
        else:
            refused(server, lambda handler: answer(handler, change(data)), kind)
        server.tricks = {}
        np.testing.assert_array_equal(read_all(f"{server.url}/s.zarr"), read_all(str(root)))


def without_digests(root: Path) -> None:
    for node in root.rglob("zarr.json"):
        document = json.loads(node.read_text())
        record = document.get("attributes", {}).get("distinit", {})
        for key in ("blake2b", "tables", "node_digests"):
            record.pop(key, None)
        node.write_text(json.dumps(document))


def test_a_damaged_column_in_the_cache_is_fetched_again(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    _, root = make_store(videos=range(6))
    with serve(root.parent) as server:
        url = f"{server.url}/s.zarr"
        plain = read_all(url)
        for column in ("videos/path", "segments/shard", "segments/bound"):
            for damage in (
                lambda d: d[:9],
                lambda d: bytes(len(d)),
                lambda d: d[:-1] + bytes([d[-1] ^ 1]),
            ):
                chunk = next((tmp_path / "cache/stores").glob(f"*/tables/*/{column}/c/0"))
                chunk.write_bytes(damage(chunk.read_bytes()))
                np.testing.assert_array_equal(read_all(url), plain)
                assert TargetStore.open(url).place(2) == TargetStore.open(root).place(2)


def change_rows(shard: Path) -> None:
    """Change a value in every chunk of a shard file of logits, with valid checksums."""
    data = bytearray(shard.read_bytes())
    chunks = 512 // 16
    index = np.frombuffer(bytes(data[-16 * chunks - 4 : -4]), "<u8").reshape(-1, 2)
    for offset, size in index.tolist():
        if offset != 2**64 - 1:
            data[offset] ^= 0x40
            crc = int(google_crc32c.value(bytes(data[offset : offset + size - 4])))
            data[offset + size - 4 : offset + size] = crc.to_bytes(4, "little")
    shard.write_bytes(data)


@pytest.mark.parametrize("whole_bytes", [1500, 4 << 20])
def test_a_store_with_the_digests_of_another_does_not_change_its_rows(
    make_store: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole_bytes: int,
) -> None:
    monkeypatch.setattr(remote, "WHOLE_FILE_BYTES", whole_bytes)
    _, root = make_store(videos=range(12))
    evil = shutil.copytree(root, tmp_path / "evil" / "s.zarr")
    change_rows(evil / "teachers/t/logits/c/0/0")
    plain = read_all(str(root))
    with serve(evil.parent) as evil_server, serve(root.parent) as server:
        url = f"{evil_server.url}/s.zarr"
        store = TargetStore.open(url)
        # From larger files, the server can send any rows.
        with suppress(StoreError):
            _ = store.logits("t", store.frames(0)[2])
        np.testing.assert_array_equal(read_all(f"{server.url}/s.zarr"), plain)
        for _ in range(2):
            # The digest is checked once the file is whole.
            with pytest.raises(StoreError, match=r"s\.zarr/teachers/t/logits/c/0/0"):
                read_all(url)
        np.testing.assert_array_equal(read_all(f"{server.url}/s.zarr"), plain)
        names = [file.name for file in (tmp_path / "cache/stores").glob("*/shards/*/*")]
        assert any(not name.endswith(".part") for name in names)


def test_different_spellings_of_a_url_are_one_store(
    make_store: Callable[..., Any], tmp_path: Path
) -> None:
    _, root = make_store(videos=range(6))
    with serve(root.parent) as server:
        for url in (
            server.url,
            server.url.replace("http", "HTTP"),
            server.url.replace("//", "//user:pass@"),
        ):
            read_all(f"{url}/s.zarr/")
            read_all(f"{url}/s.zarr?X-Amz-Signature=1{len(url)}")
        assert len(list((tmp_path / "cache/stores").iterdir())) == 1
        read_all(f"{server.url}/s.zarr?tenant=2")
        assert len(list((tmp_path / "cache/stores").iterdir())) == 2


def rewrite(node: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(node.read_text())
    change(document.get("attributes", {}).get("distinit", {}))
    node.write_bytes(seal(document))


def set_digest(value: Any) -> Callable[[Path, str], None]:
    def change(root: Path, victim: str) -> None:
        def all_files(record: dict[str, Any]) -> None:
            for file in record.get("files", {}).values():
                file["blake2b"] = (
                    value if not isinstance(value, str) else value.format(victim=victim)
                )

        for commit in (root / "commits").rglob("zarr.json"):
            rewrite(commit, all_files)

    return change


def set_size(value: Any) -> Callable[[Path, str], None]:
    def change(root: Path, victim: str) -> None:
        def all_files(record: dict[str, Any]) -> None:
            for file in record.get("files", {}).values():
                file["size"] = value

        for commit in (root / "commits").rglob("zarr.json"):
            rewrite(commit, all_files)

    return change


def set_id(value: Any) -> Callable[[Path, str], None]:
    def change(root: Path, victim: str) -> None:
        store_id = value.format(victim=victim) if isinstance(value, str) else value
        rewrite(root / "zarr.json", lambda a: a.update(store_id=store_id))

    return change


def set_teacher(value: str) -> Callable[[Path, str], None]:
    def change(root: Path, victim: str) -> None:
        name = value.format(victim=victim)
        for plan in (root / "plans").rglob("zarr.json"):
            rewrite(plan, lambda a: a.update(teachers=[name]) if a.get("teachers") else None)
        if not os.path.isabs(name) and name not in ("..", "t/../t", "t//t"):
            (root / "teachers" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(root / "teachers/t", root / "teachers" / name, dirs_exist_ok=True)
            shutil.copytree(
                root / "commits/teachers/t", root / "commits/teachers" / name, dirs_exist_ok=True
            )

    return change


TEACHERS = [
    "../../../victim",
    "{victim}",
    "..",
    "t/../t",
    "t?x=1",
    "t#x",
    "a%2f..%2fb",
    "a\\b",
    "t//t",
]
ESCAPES = [
    "../../../../victim",
    "../victim",
    "{victim}",
    "..",
    "",
    "A" * 32,
    "a" * 32 + "\n",
    "a" * 5000,
    7,
    None,
    [],
]


@pytest.mark.parametrize(
    "change",
    [
        *map(set_digest, ESCAPES),
        *map(set_id, ESCAPES),
        *map(set_size, [0, -1, 1, 10**18, 2**80, "9", None, 1.5]),
        *map(set_teacher, TEACHERS),
    ],
)
def test_no_value_of_a_store_names_a_file_outside_of_the_cache(
    make_store: Callable[..., Any], tmp_path: Path, change: Callable[[Path, str], None]
) -> None:
    _, root = make_store(videos=range(6))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    served = shutil.copytree(root, tmp_path / "served/deep/down/s.zarr")
    change(served, str(victim))
    before = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents}
    with serve(served.parent) as server:
        with pytest.raises(StoreError) as caught:
            read_all(f"{server.url}/s.zarr")
        assert server.url in str(caught.value)
        assert all(path.startswith("/s.zarr/") and ".." not in path for path, _ in server.requests)
    assert victim.read_text() == "precious"
    after = {path for path in tmp_path.rglob("*") if tmp_path / "cache" not in path.parents}
    assert after - {tmp_path / "cache"} == before - {tmp_path / "cache"}


@pytest.mark.parametrize("depth", range(6))
def test_no_link_in_the_cache_is_followed(
    make_store: Callable[..., Any], tmp_path: Path, depth: int
) -> None:
    _, root = make_store(videos=range(6))
    outside = tmp_path / "outside"
    outside.mkdir()
    with serve(root.parent) as server:
        url = f"{server.url}/s.zarr"
        read_all(url)
        shard = next((tmp_path / "cache/stores").glob("*/shards/*/*"))
        table = next((tmp_path / "cache/stores").glob("*/tables/*/videos/path"))
        parts = [
            *reversed(shard.relative_to(tmp_path / "cache").parents[:-1]),
            shard.relative_to(tmp_path / "cache"),
        ]
        link = tmp_path / "cache" / parts[depth] if depth < len(parts) else table
        shutil.move(link, outside / link.name)
        link.symlink_to(outside / link.name)
        content = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
        # A file without holes is not written to, so it is emptied.
        if depth == len(parts) - 1:
            (outside / link.name).write_bytes(b"")
            content = {outside / link.name: b""}
        with pytest.raises(StoreError, match="cache"):
            read_all(url)
        assert {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == content
    assert cache.NAME.fullmatch("teachers/t/logits/c/0/0")
