"""The decoding worker process, see `serve`.

A decoder that crashes or hangs in C affects only this process. The worker does not import torch,
has a memory limit, and ends when its parent does.

An exception that a bad file cannot explain may be a fault of this package. The worker then reads a
test video of the package, and reports whether the file or the package is at fault. It also reads
that video once before it begins.
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
_TEST_VIDEO = (
    Path(__file__).parents[3] / "conf/demo_corpus/Standing_Still/test_Standing-Still-001.mp4"
)
_JOBS = {"copy": "distinit.pipeline.prepared.make_copy:copy_job"}
"""Jobs of other packages by kind. A worker imports a module when it receives the first job."""


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
        self._memory, self._layout, self._views = (
            mmap.mmap(file, size),
            Layout.for_views(views),
            views,
        )
        self._free = list(range(SLOTS))
        self._last_sign = time.monotonic()

    def serve(self) -> None:
        """Work until the parent closes the connection."""
        send(self._connection, {"kind": "ready"})
        while True:
            message = receive(self._connection)
            if message["kind"] == "free":
                self._free.append(message["slot"])
                continue
            self._last_sign = time.monotonic()
            if message["kind"] == "views":
                self._set_views(message)
            elif message["kind"] == "probes":
                for path in message["paths"][message["skip"] :]:
                    send(self._connection, self._answer({"kind": "probe", "path": path}))
                send(self._connection, {"kind": "end"})
            else:
                send(self._connection, self._answer(message))

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Run the job of a message; return the result, or the reason of a failure."""
        try:
            return self._work(message)
        except VideoError as error:
            return {"kind": "failed", "reason": str(error)}
        except (MemoryError, av.FFmpegError) as error:
            return self._file_failure(error)
        # The parent has ended.
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            return self._diagnose(error, message)

    def _set_views(self, message: dict[str, Any]) -> None:
        """Render other views from now on; try them on the test video first."""
        self._views = tuple(View.model_validate(view) for view in message["views"])
        self._layout = Layout.for_views(self._views)
        self._memory = mmap.mmap(self._file, message["bytes"])
        try:
            self.check()
        except Exception as error:
            trace = traceback.format_exc()
            send(self._connection, {"kind": "fault", "what": in_one_line(error), "trace": trace})

    def check(self, message: dict[str, Any] | None = None) -> None:
        """Run the job of `message` on the test video; raise what fails."""
        result = probe(str(_TEST_VIDEO))
        if result.error is not None:
            raise DecoderError(f"{_TEST_VIDEO}: {result.error}")
        with VideoReader(str(_TEST_VIDEO)) as reader:
            for _, _, frame in reader.sample(Sampling(every=4)):
                renderer = reader.info.renderer()
                for view in self._views:
                    renderer.render(frame, view)
        if message is not None and message["kind"] == "copy":
            with tempfile.TemporaryDirectory() as folder:
                paths = {
                    "source": str(_TEST_VIDEO),
                    "part": f"{folder}/part",
                    "target": f"{folder}/copy",
                }
                _job(message)({**message, **paths}, self._send_sign_of_life)

    def _file_failure(self, error: BaseException) -> dict[str, Any]:
        try:
            return {"kind": "failed", "reason": reason(error)}
        except DecoderError as fault:
            return {"kind": "fault", "what": str(fault), "trace": ""}

    def _diagnose(self, error: Exception, message: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to an exception that a bad file should not cause.

        This package is at fault if the test video causes an exception too.
        """
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, (DecoderError, ImportError)):
            return {"kind": "fault", "what": str(error), "trace": trace}
        with contextlib.suppress(DecoderError):
            if isinstance(error, OSError):
                # Raises DecoderError for a limit of the machine.
                reason(error)
            try:
                self.check(message)
            except Exception as second_error:
                trace += "".join(traceback.format_exception(second_error))
            else:
                return {
                    "kind": "failed",
                    "reason": f"{INTERNAL}{in_one_line(error)}",
                    "trace": trace,
                }
        return {"kind": "fault", "what": in_one_line(error), "trace": trace}

    def _send_sign_of_life(self) -> None:
        """Signal to the parent, at most once per second, that the work continues."""
        now = time.monotonic()
        if now - self._last_sign > _SIGN_OF_LIFE_S:
            self._last_sign = now
            send(self._connection, {"kind": "alive"})

    def _work(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["kind"] == "probe":
            return {
                "kind": "probed",
                "probe": asdict(probe(message["path"], self._send_sign_of_life)),
            }
        if message["kind"] == "timeline":
            with VideoReader(message["path"], progress=self._send_sign_of_life) as reader:
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
            return {"kind": "copied", "row": _job(message)(message, self._send_sign_of_life)}
        return self._decode(message)

    def _decode(self, job: dict[str, Any]) -> dict[str, Any]:
        """Decode the rows of a job into slots, except `skip` rows that a dead worker delivered."""
        sampling = Sampling.model_validate(job["sampling"])
        first, end, max_rows, skip = job["first"], job["end"], job["max_rows"], job["skip"]
        with VideoReader(job["path"], progress=self._send_sign_of_life) as reader:
            timeline = reader.timeline()
            chosen = sampling.select(timeline.pts, timeline.key, timeline.time_base)
            chosen = chosen[(chosen >= first) & (chosen < (len(timeline) if end is None else end))]
            limit = len(chosen) if max_rows is None else max_rows
            renderer: Renderer | None = None
            index: list[int] = []
            pts: list[int] = []
            slot, rows = -1, 0
            arrays: tuple[np.ndarray, ...] = ()
            more = False
            try:
                # Only decoded rows are counted: a damaged frame gives none.
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
                # The video could not be read to its end.
                if slot >= 0:
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
        """Return a free slot; wait until the parent has read one."""
        while not self._free:
            message = receive(self._connection)
            self._free.append(message["slot"])
        return self._free.pop()

    def _deliver(self, slot: int, index: list[int], pts: list[int]) -> None:
        self._last_sign = time.monotonic()
        send(self._connection, {"kind": "block", "slot": slot, "index": index, "pts": pts})


def _limit_memory(gigabytes: float) -> None:
    """Allow this much more address space than is used now.

    A hostile header then cannot fill the memory of the machine.
    """
    # Not every system has such a limit.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        limit = used + int(gigabytes * 2**30)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(connection: int, memory: int) -> None:
    """Work until the parent closes the connection.

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
    # Raised when the parent needs this process no more.
    with contextlib.suppress(EOFError, ConnectionError):
        worker.serve()
