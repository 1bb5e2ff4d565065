"""Waiting for batches that do not come: shared memory that is full, batches that get lost, workers
that hang."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import multiprocessing.reduction as reduction
import multiprocessing.synchronize
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import get_worker_info

from distinit.pipeline.common import worker_status as worker_status
from distinit.pipeline.common.errors import (
    TrainingError,
    TrainingInterrupted,
    VideoError,
    WorkerDied,
)
from distinit.pipeline.training import loader, loader_workers
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches
from distinit.pipeline.training.loop import LossReport, fit
from distinit.pipeline.training.loop_options import LoopOptions

CPU = torch.device("cpu")
KEYS = EpochBatchSampler(batch_size=2, steps_per_epoch=5, epochs=1)


@pytest.fixture(autouse=True)
def _a_loop_without_end_is_a_failure() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError("still waiting for a batch after 30 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Examples:
    """In a worker, `odd` is done for the sample 4, which is in the third batch of `KEYS`."""

    def __init__(self, odd: Callable[[], Any]) -> None:
        self.odd = odd

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        found = self.odd() if key == (0, 4) and get_worker_info() is not None else None
        x = torch.full((1000,), float(key[1]))
        return {
            "x": x,
            "deep": {"t": x[:3]},
            "n": key[1],
            "name": str(key[1]),
            "empty": x[:0],
            "odd": found,
        }


def allow_4_kb() -> None:
    """As where /dev/shm is full: no room for a batch's 8 kB of `x`."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def nothing() -> None:
    pass


def hang() -> None:
    time.sleep(100)


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere shared memory is no file, which a limit holds for"
)
def test_full_shared_memory_is_an_error_of_one_line_that_says_what_helps():
    seen = []
    before = set(Path("/dev/shm").glob("torch_*"))
    with pytest.raises(TrainingError) as full:
        seen.extend(
            batch["n"].tolist()
            for batch in read_batches(Examples(allow_4_kb), KEYS, workers=2, device=CPU)
        )
    assert seen == [[0, 1], [2, 3]]
    assert not [
        path for path in set(Path("/dev/shm").glob("torch_*")) - before if path.stat().st_size == 0
    ]
    assert str(full.value) == (
        "shared memory (/dev/shm) is full: no room for a batch of 0.0 MB (File too large (27)); fewer workers "
        "(loop.workers, test.workers), a smaller batch or a larger /dev/shm (docker run --shm-size) help"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
@pytest.mark.parametrize("spare", [1, 4, 8, 12, 80])
def test_too_few_descriptors_are_an_error_that_says_which_limit(
    spare: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the first pipe to the last batch; or they are enough."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = [number for number in range(9999) if number not in used][spare]
    batches = read_batches(Examples(nothing), KEYS, workers=2, device=CPU, hang_s=5.0)
    failed = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        assert len(list(batches)) == 5
    except TrainingError as error:
        failed = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (failed is None) == (spare > 12)
    assert failed is None or (str(limit) in failed and "ulimit -n" in failed)
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("lock", [0, 1, 4, 7, 10])
def test_no_room_for_the_locks_of_the_queues_is_an_error_that_names_shared_memory(
    lock: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, real = [], multiprocessing.synchronize.SemLock.__init__

    def full(self: Any, *arguments: Any, **named: Any) -> None:
        made.append(1)
        if len(made) > lock:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *arguments, **named)

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    with pytest.raises(TrainingError, match="/dev/shm") as failed:
        list(read_batches(Examples(nothing), KEYS, workers=2, device=CPU))
    assert failed.value.__context__ is None
    assert not multiprocessing.active_children()
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_the_tensors_of_a_batch_are_moved_to_shared_memory_once(monkeypatch, how):
    monkeypatch.setattr(loader, "start_context", lambda device: multiprocessing.get_context(how))
    own, sent = (
        read_batches(Examples(nothing), KEYS, workers=workers, device=CPU) for workers in (0, 1)
    )
    for expected, batch in zip(own, sent, strict=True):
        assert torch.equal(batch["x"], expected["x"])
        assert torch.equal(batch["deep"]["t"], expected["deep"]["t"])
        assert batch["empty"].shape == (2, 0)
        assert batch["x"].is_shared()
        assert batch["deep"]["t"].is_shared()
        assert not expected["x"].is_shared()


def test_a_batch_that_a_worker_cannot_send_is_an_error(capfd):
    def secret() -> Callable[[], None]:
        return lambda: None  # no pickle

    began = time.monotonic()
    with pytest.raises(
        TrainingError, match=r"^a batch was lost .*: all are done, and none came for 1 s; 0 workers"
    ):
        list(read_batches(Examples(secret), KEYS, workers=2, device=CPU, hang_s=1.0))
    assert time.monotonic() - began < 15
    assert (
        "local object" in capfd.readouterr().err
    )  # of the worker: why; Python 3.13 has other words before it


def die_in_the_middle(how: str, signal_: int) -> None:
    """In a worker: end as one that is killed at that point of sending a batch."""
    frame: Any = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    queue = frame.f_locals["data_queue"]
    time.sleep(0.5)  # what was made before is sent

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal_)

    if how == "handing over a batch":
        # The main process hears of the end of the connection before it can hear of that of the
        # process.
        def late(connection: Any, *_: Any) -> None:
            time.sleep(0.5)  # it reads the next
            connection.close()
            time.sleep(0.3)
            die()

        reduction.send_handle = late  # type: ignore[assignment]
        return
    queue._wlock.acquire()
    if how == "in a length":
        os.write(queue._writer.fileno(), b"\0\0")
    elif how == "in a message":
        os.write(queue._writer.fileno(), (100).to_bytes(4, "big") + b"x" * 9)
    die()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["handing over a batch", "with the lock", "in a length", "in a message"]
)
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_while_it_sends_ends_in_an_error(monkeypatch, how, signal_):
    monkeypatch.setattr(loader_workers, "GRACE_S", 3.0)  # on a busy machine, too
    batches = read_batches(
        Examples(partial(die_in_the_middle, how, signal_)), KEYS, workers=2, device=CPU, hang_s=20.0
    )
    seen: list[list[int]] = []
    with pytest.raises(WorkerDied, match=signal.Signals(signal_).name):
        seen.extend(batch["n"].tolist() for batch in batches)
    assert seen == [[0, 1], [2, 3]][: len(seen)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["handing over a batch", "with the lock", "in a length", "in a message"]
)
def test_a_video_that_kills_a_worker_which_sends_is_refused_and_the_batches_are_the_same(
    monkeypatch, how
):
    """Batches that it had made and not handed over are read again."""
    monkeypatch.setattr(loader_workers, "GRACE_S", 1.0)

    class Videos(Examples):
        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            example = super().__getitem__(key)
            if how == "handing over a batch" and key[1] == 0 and not worker_status._Own.refused:
                die_in_the_middle(how, signal.SIGSEGV)
            try:
                with worker_status.at(f"{key[1]}.mp4"):
                    if key[1] == 4 and get_worker_info() is not None:
                        if how != "handing over a batch":
                            die_in_the_middle(how, signal.SIGSEGV)
                        time.sleep(20.0)
            except VideoError as error:
                example["name"] = str(error)
            return example

    found = list(read_batches(Videos(nothing), KEYS, workers=2, device=CPU, hang_s=20.0))
    assert [batch["n"].tolist() for batch in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert [name for batch in found for name in batch["name"]] == [
        *"0123",
        "its decoder crashed (SIGSEGV)",
        *"56789",
    ]


def test_a_batch_that_cannot_be_received_though_no_worker_died_is_an_error(monkeypatch):
    monkeypatch.setattr(loader_workers, "GRACE_S", 0.5)

    def refuse() -> None:
        def close(connection: Any, *_: Any) -> None:
            connection.close()

        reduction.send_handle = close  # type: ignore[assignment]

    with pytest.raises(TrainingError) as lost:
        list(read_batches(Examples(refuse), KEYS, workers=2, device=CPU))
    assert not isinstance(lost.value, WorkerDied)


def test_a_worker_that_hangs_while_it_reads_no_video_is_an_error(monkeypatch):
    monkeypatch.setattr(loader, "PATIENCE", 5)
    began = time.monotonic()
    with pytest.raises(
        TrainingError,
        match=r"^a loader process hangs: no batch for 1 s, and no video is being read",
    ):
        list(read_batches(Examples(hang), KEYS, workers=2, device=CPU, hang_s=0.2))
    assert time.monotonic() - began < 15  # and is not waited for


def test_slow_workers_and_slow_steps_are_no_error():
    def late() -> None:
        time.sleep(1.0)

    count = 0
    for _ in read_batches(Examples(late), KEYS, workers=2, device=CPU, hang_s=0.3):
        count += 1
        time.sleep(1.0 if count == 2 else 0.0)
    assert count == 5


def test_an_error_that_speaks_of_time_is_not_taken_for_waiting():
    def fail() -> None:
        raise RuntimeError("the connection timed out")

    with pytest.raises(
        TrainingError, match=r"^a loader process failed: RuntimeError: the connection timed out$"
    ):
        list(read_batches(Examples(fail), KEYS, workers=1, device=CPU))


def test_only_a_wait_that_may_be_given_up_is():
    """Not that of a validation during which SIGTERM comes."""

    def late() -> None:
        time.sleep(1.0)

    batches = read_batches(Examples(late), KEYS, workers=1, device=CPU, hang_s=0.2)
    assert [batch["n"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    batches = read_batches(Examples(hang), KEYS, workers=1, device=CPU, stop=lambda: True)
    assert [batch["n"].tolist() for batch in batches] == [[0, 1], [2, 3]]


def test_sigterm_while_no_batch_comes_writes_the_checkpoint(tmp_path: Path):
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    class Mean:
        def counts(self, batch: Any) -> torch.Tensor:
            return torch.tensor([len(batch["x"])])

        def __call__(self, model: nn.Module, batch: Any, counts: torch.Tensor) -> LossReport:
            if batch["n"][0] == 2:  # the last step before the wait
                threading.Timer(1.0, send).start()
            loss = model(batch["x"]).mean()
            return LossReport(loss, {"loss/t": loss.detach()})

    def train(odd: Callable[[], Any], **options: Any) -> int:
        settings = LoopOptions(
            batch_size=2, epochs=1, epoch_clips=10, lr=1e-6, workers=1, threads=1, device="cpu"
        )
        run = {"objective": Mean(), "run_dir": tmp_path, "identity": {}}
        return fit(
            model=nn.Linear(1000, 1), dataset=Examples(odd), options=settings, **run, **options
        ).resumed_from

    with pytest.raises(
        TrainingInterrupted, match=r"^interrupted at step 2 of 5; the checkpoint is written"
    ):
        train(hang)
    assert time.monotonic() - sent[0] < 5
    assert train(nothing, resume=True) == 2
