"""Stage one on dask workers that meet errors: what one raises costs its shard a try, and the worker
goes on."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from distributed import Client, LocalCluster

from distinit.pipeline.common.console import Console
from distinit.pipeline.common.errors import DistInitError, StoreMismatchError
from distinit.pipeline.extraction import cluster as extract_cluster
from distinit.pipeline.extraction.cluster import WorkerSetup, fill_shard, run_shards
from distinit.pipeline.extraction.extract_options import ExtractConfig
from distinit.pipeline.extraction.machine import run_record
from distinit.pipeline.extraction.shard_filler import SegmentTask, ShardTask
from distinit.pipeline.store.reader import TargetStore
from distinit.pipeline.store.writer import StoreWriter
from distinit.pipeline.teachers.teacher import load_teacher
from distinit.pipeline.teachers.teacher_options import TeacherSpec
from distinit.pipeline.video.encode import write_video
from distinit.pipeline.video.sampling import Sampling
from distinit.stages.extract_targets import extract_targets

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("forked_workers")]

QUIET = Console(quiet=True)
NAME = "flaky_teachers:teacher"
MODULE = """
import pathlib
import weakref

import torch
from torch import nn

SEEN = []


class Flaky(nn.Sequential):
    '''Runs out of memory as often as there are files in `trouble`, each of which counts for one batch.'''

    def __init__(self, trouble):
        torch.manual_seed(0)
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 6))
        self.trouble = pathlib.Path(trouble)

    def forward(self, x):
        activations = x * 1
        for file in self.trouble.glob("*") if len(x) == 8 else ():
            try:
                file.unlink()
            except FileNotFoundError:  # another worker's
                continue
            SEEN.append(weakref.ref(activations))
            raise RuntimeError("CUDA out of memory (pretended)")
        return super().forward(activations)


def teacher(trouble):
    return Flaky(trouble)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, forked_workers: None) -> Iterator[Path]:
    """videos/ of four shards, the teacher's module, and whole.zarr, the store of an extraction
    without trouble."""
    home = tmp_path_factory.mktemp("cluster")
    (home / "modules").mkdir()
    (home / "modules" / "flaky_teachers.py").write_text(MODULE)
    (home / "videos").mkdir()
    (home / "trouble").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        shade = rng.integers(0, 200, (100, 1, 1, 3)) // 4 + rng.integers(0, 150, (1, 4, 6, 3))
        write_video(
            home / "videos" / f"v{number}.mp4",
            shade.repeat(8, 1).repeat(8, 2).astype(np.uint8),
            fps=25,
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(home / "modules"))
        patch.setenv("PYTHONPATH", str(home / "modules"), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        extract_targets(config(home, home / "whole.zarr"), QUIET)
        yield home
    sys.modules.pop("flaky_teachers", None)


@pytest.fixture(scope="module")
def scheduler(home: Path) -> Iterator[str]:
    """Start a cluster with one worker, whose four threads fill four shards at a time."""
    with LocalCluster(n_workers=1, threads_per_worker=4, dashboard_address=":0") as cluster:
        yield cluster.scheduler_address


def config(home: Path, out: Path, **changes: Any) -> ExtractConfig:
    options = {"name": "tiny", "input_size": "32", "resize": "32", "trouble": str(home / "trouble")}
    base = {
        "sources": [str(home / "videos")],
        "out": out,
        "batch_size": 8,
        "shard_rows": 256,
        "decoders": 1,
    }
    teachers = [TeacherSpec(name=NAME, options=options)]
    return ExtractConfig.model_validate(
        {**base, "teachers": teachers, "sampling": Sampling(every=1), **changes}
    )


def trouble(home: Path, batches: int) -> None:
    """Let so many batches fail, and none that an earlier test left over."""
    for file in (home / "trouble").iterdir():
        file.unlink()
    for number in range(batches):
        (home / "trouble" / str(number)).touch()


def same(a: Path, b: Path) -> None:
    x, y = TargetStore.open(a), TargetStore.open(b)
    assert x.index.n_shards == y.index.n_shards > 2
    for v in range(x.n_videos):
        (i, _, rows), (j, _, others) = x.frames(v), y.frames(v)
        np.testing.assert_array_equal(i, j)
        np.testing.assert_array_equal(x.logits("tiny", rows), y.logits("tiny", others))


def test_an_error_in_a_worker_costs_its_shard_one_try(home: Path, tmp_path: Path) -> None:
    """The test starts its own worker; the other tests here share one."""
    trouble(home, 1)
    result = extract_targets(config(home, tmp_path / "s.zarr", workers=1), QUIET)
    assert list((home / "trouble").iterdir()) == []
    assert (result["ok"], result["failed"]) == (8, 0)
    same(home / "whole.zarr", tmp_path / "s.zarr")


def test_an_error_that_stays_is_the_one_that_is_told(
    home: Path, scheduler: str, tmp_path: Path
) -> None:
    trouble(home, 99)
    with pytest.raises(DistInitError, match=r"2 .*CUDA out of memory"):
        extract_targets(config(home, tmp_path / "s.zarr", scheduler=scheduler, retries=1), QUIET)
    trouble(home, 0)
    extract_targets(config(home, tmp_path / "s.zarr"), QUIET)
    same(home / "whole.zarr", tmp_path / "s.zarr")


def test_a_worker_is_as_new_after_any_number_of_errors_that_are_kept(
    home: Path, tmp_path: Path
) -> None:
    settings = config(home, tmp_path / "s.zarr", device="cpu")
    teachers = {"tiny": load_teacher(settings.teachers[0]).to(torch.device("cpu"), "fp32")}
    whole = TargetStore.open(home / "whole.zarr")
    segments = tuple(
        SegmentTask(v, v, whole.video_path(v), whole.video(v).digest, 0, None, 104)
        for v in range(2)
    )
    task = ShardTask(0, segments, {"tiny": "float16"}, frames_stored=False)
    threads = torch.get_num_threads()
    with StoreWriter(
        settings.out, sampling=Sampling(every=1).model_dump(), shard_rows=256
    ) as writer:
        run = run_record(8, "fp32", torch.device("cpu"))
        classes = [f"class {k}" for k in range(6)]
        writer.add_teacher("tiny", classes, {"name": NAME, "identity": {}, "run": run})
        engines = dict.fromkeys(teachers, "torch")
        setup = WorkerSetup.of(settings, writer, teachers, Sampling(every=1), run, engines)
        before = set(psutil.Process().children(recursive=True))
        kept = []
        for _ in range(6):  # more than the runner has batches
            trouble(home, 1)
            with pytest.raises(RuntimeError, match="out of memory") as caught:
                fill_shard(setup, task)
            kept.append(caught.value)
        gc.collect()
        import flaky_teachers

        assert len(flaky_teachers.SEEN) == 6
        assert [ref() for ref in flaky_teachers.SEEN] == [None] * 6
        assert fill_shard(setup, task).rows == 200
        decoders = set(psutil.Process().children(recursive=True)) - before
        assert decoders
        other = WorkerSetup.of(
            settings, writer, teachers, Sampling(every=1), run | {"torch": "1.0"}, engines
        )
        with pytest.raises(StoreMismatchError, match=r'"torch": "1\.0"'):
            fill_shard(other, task)
        assert not any(
            process.is_running() for process in decoders
        )  # another setup ends those before it
    torch.set_num_threads(threads)


def test_a_worker_elsewhere_with_many_threads_fills_the_same_store(
    home: Path, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble(home, 0)
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("\n".join("abcdef"))
    settings = config(home, tmp_path / "s.zarr")
    settings.teachers[0].options["classes"] = "names.txt"
    installed = torch.__version__.split("+")[0]
    with Client(scheduler) as client, monkeypatch.context() as patch:
        client.run(os.chdir, "/")
        patch.setattr(torch, "__version__", "0.0.1")  # the client's
        extract_targets(settings.model_copy(update={"scheduler": scheduler}), QUIET)
    same(home / "whole.zarr", tmp_path / "s.zarr")
    store = TargetStore.open(tmp_path / "s.zarr")
    assert list(store.teacher("tiny").classes) == list("abcdef")
    assert store.teacher("tiny").run["torch"] == installed


def test_workers_that_join_get_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(setup: None, task: ShardTask) -> int:
        time.sleep(0.05)
        return task.shard

    monkeypatch.setattr(extract_cluster, "fill_shard", slow)
    taken = 0

    def tasks() -> Iterator[ShardTask]:
        nonlocal taken
        for shard in range(120):
            taken += 1
            yield ShardTask(shard, (), {}, frames_stored=False)

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        results = run_shards(client, None, tasks(), retries=0)  # type: ignore[arg-type]
        shards = [next(results)]
        assert taken == extract_cluster.QUEUED  # enough waits for a cluster that adapts to grow
        cluster.scale(20)
        client.wait_for_workers(20)
        shards += [next(results), next(results)]
        assert taken >= extract_cluster.IN_FLIGHT * 20
        shards += results
    assert sorted(shards) == list(range(120))
