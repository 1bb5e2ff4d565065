"""Run batches of frames through the teachers, several at once, while more frames are decoded.

Each thread runs whole batches with torch's own parallelism off: that gives the same bits, needs no
cores kept apart for the decoders (whichever has work gets the time), and does not spin as OpenMP
does on busy cores (several times slower, docs/benchmarks.md).

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

MOST_THREADS = 16  # each holds the activations of one batch
GPU_THREADS = 2  # one waits for outputs while the other one's batch is queued

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
    """Runs teachers over batches in `threads` threads; batches come from `take` and go to `submit`.

    outputs: by name in the store; of one teacher's outputs the forward pass is run once.
    views: the distinct views of all teachers, in the order of a batch's images.
    """

    def __init__(
        self, outputs: dict[str, TeacherOutput], views: list[View], *, batch_size: int, threads: int
    ) -> None:
        self.outputs = outputs
        self._views = views
        shapes = [t.fixed_shape for t in views]
        # A GPU is given one batch after the other: the settings of its kernels are of the whole
        # process. Threads wait for the outputs of their batches at the same time.
        gpu = any(output.teacher.device.type == "cuda" for output in outputs.values())
        self._starting: AbstractContextManager[object] = threading.Lock() if gpu else nullcontext()
        # One batch is filled while each thread has one at work and one more waits.
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
        """Return an empty batch; wait for the oldest one that runs if there is none."""
        while self._running and (self._running[0][0].done() or not self._free):
            future, batch = self._running.popleft()
            future.exception()  # waits; the exception is raised where the outputs are used
            batch.count = 0
            self._free.append(batch)
        return self._free.pop()

    def give_back(self, batch: Batch) -> None:
        """Return a batch that nobody needs to see."""
        batch.count = 0
        self._free.append(batch)

    def take_back(self) -> None:
        """Make all batches free again, also those that were taken and not returned.

        Waits for those that run.
        """
        while self._running:
            future, _ = self._running.popleft()
            if not future.cancel():
                future.exception()
        self._free = list(self._batches)
        for batch in self._free:
            batch.count = 0

    def submit(self, batch: Batch, names: Iterable[str]) -> Future[Outputs]:
        """Run the batch; the result is the output of these teachers of the store, all B rows.

        Rows beyond `count` have no meaning. The batch must not be used afterwards.
        """
        for images in batch.images:
            images[batch.count :] = 0  # padded, so that every batch has one size
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
        """End the threads, each after the batch it is at."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _run(self, batch: Batch, names: tuple[str, ...]) -> Outputs:
        outputs = {name: self.outputs[name] for name in names}
        with self._starting:
            running: dict[Teacher, Callable[[], dict[str, Tensor]]] = {}
            for teacher in dict.fromkeys(of.teacher for of in outputs.values()):
                images = batch.images[self._views.index(teacher.view)]
                only = [of.key for of in outputs.values() if of.teacher is teacher]
                running[teacher] = teacher.start(images, only)
        computed = {teacher: finish() for teacher, finish in running.items()}
        return {name: computed[of.teacher][of.key].numpy() for name, of in outputs.items()}


def _zeros(shape: tuple[int, ...], *, pinned: bool) -> NDArray[np.uint8]:
    """Return an array of zeros; pinned memory is copied to a GPU while this process continues."""
    zeros: NDArray[np.uint8] = torch.zeros(shape, dtype=torch.uint8, pin_memory=pinned).numpy()
    return zeros


@contextmanager
def batch_threads(device: torch.device, cores: int) -> Iterator[int]:
    """Return how many batches run at once on a device, and torch's own threads meanwhile.

    On the CPU torch's threads are few, at best one. A GPU computes one batch while the next one is
    queued and a third is put together.
    """
    if device.type != "cpu":
        yield GPU_THREADS if device.type == "cuda" else 1
        return
    keep_freed_memory()
    threads = min(cores, MOST_THREADS)
    before = torch.get_num_threads()
    torch.set_num_threads(cores // threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)
