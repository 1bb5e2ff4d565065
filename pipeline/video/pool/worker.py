"""The decoding worker process, see `serve`.

A decoder that crashes or hangs in C takes this process with it and nothing else. The worker imports
no torch, keeps to its memory limit, and ends when its parent does.

An exception that a bad file cannot explain may be a fault of this package: the worker then reads a
video that ships with it, and reports which of the two is at fault. It reads that video once before
it begins, too.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np

from ...common.errors import DecoderError, VideoError, in_one_line
from ...common.processes import Owner, end_with
from ..container import reason
from ..decoder import VideoReader
from ..geometry import Renderer, View
from ..probe import probe
from ..sampling import Sampling
from .messages import INTERNAL, SLOTS, Layout, receive, send

_SIGN_OF_LIFE_S = 1.0
_GOOD = Path(__file__).parents[3] / "conf/demo_corpus/Standing_Still/test_Standing-Still-001.mp4"
_JOBS = {"copy": "distinit.pipeline.prepared.make_copy:copy_job"}
"""Jobs of other packages by kind. They are imported when the first one comes: no other worker needs
their modules."""


def _job(message: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    module, _, function = _JOBS[message["kind"]].partition(":")
    job: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), function)
    return job


class DecodeWorker:
    """Serves one parent: probes, timelines, decode jobs and copies, one at a time."""

    def __init__(
        self, connection: Connection, file: int, size: int, views: tuple[View, ...]
    ) -> None:
        self._connection, self._file = connection, file
        self._memory, self._layout, self._views = mmap.mmap(file, size), Layout.of(views), views
        self._free = list(range(SLOTS))
        self._spoke = time.monotonic()

    def serve(self) -> None:
        """Work until the parent hangs up."""
        send(self._connection, {"kind": "ready"})
        while True:
            message = receive(self._connection)
            if message["kind"] == "free":
                self._free.append(message["slot"])
                continue
            self._spoke = time.monotonic()
            if message["kind"] == "views":
                self._show(message)
            elif message["kind"] == "probes":
                for path in message["paths"][message["skip"] :]:
                    send(self._connection, self._answer({"kind": "probe", "path": path}))
                send(self._connection, {"kind": "end"})
            else:
                send(self._connection, self._answer(message))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a message asks for; return the result, or the reason of a failure."""
        try:
            return self._work(message)
        except VideoError as error:
            return {"kind": "failed", "reason": str(error)}
        except (MemoryError, av.FFmpegError) as error:
            return self._of_the_file(error)
        except (EOFError, ConnectionError):  # the parent has gone
            raise
        except Exception as error:
            return self._unexpected(error, message)

    def _show(self, message: dict[str, Any]) -> None:
        """Render other views from now on, after they were tried."""
        self._views = tuple(View.model_validate(view) for view in message["views"])
        self._layout = Layout.of(self._views)
        self._memory = mmap.mmap(self._file, message["bytes"])
        try:
            self.check()
        except Exception as error:
            trace = traceback.format_exc()
            send(self._connection, {"kind": "fault", "what": in_one_line(error), "trace": trace})

    def check(self, message: dict[str, Any] | None = None) -> None:
        """Read a video that is known to be good as `message` asks; raise what fails."""
        result = probe(str(_GOOD))
        if result.error is not None:
            raise DecoderError(f"{_GOOD}: {result.error}")
        with VideoReader(str(_GOOD)) as reader:
            for _, _, frame in reader.sample(Sampling(every=4)):
                renderer = reader.info.renderer()
                for view in self._views:
                    renderer.render(frame, view)
        if message is not None and message["kind"] == "copy":
            with tempfile.TemporaryDirectory() as folder:
                place = {"source": str(_GOOD), "part": f"{folder}/part", "target": f"{folder}/copy"}
                _job(message)({**message, **place}, self._alive)

    def _of_the_file(self, error: BaseException) -> dict[str, Any]:
        try:
            return {"kind": "failed", "reason": reason(error)}
        except DecoderError as fault:
            return {"kind": "fault", "what": str(fault), "trace": ""}

    def _unexpected(self, error: Exception, message: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to an exception that a bad file should not cause.

        The fault is this program's if a good file causes one as well.
        """
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, (DecoderError, ImportError)):
            return {"kind": "fault", "what": str(error), "trace": trace}
        with contextlib.suppress(DecoderError):
            if isinstance(error, OSError):
                reason(error)  # a limit
            try:
                self.check(message)
            except Exception as again:
                trace += "".join(traceback.format_exception(again))
            else:
                return {
                    "kind": "failed",
                    "reason": f"{INTERNAL}{in_one_line(error)}",
                    "trace": trace,
                }
        return {"kind": "fault", "what": in_one_line(error), "trace": trace}

    def _alive(self) -> None:
        """Tell the parent now and then that work goes on."""
        now = time.monotonic()
        if now - self._spoke > _SIGN_OF_LIFE_S:
            self._spoke = now
            send(self._connection, {"kind": "alive"})

    def _work(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["kind"] == "probe":
            return {"kind": "probed", "probe": asdict(probe(message["path"], self._alive))}
        if message["kind"] == "timeline":
            with VideoReader(message["path"], progress=self._alive) as reader:
                timeline = reader.timeline()
                base = timeline.time_base
                return {
                    "kind": "timeline",
                    "pts": timeline.pts.tolist(),
                    "key": np.flatnonzero(timeline.key).tolist(),
                    "time_base": [base.numerator, base.denominator],
                    "reliable": timeline.reliable,
                    "clock": timeline.clock,
                    "size": [reader.info.width, reader.info.height],
                }
        if message["kind"] == "copy":
            return {"kind": "copied", "row": _job(message)(message, self._alive)}
        return self._decode(message)

    def _decode(self, job: dict[str, Any]) -> dict[str, Any]:
        """Decode a job's rows into slots; `skip` rows were delivered by a worker that died."""
        sampling = Sampling.model_validate(job["sampling"])
        first, end, most, skip = job["first"], job["end"], job["max_rows"], job["skip"]
        with VideoReader(job["path"], progress=self._alive) as reader:
            timeline = reader.timeline()
            chosen = sampling.select(timeline.pts, timeline.key, timeline.time_base)
            chosen = chosen[(chosen >= first) & (chosen < (len(timeline) if end is None else end))]
            limit = len(chosen) if most is None else most
            renderer: Renderer | None = None
            index: list[int] = []
            pts: list[int] = []
            slot, rows = -1, 0
            arrays: tuple[np.ndarray, ...] = ()
            more = False
            try:
                # Rows are counted as they come, since a damaged frame gives none.
                for i, p, frame in reader.frames_at(chosen):
                    if rows >= limit:
                        more = True
                        break
                    rows += 1
                    if rows <= skip:
                        del frame
                        continue
                    if slot < 0:
                        slot = self._slot()
                        arrays = self._layout.arrays(self._memory, slot)
                    renderer = renderer or reader.info.renderer()
                    for view, array in zip(self._views, arrays, strict=True):
                        renderer.render(frame, view, out=array[len(index)])
                    del frame  # see VideoReader
                    index.append(i)
                    pts.append(p)
                    if len(index) == self._layout.rows:
                        self._deliver(slot, index, pts)
                        slot, index, pts = -1, [], []
                if index:
                    self._deliver(slot, index, pts)
                    slot = -1
            finally:
                if slot >= 0:  # of a video that cannot be read to its end
                    self._free.append(slot)
            if len(chosen) and not rows:
                raise VideoError(f"none of the sampled frames could be decoded: {reader.damage}")
            return {
                "kind": "done",
                "frames": len(timeline),
                "clock": timeline.clock,
                "note": reader.truncated,
                "more": more,
            }

    def _slot(self) -> int:
        """Return a slot that the parent has read; waits for one."""
        while not self._free:
            message = receive(self._connection)
            self._free.append(message["slot"])
        return self._free.pop()

    def _deliver(self, slot: int, index: list[int], pts: list[int]) -> None:
        self._spoke = time.monotonic()
        send(self._connection, {"kind": "block", "slot": slot, "index": index, "pts": pts})


def _limit_memory(gigabytes: float) -> None:
    """Allow so much more address space than is used now.

    A hostile header can then not fill the machine's memory.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on every system
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        limit = used + int(gigabytes * 2**30)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(connection: int, memory: int) -> None:
    """Work until the parent hangs up.

    Args:
        connection: Descriptor of the socket to the parent.
        memory: Descriptor of the shared memory.
    """
    parent = Connection(connection)
    setup = receive(parent)
    end_with(Owner(**setup["owner"]))
    views = tuple(View.model_validate(view) for view in setup["views"])
    worker = DecodeWorker(parent, memory, setup["bytes"], views)
    worker.check()
    _limit_memory(setup["memory_gb"])
    # What is raised when the parent is done with this process.
    with contextlib.suppress(EOFError, ConnectionError):
        worker.serve()
