"""Students of the hub as the start of a finetuning, from a cache of the hub's layout."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml

from distinit.pipeline.ablation.steps import _init_digest
from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import CheckpointError, DistInitError
from distinit.pipeline.evaluation.evaluation_options import EmbedConfig, EvaluateConfig
from distinit.pipeline.evaluation.finetune_options import FinetuneConfig
from distinit.pipeline.students.initialization import canonical_init, resolve_init
from distinit.pipeline.students.student import build_student
from distinit.pipeline.students.student_files import load_student, save_student
from distinit.pipeline.students.student_options import StudentOptions
from distinit.stages.embed import embed
from distinit.stages.evaluate import evaluate
from distinit.stages.finetune import finetune

QUIET = Console(quiet=True)
COMMIT = "1" * 40
ADDRESS = "hf://org/name"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the folder of a repository's newest commit in an offline cache, with a student."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    student = build_student(StudentOptions(architecture="r3d_18", width=0.0625), {"teacher": 7})
    save_student(folder / "model.safetensors", student, {"clip_length": 4, "clip_size": 32})
    return folder


def test_an_address_is_the_file_that_it_names_and_no_folder_of_transformers(snapshot: Path) -> None:
    file = str(snapshot / "model.safetensors")
    for address in (ADDRESS, f"{ADDRESS}@main", f"{ADDRESS}@{COMMIT}"):
        assert canonical_init(address) == address
        init = resolve_init(address, None)
        fresh = build_student(init.options, {"label": 2})
        report = init.fill(fresh)
        assert report.path == address
        for name, tensor in load_student(file).backbone.state_dict().items():
            assert torch.equal(fresh.backbone.state_dict()[name], tensor)
        assert _init_digest(address) == _init_digest(file), "an ablation knows it by its bytes"
    wide = StudentOptions(architecture="r3d_18", width=1.0)
    with pytest.raises(CheckpointError, match="hf://org/name"):
        resolve_init(ADDRESS, wide).fill(build_student(wide, {"label": 2}))
    for wrong in ("hf://org", "hf://org/other", "hf://org/name@v9"):
        with pytest.raises(DistInitError, match=wrong):
            resolve_init(wrong, None)
    assert canonical_init("hf:a/folder").startswith("hf:/"), "a folder of transformers"


@pytest.mark.slow
def test_a_finetuning_starts_from_it_and_the_result_is_tested_and_embedded_from_the_hub(
    snapshot: Path, tiny_store: Any, tmp_path: Path
) -> None:
    labels, names = tmp_path / "labels.csv", sorted(tiny_store.videos.iterdir())
    rows = [f"{name},{'ab'[i % 2]},{'test' if i >= 8 else 'train'}" for i, name in enumerate(names)]
    labels.write_text("\n".join(["path,label,split1", *rows]) + "\n")
    run = tmp_path / "run"
    values: dict[str, Any] = {
        "init": ADDRESS,
        "dataset": f"csv:{labels}",
        "out": str(run),
        "loop": {"epochs": 1, "epoch_clips": 4, "batch_size": 4, "workers": 0, "device": "cpu"},
        "test": {"clips": 1, "workers": 0},
        "resume": "auto",
    }
    result = finetune(FinetuneConfig.model_validate(values), QUIET)
    loaded = load_student(snapshot / "model.safetensors").backbone.state_dict()
    assert result["tensors_loaded"] == len(loaded)
    used = yaml.safe_load((run / "config.yaml").read_text())["finetune"]
    assert used["init"] == ADDRESS
    assert used["clips"]["clip_frames"] == 4, "that of the file"
    assert finetune(FinetuneConfig.model_validate(values), QUIET)["already_finished"]

    shutil.copy(run / "model.safetensors", snapshot)
    tested = evaluate(
        EvaluateConfig.model_validate(
            {
                "runs": [ADDRESS],
                "dataset": f"csv:{labels}",
                "out": str(tmp_path / "tested"),
                "device": "cpu",
                "test": {"clips": 1, "workers": 0},
            }
        ),
        QUIET,
    )
    assert tested["metrics"]["top1"] == result["metrics"]["top1"]
    features = tmp_path / "f.npz"
    embed(
        EmbedConfig.model_validate(
            {"model": ADDRESS, "sources": [str(names[0])], "out": str(features), "clips": 1}
        ),
        QUIET,
    )
    with np.load(features) as arrays:
        assert np.isfinite(arrays["features"]).all()


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one file of one repository, in the paths of `resolve`."""

    content = b""
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        match = re.fullmatch(rf"/org/name/resolve/(main|{COMMIT})/model.safetensors", self.path)
        self.send_response(200 if match else 404)
        if match:
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        else:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(self.content) if match else 0))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if "/org/name/" in self.path:
            self.wfile.write(self.content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.network
def test_a_student_comes_over_http_once_and_what_is_not_there_is_named(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = snapshot / "model.safetensors"
    monkeypatch.setattr(Hub, "content", file.read_bytes())
    Hub.asked.clear()
    script = """
import sys, distinit
for address in sys.argv[1:]:
    try:
        student = distinit.load_student(address)
        print(sum(float(p.detach().double().sum()) for p in student.parameters()))
    except distinit.DistInitError as error:
        print(error)
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment = {k: v for k, v in environment.items() if k != "HF_HUB_OFFLINE"}

        addresses = [ADDRESS, f"{ADDRESS}@{COMMIT}", "hf://org/other"]
        process = subprocess.run(
            [sys.executable, "-c", script, *addresses],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        server.shutdown()
    assert process.returncode == 0, process.stderr
    first, again, missing = process.stdout.splitlines()
    expected = sum(float(p.detach().double().sum()) for p in load_student(file).parameters())
    assert (float(first), float(again)) == (expected, expected)
    fetched = [line for line in Hub.asked if line.startswith("GET") and "resolve" in line]
    assert fetched == ["GET /org/name/resolve/main/model.safetensors"]
    assert missing.startswith("hf://org/other")
