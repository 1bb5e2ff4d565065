"""A small real store for the tests of training: videos encoded here, two tiny teachers, stage one
itself."""

from __future__ import annotations

import fcntl
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from distinit.pipeline.video.pool import decode_pool
from distinit.pipeline.video.pool.process import ForkServerProcess
from distinit.tests.store_recipe import make_store, recipe_stores

__all__ = ["make_store", "recipe_stores"]

# Property tests take a share of these examples; --hypothesis-profile=many is for a change of what
# they test.
settings.register_profile("many", max_examples=5000)

# Stores are hundreds of small folders, synced when they are written and removed with their test.
# On a disk half of the suite's time is waiting for that, so that files of tests are in memory where
# there is room. Read by pytest when the first test asks for a folder.
MEMORY, ROOM = Path("/dev/shm"), 4e9
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start would
# too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Of several workers of pytest-xdist each has a core: more threads would wait for one another.
# Before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not importlib.import_module("torch").cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="requires a CUDA device"))


class SharedForkServer(ForkServerProcess):
    """A fork server of decode processes that serves all pools of this process, one after another.

    Each would take half a second to start.
    """

    def close(self) -> tuple[int, bytes]:
        return super().close() if self.ended else (0, b"")


_fork_servers: list[SharedForkServer] = []


def shared_fork_server() -> SharedForkServer:
    if not _fork_servers or _fork_servers[-1].ended:
        _fork_servers.append(SharedForkServer())
    return _fork_servers[-1]


decode_pool.ForkServerProcess = shared_fork_server  # type: ignore[misc, assignment]


def pytest_unconfigure() -> None:
    for server in _fork_servers:
        ForkServerProcess.close(server)


TEACHERS = '''
import torch
from torch import nn


def teacher(k, gain):
    """Fixed random logits of 4x4 cells of the image: `gain` says how sure it is."""
    torch.manual_seed(k)
    linear = nn.Linear(48, k)
    linear.weight.data.mul_(gain)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear)
'''
EVERY = 4
FRAMES = [48, 40, 5, 31, 48, 64, 48, 33, 48, 48, 52, 48]
"""Frames of each video; the third is shorter than an 8-frame clip."""


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """`once(name, make)` → the folder that `make(folder)` filled, for all workers of pytest-xdist.

    The first that asks makes it, the others wait for it; nobody writes to it afterwards.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def shared(name: str, make: Callable[[Path], Any]) -> Path:
        folder, done = base / "once" / name, base / "once" / f"{name}.done"
        folder.parent.mkdir(exist_ok=True)
        with (base / "once" / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                # What a worker left behind that failed.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return shared


@dataclass(frozen=True)
class TinyStore:
    """Where the store and its videos lie."""

    path: Path
    videos: Path


@pytest.fixture(scope="session")
def tiny_store(once: Callable[[str, Callable[[Path], Any]], Path]) -> TinyStore:
    """12 videos of 96x64 pixels, every 4th frame seen by teachers `sure` (7 classes) and `unsure`
    (5)."""
    root = once("tiny", _make_tiny_store)
    return TinyStore(root / "targets.zarr", root / "videos")


def _make_tiny_store(root: Path) -> None:
    from distinit.pipeline.common.console import Console
    from distinit.pipeline.extraction.extract_options import ExtractConfig
    from distinit.pipeline.teachers.teacher_options import TeacherSpec
    from distinit.pipeline.video.encode import write_video
    from distinit.stages.extract_targets import extract_targets

    (root / "modules").mkdir()
    (root / "modules" / "tiny_teachers.py").write_text(TEACHERS)
    (root / "videos").mkdir()
    for number, frames in enumerate(FRAMES):
        write_video(
            root / "videos" / f"v{number:02d} é.mp4", moving_blobs(number, frames), fps=25, gop=12
        )
    sys.path.insert(0, str(root / "modules"))
    try:
        options = {"sure": {"k": "7", "gain": "20"}, "unsure": {"k": "5", "gain": "4"}}
        specs = [
            TeacherSpec(
                name="tiny_teachers:teacher", options={"name": name, "input_size": "32", **own}
            )
            for name, own in options.items()
        ]
        config = ExtractConfig(
            sources=[str(root / "videos")], out=root / "targets.zarr", teachers=specs
        )
        extract_targets(config, Console(quiet=True))
    finally:
        sys.path.remove(str(root / "modules"))


@pytest.fixture
def own_store(tiny_store: TinyStore, tmp_path: Path) -> TinyStore:
    """A copy of the videos that a test may harm; the store itself is shared and never written."""
    shutil.copytree(tiny_store.videos, tmp_path / "videos")
    return TinyStore(tiny_store.path, tmp_path / "videos")


def preload_fork_server() -> None:
    """Let Python's fork server import what processes of the tests need.

    Each of them would take seconds for torch alone.
    """
    multiprocessing.set_forkserver_preload(
        [
            "torchvision",
            "torch._dynamo",
            "distributed",
            "distinit.pipeline.extraction.cluster",
            *(f"distinit.stages.{name}" for name in ("train_student", "finetune", "evaluate")),
        ]
    )


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of `--gpus N`. `test_train_ranks` starts them as a user does, too."""
    from distinit.pipeline.training import launch

    preload_fork_server()
    config = launch.LaunchConfig
    monkeypatch.setattr(
        launch, "LaunchConfig", lambda **given: config(**{**given, "start_method": "forkserver"})
    )


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """Fork dask's workers that this process starts. Those of commands start as a user's do."""
    import dask
    from distributed import utils

    preload_fork_server()
    with pytest.MonkeyPatch.context() as patch:
        # dask would preload a list of its own.
        patch.setattr(utils, "_forkserver_preload_set", True, raising=False)
        with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
            yield


def moving_blobs(number: int, frames: int) -> np.ndarray:
    """Smooth coloured blobs that drift, uint8 [frames, 64, 96, 3]: neighbours differ, and so do
    videos."""
    random = np.random.default_rng(number)
    centre, speed = random.uniform(0, 64, (5, 2)), random.uniform(-2, 2, (5, 2))
    colour = random.uniform(0, 255, (5, 3))
    y, x = np.mgrid[0:64, 0:96]
    images = np.zeros((frames, 64, 96, 3))
    for t in range(frames):
        for blob in range(5):
            cy, cx = (centre[blob] + t * speed[blob]) % (64, 96)
            images[t] += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 300)[..., None] * colour[blob]
    return images.clip(0, 255).astype(np.uint8)


RANDOM_TEACHERS = """
import torch
from torch import nn


class Teacher(nn.Module):
    def __init__(self, k, broken):
        super().__init__()
        torch.manual_seed(k)
        self.linear = nn.Linear(48, k)
        self.broken = broken

    def forward(self, x):
        z = self.linear(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)) * 5
        # `broken`: not a number wherever the top left of the image is bright
        return torch.where((x[:, :, :16, :16].mean((1, 2, 3)) > self.broken)[:, None], float("nan"), z)


def teacher(k, broken=1e9):
    return Teacher(k, broken)
"""


@pytest.fixture
def random_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module random_teachers, for processes too: teacher(k, broken) has k fixed random logits
    of an image."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "random_teachers.py").write_text(RANDOM_TEACHERS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
