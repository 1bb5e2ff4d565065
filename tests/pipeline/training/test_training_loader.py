"""Loader processes: the same batches as without them, and clear errors when one dies, hangs or
reaches a limit."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distinit.pipeline.common import worker_status
from distinit.pipeline.common.errors import (
    TrainingError,
    TrainingInterrupted,
    UsageError,
    VideoError,
    WorkerDied,
)
from distinit.pipeline.training import loader_workers
from distinit.pipeline.training.loader import EpochBatchSampler, read_batches
from distinit.pipeline.training.loop import LossReport, fit
from distinit.pipeline.training.loop_options import LoopOptions
from distinit.tests.signals import die_by

CPU = torch.device("cpu")
KEYS = EpochBatchSampler(batch_size=2, steps_per_epoch=5, epochs=1)
ALL = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.fixture(autouse=True)
def _an_endless_loop_is_a_failure() -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise AssertionError("still waiting for a batch after 60 s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def in_worker() -> bool:
    return multiprocessing.parent_process() is not None


class Examples:
    """In a worker, `fault` is called for sample 4, which is in the third batch of `KEYS`."""

    def __init__(self, fault: Callable[[], Any]) -> None:
        self.fault = fault

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        value = self.fault() if key == (0, 4) and in_worker() else None
        x = torch.full((1000,), float(key[1]))
        return {
            "x": x,
            "odd_bytes": torch.arange(3, dtype=torch.uint8),
            "deep": {"t": x[:3]},
            "n": key[1],
            "name": str(key[1]),
            "empty": x[:0],
            "fault": value,
        }


def nothing() -> None:
    pass


def hang() -> None:
    time.sleep(100)


def numbers(batches: Iterator[dict[str, Any]]) -> Iterator[list[int]]:
    return (batch["n"].tolist() for batch in batches)


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_of_workers_are_those_of_this_process(monkeypatch, how):
    monkeypatch.setattr(
        loader_workers, "start_context", lambda device: multiprocessing.get_context(how)
    )
    local, received = (
        read_batches(Examples(nothing), KEYS, workers=workers, device=CPU) for workers in (0, 2)
    )
    count = 0
    for expected, batch in zip(local, received, strict=True):
        assert batch.keys() == expected.keys()
        for name in ("x", "n", "odd_bytes", "empty"):
            assert batch[name].dtype == expected[name].dtype
            assert torch.equal(batch[name], expected[name])
        assert torch.equal(batch["deep"]["t"], expected["deep"]["t"])
        assert (batch["name"], batch["fault"]) == (expected["name"], expected["fault"])
        # Its memory is not shared with another process or batch.
        batch["x"] += 1
        count += 1
    assert count == 5


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
@pytest.mark.parametrize("spare", [1, 4, 6, 80])
def test_too_few_descriptors_are_an_error_that_names_the_limit(
    spare: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The limit is reached at any point from the first pipe to the last batch, or not at all."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Otherwise the collector may close a file of an earlier test during this one.
    gc.collect()
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    limit = [number for number in range(9999) if number not in used][spare]
    batches = read_batches(Examples(nothing), KEYS, workers=2, device=CPU, timeout_s=5.0)
    message = None
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        assert list(numbers(batches)) == ALL
    except TrainingError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (message is None) == (spare == 80)
    assert message is None or (str(limit) in message and "ulimit -n" in message)
    assert not multiprocessing.active_children()
    assert "Traceback" not in capfd.readouterr().err


def no_room() -> None:
    """Refuse the memory for the 8 kB of `x` of a batch."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def no_pickle() -> Callable[[], None]:
    return lambda: None


def bug() -> None:
    raise RuntimeError("the connection timed out")


def misuse() -> None:
    raise UsageError("--x: 3 is not allowed")


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (no_room, TrainingError, "cannot send a batch: OSError"),
        (no_pickle, TrainingError, "cannot send a batch"),
        (bug, TrainingError, "RuntimeError: the connection timed out"),
        (misuse, UsageError, "--x: 3 is not allowed"),
    ],
)
def test_an_error_of_a_worker_takes_the_place_of_its_batch(fault, kind, message):
    seen = []
    with pytest.raises(kind, match=message) as failed:
        seen.extend(numbers(read_batches(Examples(fault), KEYS, workers=2, device=CPU)))
    assert seen == ALL[:2]
    assert type(failed.value) is kind
    assert not multiprocessing.active_children()


def test_a_batch_that_was_sent_before_the_death_arrives():
    """The worker has ended before its batches are received."""

    class Videos(Examples):
        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            if key[1] == 6:
                die_by(signal.SIGKILL)
            return super().__getitem__(key)

    batches = read_batches(Videos(nothing), KEYS, workers=1, device=CPU)
    seen = [next(batches)]
    while multiprocessing.active_children():
        time.sleep(0.05)
    with pytest.raises(WorkerDied, match="SIGKILL") as died:
        seen.extend(batches)
    assert list(numbers(iter(seen))) == ALL[:3]
    assert (died.value.path, died.value.reason) == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in a length", "in a message", "before the memory"])
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_while_it_sends_ends_in_an_error(how, signal_):
    def die_in_the_middle() -> None:
        def send_in_part(connection: Any, batch: Any) -> None:
            if how == "in a length":
                os.write(connection.fileno(), b"\0\0")
            elif how == "in a message":
                os.write(connection.fileno(), (100).to_bytes(4, "big") + b"x" * 9)
            else:
                loader_workers.send_handle = lambda *_: die_by(signal_)
                send(connection, batch)
            die_by(signal_)

        send = loader_workers.send_batch
        loader_workers.send_batch = send_in_part

    seen: list[list[int]] = []
    batches = read_batches(Examples(die_in_the_middle), KEYS, workers=2, device=CPU)
    with pytest.raises(WorkerDied, match=signal.Signals(signal_).name):
        seen.extend(numbers(batches))
    assert seen == ALL[:2]


class Videos(Examples):
    """Sample 4 is read from v4.mp4; in a worker `fault` is called meanwhile."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        try:
            with worker_status.record_read(f"v{key[1]}.mp4"):
                return super().__getitem__(key)
        except VideoError as error:
            return super().__getitem__((1, key[1])) | {"name": str(error)}


@pytest.mark.parametrize(
    ("signal_", "reason"),
    [(signal.SIGSEGV, "its decoder crashed (SIGSEGV)"), (signal.SIGKILL, "")],
)
def test_a_worker_that_dies_names_its_file(signal_, reason):
    def die() -> None:
        die_by(signal_)

    with pytest.raises(WorkerDied, match=r"v4\.mp4") as died:
        list(read_batches(Videos(die), KEYS, workers=2, device=CPU))
    assert (died.value.path, died.value.reason) == ("v4.mp4", reason)


@pytest.mark.slow
@pytest.mark.parametrize("how", [hang, lambda: die_by(signal.SIGSTOP)])
def test_a_worker_that_does_not_respond_names_its_file(how):
    started = time.monotonic()
    with pytest.raises(WorkerDied, match=r"v4\.mp4") as died:
        list(read_batches(Videos(how), KEYS, workers=2, device=CPU, timeout_s=2.0))
    assert died.value.path == "v4.mp4"
    assert "2 s" in died.value.reason
    # The end of the worker is not waited for.
    assert time.monotonic() - started < 90
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refused_file_is_not_read(workers):
    with worker_status.refusing({"v4.mp4": "its decoder crashed"}):
        batches = list(read_batches(Videos(hang), KEYS, workers=workers, device=CPU))
    assert [name for batch in batches for name in batch["name"]] == [
        *"0123",
        "its decoder crashed",
        *"56789",
    ]
    # Outside of the block the file is not refused.
    with worker_status.record_read("v4.mp4"):
        pass


def test_a_worker_that_hangs_while_it_reads_no_video_is_an_error(monkeypatch):
    monkeypatch.setattr(loader_workers, "PATIENCE", 5)
    with pytest.raises(TrainingError, match="no batch for 1 s") as hung:
        list(read_batches(Examples(hang), KEYS, workers=2, device=CPU, timeout_s=0.2))
    assert not isinstance(hung.value, WorkerDied)


def test_slow_workers_and_slow_steps_are_no_error():
    def slow() -> None:
        time.sleep(1.0)

    count = 0
    for _ in read_batches(Examples(slow), KEYS, workers=2, device=CPU, timeout_s=0.3):
        count += 1
        time.sleep(1.0 if count == 2 else 0.0)
    assert count == 5


def test_a_wait_ends_when_stop_is_true():
    def slow() -> None:
        time.sleep(1.0)

    batches = read_batches(Examples(slow), KEYS, workers=1, device=CPU, timeout_s=0.2)
    assert list(numbers(batches)) == ALL
    batches = read_batches(Examples(hang), KEYS, workers=1, device=CPU, stop=lambda: True)
    # A slow start of the worker is also a wait, which ends the batches earlier.
    assert list(numbers(batches)) in (ALL[:1], ALL[:2])


class Mean:
    """The mean of the model's outputs; `after` is called once the step of sample 2 is computed."""

    def __init__(self, after: Callable[[], Any] = nothing) -> None:
        self.after = after

    def counts(self, batch: Any) -> torch.Tensor:
        return torch.tensor([len(batch["x"])])

    def __call__(self, model: nn.Module, batch: Any, counts: torch.Tensor) -> LossReport:
        if batch["n"][0] == 2:
            self.after()
        loss = model(batch["x"]).mean()
        return LossReport(loss, {"loss/t": loss.detach()})


def train(folder: Path, dataset: Any, objective: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(1000, 1)
    settings = LoopOptions(
        batch_size=2, epochs=1, epoch_clips=10, lr=1e-6, workers=1, threads=1, device="cpu"
    )
    result = fit(
        model=model,
        dataset=dataset,
        objective=objective or Mean(),
        options=settings,
        run_dir=folder,
        identity={},
        **options,
    )
    return result, model.weight.detach()


def test_sigterm_while_no_batch_comes_writes_the_checkpoint(tmp_path: Path):
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    later = Mean(lambda: threading.Timer(1.0, send).start())
    with pytest.raises(TrainingInterrupted, match="step 2 of 5"):
        train(tmp_path, Examples(hang), later)
    assert time.monotonic() - sent[0] < 60  # the worker hangs for longer
    assert train(tmp_path, Examples(nothing), resume=True)[0].resumed_from == 2


def disturb(folder: Path, how: Callable[[], Any], monkeypatch: Any) -> WorkerDied:
    """Train or resume until the worker that reads v4.mp4 is disturbed, and return the error."""
    defaults = read_batches.__kwdefaults__ | {"timeout_s": 2.0}
    monkeypatch.setattr(read_batches, "__kwdefaults__", defaults)
    with pytest.raises(WorkerDied, match=r"v4\.mp4") as died:
        train(folder, Videos(how), resume="auto")
    monkeypatch.undo()
    return died.value


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_disturbed_run_has_the_result_of_an_undisturbed_one(signal_, tmp_path, monkeypatch):
    """After one crash no video is excluded, because the crash may have another cause."""
    _, expected = train(tmp_path / "whole", Videos(nothing))
    disturb(tmp_path / "run", lambda: die_by(signal_), monkeypatch)
    result, weights = train(tmp_path / "run", Videos(nothing), resume=True)
    assert result.resumed_from == 2
    assert torch.equal(weights, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal_", "reason"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGSTOP, "no answer")]
)
def test_a_video_that_ends_a_run_twice_is_excluded_by_the_resume(
    signal_, reason, tmp_path, monkeypatch
):
    """It is treated like a video that is unreadable from the start."""

    class Reported(Videos):
        def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
            example = super().__getitem__(key)
            unreadable = example["name"] != str(key[1])
            return example | {"unreadable": [("v4.mp4", example["name"])] if unreadable else []}

    def die() -> None:
        die_by(signal_)

    with worker_status.refusing({"v4.mp4": "unreadable"}):
        _, expected = train(tmp_path / "whole", Reported(nothing))
    for _ in range(2):
        disturb(tmp_path / "run", die, monkeypatch)
    result, weights = train(tmp_path / "run", Reported(die), resume=True)
    assert torch.equal(weights, expected)
    assert list(result.unreadable) == ["v4.mp4"]
    assert reason in result.unreadable["v4.mp4"]


def test_memory_that_runs_out_twice_excludes_nothing(tmp_path, monkeypatch):
    for _ in range(3):
        died = disturb(tmp_path, lambda: die_by(signal.SIGKILL), monkeypatch)
    assert not died.reason
