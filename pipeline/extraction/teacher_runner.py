"""Run several batches of frames through the teachers at once, while more frames are decoded.

Each thread runs whole batches, and torch's own parallelism is off. This gives the same bits for any
number of threads. Teachers and decoders can share all cores, while OpenMP's threads would spin on
busy cores (several times slower, docs/benchmarks.md).

Shapes: B rows of a batch, h w pixels of a view, D numbers of an output.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..common.devices import keep_freed_memory
from ..teachers.teacher import Teacher, TeacherOutput
from ..video.geometry import View

MAX_THREADS = 16
"""Number of threads on a CPU; each holds the activations of one batch."""
GPU_THREADS = 2
"""Number of threads on a GPU: one waits for outputs while the batch of the other is queued."""

Outputs = dict[str, NDArray[np.float32]]
"""[B, D] of each teacher of the store, by name."""


@dataclass
class Batch:
    """Images uint8 [B, h, w, 3] of each view, of which the first `count` are frames."""

    images: list[NDArray[np.uint8]]
    count: int = 0

    @property
    def full(self) -> bool:
        """Whether no further frame fits."""
        return self.count == len(self.images[0])


class TeacherRunner:
    """Runs teachers over batches in threads: take a batch, fill it, submit it.

    Args:
        outputs: The outputs by name in the store. One forward pass computes all outputs of a
            teacher.
        views: The distinct views of all teachers, in the order of a batch's images.
        batch_size: The number of rows per batch.
        threads: The number of threads.
    """

    def __init__(
        self, outputs: dict[str, TeacherOutput], views: list[View], *, batch_size: int, threads: int
    ) -> None:
        self.outputs = outputs
        self._views = views
        shapes = [view.fixed_shape for view in views]
        # Batches are queued on a GPU one after the other, since the settings of its kernels apply
        # to the whole process. Threads wait for the outputs of their batches at the same time.
        gpu = any(output.teacher.device.type == "cuda" for output in outputs.values())
        self._starting: AbstractContextManager[object] = threading.Lock() if gpu else nullcontext()
        # Each thread runs one batch, one more waits, and one is filled.
        self._batches = [
            Batch(
                [
                    _zeros((batch_size, *shape, 3), pinned=gpu)
                    for shape in shapes
                    if shape is not None
                ]
            )
            for _ in range(threads + 2)
        ]
        self._free = list(self._batches)
        self._running: deque[tuple[Future[Outputs], Batch]] = deque()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="teacher")

    def take(self) -> Batch:
        """Return an empty batch, after waiting for the oldest running batch if necessary."""
        while self._running and (self._running[0][0].done() or not self._free):
            future, batch = self._running.popleft()
            # This waits. An exception is raised where the outputs are used.
            future.exception()
            batch.count = 0
            self._free.append(batch)
        return self._free.pop()

    def give_back(self, batch: Batch) -> None:
        """Return a batch that is not submitted."""
        batch.count = 0
        self._free.append(batch)

    def take_back(self) -> None:
        """Wait for the batches that run, and free all batches, including those not returned."""
        while self._running:
            future, _ = self._running.popleft()
            if not future.cancel():
                future.exception()
        self._free = list(self._batches)
        for batch in self._free:
            batch.count = 0

    def submit(self, batch: Batch, names: Iterable[str]) -> Future[Outputs]:
        """Run a batch, which must not be used afterwards.

        Args:
            batch: The batch; it is padded to its full size.
            names: Names of outputs in the store.

        Returns:
            The outputs by name, all B rows; rows beyond `count` have no meaning.
        """
        for images in batch.images:
            images[batch.count :] = 0
        future = self._threads.submit(self._run, batch, tuple(names))
        self._running.append((future, batch))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the threads, each after its current batch."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, batch: Batch, names: tuple[str, ...]) -> Outputs:
        outputs = {name: self.outputs[name] for name in names}
        with self._starting:
            running: dict[Teacher, Callable[[], dict[str, Tensor]]] = {}
            for teacher in dict.fromkeys(output.teacher for output in outputs.values()):
                images = batch.images[self._views.index(teacher.view)]
                keys = [output.key for output in outputs.values() if output.teacher is teacher]
                running[teacher] = teacher.start(images, keys)
        computed = {teacher: finish() for teacher, finish in running.items()}
        return {
            name: computed[output.teacher][output.key].numpy() for name, output in outputs.items()
        }


def _zeros(shape: tuple[int, ...], *, pinned: bool) -> NDArray[np.uint8]:
    """Return zeros; pinned memory is copied to a GPU asynchronously."""
    zeros: NDArray[np.uint8] = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned).numpy()
    return zeros


@contextmanager
def batch_threads(device: torch.device, num_cores: int) -> Iterator[int]:
    """Yield the number of batches that run at once on a device.

    On a CPU the cores are divided among the batches, and torch's own threads are limited to the
    share of one batch, usually one core. A GPU computes one batch while the next one is queued and
    a third is filled.
    """
    if device.type != "cpu":
        yield GPU_THREADS if device.type == "cuda" else 1
        return
    keep_freed_memory()
    threads = min(num_cores, MAX_THREADS)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(num_cores // threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(torch_threads)
