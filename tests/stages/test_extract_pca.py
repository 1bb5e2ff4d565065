"""Extraction around pca:D: growth of a store that has a basis, and what the basis depends on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import StoreMismatchError
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.store_options import ExportConfig, VerifyConfig
from distinit.pipeline.video.decoder import VideoReader
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.geometry import View, render
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets
from distinit.stages.targets_export import targets_export
from distinit.stages.targets_verify import targets_verify
from distinit.tests import warm

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        features = self.features(x)
        return {"logits": self.fc(features), "features": features}


def both():
    return Net()
"""
TEACHER = "pca_teachers:both"
OPTIONS = {"name": "t", "input_size": "32", "resize": "32"}
COMPONENTS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Corpora `old` and `new`, a store of `old`, and an export of it in pca:4 with small shards."""
    home = tmp_path_factory.mktemp("pca")
    (home / "modules").mkdir()
    (home / "modules" / "pca_teachers.py").write_text(MODULE)
    rng = np.random.default_rng(0)
    for number in range(16):
        folder = home / ("old" if number < 6 else "new")
        folder.mkdir(exist_ok=True)
        blocks = rng.integers(0, 255, (60 + number, 4, 6, 3)).repeat(8, 1).repeat(8, 2)
        write_video(folder / f"v{number:02d}.mp4", blocks.astype(np.uint8), fps=25, gop=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "modules"))
        patch.setenv("PYTHONPATH", str(home / "modules"), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        extract(home / "old", home / "s.zarr")
        export(home / "s.zarr", home / "pca.zarr", shard_rows=256)
        yield home


def extract(videos: Path, out: Path, **changes: Any) -> dict[str, Any]:
    teacher = {"name": TEACHER, "options": OPTIONS, "outputs": ["logits", "features"]}
    values = {"sources": [str(videos)], "out": out, "teachers": [teacher], "batch_size": 8,
             "decoders": 1, "sampling": Sampling(every=1), **changes}  # fmt: skip
    return extract_targets(ExtractConfig.model_validate(values), QUIET)


def words(videos: Path, out: Path) -> list[str]:
    """Return the words of the same command."""
    teacher_options = [w for k, v in OPTIONS.items() for w in ("--teacher-option", f"{k}={v}")]
    outputs = ["--teacher", TEACHER, "--teacher-output", "logits,features"]
    sizes = ["--batch-size", "8", "--decoders", "1", "--every", "1"]
    return ["extract-targets", str(videos), "--out", str(out), *outputs, *teacher_options, *sizes]


def export(store: Path, out: Path, **more: Any) -> None:
    values = {"store": str(store), "out": str(out), "encoding": f"pca:{COMPONENTS}", **more}
    targets_export(ExportConfig.model_validate(values), QUIET)


def files(store: Path, *patterns: str) -> dict[str, bytes]:
    """Return the content of a store's files that match one of the patterns, by path."""
    paths = {path for pattern in patterns for path in store.glob(pattern) if path.is_file()}
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}


def rows_and_statistics(store: Path) -> dict[str, bytes]:
    """Everything of a store that must not depend on what happened while it was made."""
    return files(store, "frames/**/c/**/*", "teachers/**/c/**/*", "teachers/*/statistics/**/*")


def findings(store: Path, deep: int = 0) -> list[Any]:
    more = {"deep": deep, "allow_teachers": [TEACHER]} if deep else {}
    options = VerifyConfig.model_validate({"store": str(store), **more})
    return [*targets_verify(options, QUIET)["findings"]]


def test_new_videos_are_encoded_by_the_basis_of_the_store(home: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(home / "pca.zarr", tmp_path / "pca.zarr"))
    before = rows_and_statistics(out) | files(out, "teachers/*/basis/**/*", "teachers/*/zarr.json")
    features = {"name": TEACHER, "options": OPTIONS, "outputs": ["features"]}
    with pytest.raises(StoreMismatchError, match=r"'t\.features'.*encoding.*pca:4"):
        extract(home / "new", out, encoding="int8", teachers=[features])
    result = extract(home / "new", out)
    assert result["teachers"] == {"t": 16, "t.features": 16}
    after = files(out, "**/*")
    assert {name: after[name] for name in before} == before
    assert findings(out) == findings(out, deep=16) == []
    store = TargetStore.open(out)
    codec = store.teacher("t.features").codec
    basis, mean = (np.asarray(a, np.float64) for a in (codec.basis, codec.mean))
    assert basis.shape == (COMPONENTS, 16)

    import pca_teachers

    module, kept = pca_teachers.both(), []
    norm = [torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    for video in store.usable().tolist():
        if store.place(video)[0] != "new":
            continue
        _, pts, rows = store.frames(video)
        with VideoReader(store.video_path(video)) as reader:
            plain = {p: render(f, View(resize=32, crop=32)) for _, p, f in reader.decode_plain()}
        images = torch.from_numpy(np.stack([plain[p] for p in pts])).permute(0, 3, 1, 2) / 255
        with torch.inference_mode():
            outputs = module((images - norm[0]) / norm[1])
        x = outputs["features"].double().numpy()
        expected = (x - mean) @ basis.T
        stored = {
            a: store.read_stored("t.features", a, rows) for a in ("features", "scale", "offset")
        }
        coefficients = stored["offset"][:, None] + stored["scale"][:, None] * stored["features"]
        # Half a step of int8, and what float32 leaves.
        assert (np.abs(coefficients - expected) <= 0.501 * stored["scale"][:, None] + 1e-5).all()
        kept.append(store.outputs("t.features", rows))
        np.testing.assert_allclose(kept[-1], mean + coefficients @ basis, atol=1e-5)
        np.testing.assert_allclose(store.outputs("t", rows), outputs["logits"], atol=0.01)
    assert sum(len(rows) for rows in kept) == sum(range(66, 76))
    every = store.outputs("t.features", store.committed_rows("t.features")).astype(np.float64)
    average, scale = store.statistics("t.features")
    np.testing.assert_allclose(average, every.mean(0), atol=1e-6)
    assert scale == pytest.approx(np.sqrt(((every - every.mean(0)) ** 2).mean()), rel=1e-6)


def test_killed_while_it_grows_the_store_becomes_that_of_an_undisturbed_run(
    home: Path, tmp_path: Path
) -> None:
    whole, broken = (
        Path(shutil.copytree(home / "pca.zarr", tmp_path / name)) for name in ("w.zarr", "b.zarr")
    )
    extract(home / "new", whole)
    commits = "commits/teachers/t.features/*/zarr.json"
    first, last = (len(list(store.glob(commits))) for store in (broken, whole))
    assert last >= first + 3
    for num_shards in (first + 1, first + 2):
        process = warm.Process(*words(home / "new", broken))
        while process.poll() is None and len(list(broken.glob(commits))) < num_shards:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(list(broken.glob(commits))) < last
    extract(home / "new", broken)
    assert rows_and_statistics(broken) == rows_and_statistics(whole)
    assert findings(broken) == []


@pytest.mark.cluster
@pytest.mark.usefixtures("forked_workers")
def test_neither_workers_nor_the_order_of_listing_change_the_basis(
    home: Path, tmp_path: Path
) -> None:
    """Values that are read are also equal: one process with large shards against two with small."""
    listed = [f"{path}\n" for path in sorted((home / "old").iterdir())]
    (tmp_path / "old.txt").write_text("".join(listed[::-1]))
    extract(tmp_path / "old.txt", tmp_path / "two.zarr", workers=2, shard_rows=256)
    export(home / "s.zarr", tmp_path / "one.pca.zarr")
    export(tmp_path / "two.zarr", tmp_path / "two.pca.zarr", shard_rows=512)
    one, two = (TargetStore.open(tmp_path / f"{name}.pca.zarr") for name in ("one", "two"))
    codecs = [store.teacher("t.features").codec for store in (one, two)]
    np.testing.assert_array_equal(codecs[0].basis, codecs[1].basis)
    np.testing.assert_array_equal(codecs[0].mean, codecs[1].mean)
    video_of = {Path(two.video_path(v)).name: v for v in range(two.n_videos)}
    names = [Path(one.video_path(v)).name for v in range(one.n_videos)]
    assert [video_of[name] for name in names] != sorted(video_of.values())
    for video, name in enumerate(names):
        rows = one.frames(video)[2], two.frames(video_of[name])[2]
        for teacher in ("t", "t.features"):
            a, b = (s.outputs(teacher, r) for s, r in zip((one, two), rows, strict=True))
            np.testing.assert_array_equal(a, b)
