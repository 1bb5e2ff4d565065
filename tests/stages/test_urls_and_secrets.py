"""URLs that are programs are refused wherever one is given, a run's URL is data, and no password is
shown or kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from distinit.pipeline.ablation.ablate_options import AblateConfig
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreError, UsageError
from distinit.pipeline.common.urls import (
    PROTOCOLS,
    canonical_url,
    check_url,
    hide_secrets,
    is_url,
    public_url,
)
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import (
    BrowseConfig,
    ExportConfig,
    InfoConfig,
    MergeConfig,
    VerifyConfig,
)
from distinit.pipeline.training.distillation_options import TrainConfig
from distinit.stages.ablate import ablate
from distinit.stages.options import ReportConfig
from distinit.stages.report import report
from distinit.stages.targets_browse import targets_browse
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_info import targets_info
from distinit.stages.targets_merge import targets_merge
from distinit.stages.targets_verify import targets_verify
from distinit.stages.train_student import train_student
from distinit.tests import warm

QUIET = Console(quiet=True)
SECRET = "s3cr+t"
LOOP = {
    "batch_size": 4,
    "epochs": 1,
    "epoch_clips": 8,
    "lr": 0.02,
    "workers": 0,
    "threads": 1,
    "device": "cpu",
}
TRAIN = {
    "student": {"width": 0.125},
    "loop": LOOP,
    "clips": {"clip_frames": 8, "size": 32, "resize": [40, 60]},
}

REFUSED = [
    "reference::{folder}/refs.json",
    "reference://",
    "simplecache::http://127.0.0.1:{port}/s.zarr",
    "blockcache::s3://b/s.zarr",
    "filecache::file:///{folder}/s.zarr",
    "http://127.0.0.1:{port}/s.zarr::reference://x",
    "http://127.0.0.1:{port}/s.zarr::http://127.0.0.1:{port}/t.zarr",
    "zip://s.zarr::http://127.0.0.1:{port}/s.zip",
    "zip://{folder}/s.zip",
    "tar://s.tar",
    "ftp://127.0.0.1:{port}/s.zarr",
    "sftp://127.0.0.1/s.zarr",
    "ssh://127.0.0.1/s.zarr",
    "smb://127.0.0.1/s.zarr",
    "github://org:repo@main/s.zarr",
    "git://{folder}",
    "dir://x::file:///{folder}",
    "data://x",
    "memory://b/s.zarr",
    "local://{folder}",
    "async_wrapper://x",
    "libarchive://s.7z",
    "cached::http://127.0.0.1:{port}/s.zarr",
    "dask://x",
    "jupyter://127.0.0.1:{port}/s.zarr",
    "webhdfs://127.0.0.1:{port}/s.zarr",
    "nosuch://x",
    "HTTP+x://h/s.zarr",
    "http://",
    "http:///s.zarr",
    "http://h:port/s.zarr",
    "http://h/a b",
    "http://h/a\nb",
    "http://[::1/s.zarr",
    "s3://key:pass@bucket/s.zarr",
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """Serve a folder behind HTTP that requires a password; `heard` has the requests."""
    heard: list[tuple[str, str | None]] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append((self.path, self.headers.get("Authorization")))
            if "/locked/" in self.path and self.headers.get("Authorization") is None:
                self.send_error(401)
            else:
                super().do_GET()

        def log_message(self, *args: Any) -> None:
            return

    (tmp_path / "www/locked").mkdir(parents=True)
    handler = partial(Handler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        served.heard, served.folder = heard, tmp_path / "www"  # type: ignore[attr-defined]
        threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
        yield served
        served.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTINIT_CACHE", str(tmp_path / "cache"))


def program(folder: Path) -> Path:
    """References whose templates run code in versions of fsspec without a sandbox; returns what the
    code would make."""
    canary = folder / "canary"
    code = f"{{{{ cycler.__init__.__globals__.os.popen('touch {canary}').read() }}}}"
    references = {"version": 1, "templates": {"u": code}, "refs": {"zarr.json": "{{u}}"}, "gen": []}
    references["gen"] = [{"key": "k{{i}}", "url": code, "dimensions": {"i": [1]}}]
    (folder / "refs.json").write_text(json.dumps(references))
    return canary


@pytest.mark.network
@pytest.mark.parametrize("url", REFUSED)
def test_only_plain_urls_are_opened(url: str, server: Any, tmp_path: Path) -> None:
    canary = program(tmp_path)
    url = url.format(folder=tmp_path, port=server.server_port)
    with pytest.raises(UsageError) as caught:
        TargetStore.open(url)
    assert "pass@" not in str(caught.value)
    assert not server.heard
    assert not canary.exists()


@pytest.mark.network
@pytest.mark.parametrize("url", [REFUSED[0], REFUSED[2], REFUSED[5]])
def test_no_command_opens_another_url(url: str, server: Any, tmp_path: Path) -> None:
    canary = program(tmp_path)
    url, out = url.format(folder=tmp_path, port=server.server_port), str(tmp_path / "out")
    for use in (
        lambda: targets_info(InfoConfig(store=str(url)), QUIET),
        lambda: targets_browse(BrowseConfig(store=str(url), out=str(out)), QUIET),
        lambda: targets_export(ExportConfig(store=str(url), out=f"{out}.zarr"), QUIET),
        lambda: targets_merge(MergeConfig(parts=[str(url), str(url)], out=f"{out}.zarr"), QUIET),
        lambda: targets_verify(VerifyConfig(store=str(url)), QUIET),
        lambda: train_student(
            TrainConfig.model_validate({**TRAIN, "store": url, "out": out}), QUIET
        ),
        lambda: ablate(
            AblateConfig(plan="picks", store=url, out=out, datasets=["csv:none"]), QUIET
        ),
    ):
        with pytest.raises(UsageError):
            use()
    assert not server.heard
    assert not canary.exists()
    assert not Path(out).exists() or not any(Path(out).iterdir())


def test_the_error_names_the_url_and_what_is_allowed() -> None:
    with pytest.raises(UsageError) as caught:
        check_url("ftp://user:hidden@host/s.zarr")
    assert "ftp://host/s.zarr" in str(caught.value)
    assert all(f"{name}://" in str(caught.value) for name in PROTOCOLS)
    for good in (
        "http://[::1]:80/s.zarr",
        "hf://datasets/org/name@main/s.zarr",
        "s3://b/s.zarr",
        "HTTPS://h/s",
        "gs://b",
    ):
        check_url(good)
        assert is_url(good)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pa@ss@h:1/s.zarr", "http://h:1/s.zarr"),
        ("https://user@h/s.zarr?X-Amz-Signature=abc", "https://h/s.zarr"),
        ("https://h/s.zarr?token=abc#x", "https://h/s.zarr"),
        ("https://h/a@b/s.zarr", "https://h/a@b/s.zarr"),
        ("http://u:pa/ss@h/s.zarr", "http://…"),
        ("http://u:pa?ss@h/s.zarr", "http://…"),
        ("http://u:pa#ss@h/s.zarr", "http://…"),
        ("hf://datasets/org/name@main/s.zarr", "hf://datasets/org/name@main/s.zarr"),
        ("simplecache::http://u:p@h/s.zarr", "simplecache::http://h/s.zarr"),
        ("/data/u:p@h/s.zarr", "/data/u:p@h/s.zarr"),
        ("file:///a?b", "file:///a?b"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    assert public_url(url) == shown
    if "…" not in shown and is_url(url):
        assert hide_secrets(f"cannot open '{url}'").startswith(
            f"cannot open '{shown.partition('?')[0]}"
        )
    assert (
        canonical_url("HTTP://u:p@H:80/s/?b=1&token=2")
        == canonical_url("http://h/s?b=1")
        != canonical_url("http://h/s")
    )


def strangers_run(folder: Path, store: Any) -> Path:
    run = folder / "runs/theirs"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"train-student": {"store": store}}))
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    return run.parent


@pytest.mark.network
@pytest.mark.parametrize(
    "url",
    [
        "http://user:{secret}@127.0.0.1:{port}/s.zarr?token={secret}",
        "reference::http://u:{secret}@127.0.0.1:{port}/r",
    ],
)
def test_a_report_contacts_no_address_of_a_run(
    url: str, server: Any, tmp_path: Path, tiny_store: Any
) -> None:
    shutil.copytree(tiny_store.path, server.folder / "s.zarr")
    url = url.format(secret=SECRET, port=server.server_port)
    runs = strangers_run(tmp_path, url)
    report(ReportConfig(folders=[str(runs)], out=str(tmp_path / "page")), QUIET)
    assert not server.heard
    assert not (tmp_path / "cache").exists()
    pages = [(tmp_path / "page" / name).read_text() for name in ("report.html", "report.md")]
    assert all(
        "--open-urls" in page and "127.0.0.1" in page and SECRET not in page for page in pages
    )
    if url.startswith("http"):
        result = report(
            ReportConfig(folders=[str(runs)], out=str(tmp_path / "page"), open_urls=True), QUIET
        )
        assert server.heard
        assert any("entropy" in name for name in result["figures"])
    else:
        report(ReportConfig(folders=[str(runs)], out=str(tmp_path / "page"), open_urls=True), QUIET)
        assert not server.heard


def test_a_report_reads_the_reference_of_no_run(tmp_path: Path) -> None:
    canary = program(tmp_path)
    for number, store in enumerate((f"reference::{tmp_path}/refs.json", "a\0b", f"x::{tmp_path}")):
        report(
            ReportConfig(
                folders=[str(strangers_run(tmp_path / str(number), store))],
                out=str(tmp_path / "page"),
                open_urls=True,
            ),
            QUIET,
        )
    assert not canary.exists()


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return warm.run(*words)


def places_with(text: str, folder: Path) -> list[Path]:
    """Files whose name or content holds the text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes() or text in str(path)]


@pytest.mark.network
def test_no_password_stays_on_disk_or_screen(server: Any, tmp_path: Path, tiny_store: Any) -> None:
    shutil.copytree(tiny_store.path, server.folder / "locked/s.zarr")
    bare = f"http://127.0.0.1:{server.server_port}/locked/s.zarr"
    url = bare.replace("//", f"//user:{SECRET}@") + f"?sig={SECRET}"
    options = ["--set", "student.width=0.125", "--set", "loop=" + json.dumps(LOOP)]
    options += ["--set", "clips=" + json.dumps(TRAIN["clips"])]
    run, page = str(tmp_path / "runs/r"), str(tmp_path / "page")
    train = ["train-student", "--store", url, "--out", run, *options]
    processes = [
        cli("targets", "info", url),
        cli("targets", "info", url, "--json"),
        cli("targets", "browse", url, "--out", str(tmp_path / "look")),
        cli("targets", "export", url, "--out", str(tmp_path / "part.zarr")),
        cli(*train, "--dry-run"),
        cli(*train),
        cli("train-student", "--config", f"{run}/config.yaml", "--store", url, "--resume"),
        cli("report", str(tmp_path / "runs"), "--out", page),
    ]
    assert [process.returncode for process in processes] == [0] * len(processes), [
        process.stderr[-300:] for process in processes
    ]
    wrong = [
        cli("targets", "info", bare, "--debug"),
        cli("targets", "info", url.replace("s.zarr", "none.zarr"), "--debug"),
        cli("targets", "info", url.replace("127.0.0.1:", "127.0.0.1:x"), "--debug"),
        cli("targets", "info", url.replace("http", "ftp"), "--debug"),
        cli("targets", "info", url.replace(str(server.server_port), "1"), "--debug"),
        cli("targets", "info", url, url),
        cli("targets", "info", f"--x={url}"),
        cli("targets", "verify", url, "--debug"),
        cli("targets", "merge", url, url, "--out", str(tmp_path / "m.zarr"), "--debug"),
        cli("targets", "export", str(tiny_store.path), "--out", url, "--debug"),
        cli("extract-targets", str(tiny_store.videos), "--out", url, "--teacher", "x", "--debug"),
    ]
    assert all(process.returncode in (1, 2) for process in wrong)
    for process in (*processes, *wrong):
        assert SECRET not in process.stdout + process.stderr, process.args[:2]
    assert not places_with(SECRET, tmp_path / "runs") + places_with(SECRET, tmp_path)
    assert yaml.safe_load(Path(run, "config.yaml").read_text())["train-student"]["store"] == bare
    assert "401" in wrong[0].stderr
    with pytest.raises(StoreError):
        TargetStore.open(bare)
