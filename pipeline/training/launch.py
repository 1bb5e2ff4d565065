"""A stage in one process, in those that torchrun started, or in several started here (`--gpus
N`)."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.multiprocessing.spawn import start_processes

from ..common.console import Console
from ..common.distributed import SINGLE_PROCESS, Ranks, join_ranks, launched
from ..common.errors import DistInitError, RankLostError, TrainingError, UsageError, in_one_line
from ..common.processes import Owner, end_with
from ..common.settings import Options
from .loop_options import LoopOptions

C = TypeVar("C", bound=Options)
Stage = Callable[[C, Console, Ranks], dict[str, Any]]

PATIENCE_S = 15.0  # for the errors of the others, once one process has failed


def run_distributed(
    stage: Stage[C], config: C, console: Console, loop: LoopOptions
) -> dict[str, Any]:
    """What `stage` returns on rank 0; `stage` is a function of a module.

    Under torchrun this process is one rank. Otherwise `loop.gpus` above 1 starts as many processes
    here and waits for them: the first error of any of them ends all and is raised here, SIGTERM is
    passed on.
    """
    if launched():
        world = int(os.environ["WORLD_SIZE"])
        if loop.gpus not in (1, world):
            raise UsageError(
                f"loop.gpus={loop.gpus}, but torchrun has started {world} processes; leave it out"
            )
        with join_ranks(loop.device) as ranks:
            if ranks.is_main:
                return stage(config, console, ranks)
            with Console(quiet=True) as silent:
                return stage(config, silent, ranks)
    if loop.gpus == 1:
        return stage(config, console, SINGLE_PROCESS)
    if not _enough_gpus(loop):
        console.warn(f"no GPU here: {loop.gpus} processes on the CPU")
    return _launch(stage, config, console, loop)


def _enough_gpus(loop: LoopOptions) -> bool:
    """False where processes will be on the CPU though that was not asked for; UsageError for too
    few GPUs."""
    count = torch.cuda.device_count()
    wants = loop.device.startswith("cuda") or (loop.device == "auto" and count > 0)
    if wants and loop.gpus > count:
        raise UsageError(f"loop.gpus={loop.gpus}, this machine has {count}")
    return wants or loop.device != "auto"


@dataclass(frozen=True)
class _Outcome:
    """How one process ended, if it could still say so."""

    rank: int
    result: dict[str, Any] | None = None
    error: DistInitError | None = None


def _launch(stage: Stage[C], config: C, console: Console, loop: LoopOptions) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    outcomes: Any = spawn.Queue()
    with tempfile.TemporaryDirectory(prefix="distinit-ranks-") as folder:
        meeting = f"file://{Path(folder).resolve()}/meeting"
        context: Any = start_processes(
            _rank_main,
            (
                loop.gpus,
                Owner.here(),
                meeting,
                stage,
                config,
                (console.json, console.quiet),
                loop.device,
                outcomes,
            ),
            nprocs=loop.gpus,
            join=False,
            start_method="spawn",
        )
        try:
            with _passing_on_sigterm(context.processes):
                ended = _wait(context.processes, outcomes)
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
    result = ended[0].result if 0 in ended else None
    if (
        len(ended) == loop.gpus
        and result is not None
        and all(end.error is None for end in ended.values())
    ):
        return result
    raise _cause(ended, [process.exitcode for process in context.processes])


def _wait(processes: list[Any], outcomes: Any) -> dict[int, _Outcome]:
    """The outcomes by rank, when all processes have ended, or one has failed and the others had
    their time."""
    ended: dict[int, _Outcome] = {}
    while True:
        alive = [process.sentinel for process in processes if process.is_alive()]
        failed = any(end.error is not None for end in ended.values()) or any(
            p.exitcode for p in processes
        )
        if alive:
            multiprocessing.connection.wait(
                [*alive, outcomes._reader], timeout=PATIENCE_S if failed else None
            )
        before = len(ended)
        while True:
            try:
                end = pickle.loads(outcomes.get(timeout=0.05))
            except Empty:
                break
            ended[end.rank] = end
        still = any(process.is_alive() for process in processes)
        if not still or (
            failed and len(ended) == before and len(alive) == sum(p.is_alive() for p in processes)
        ):
            return ended


def _cause(ended: dict[int, _Outcome], exit_codes: list[int | None]) -> DistInitError:
    """The error to tell: that of a process of its own, before those that come from its end."""
    errors = [ended[rank].error for rank in sorted(ended)]
    for error in errors:
        if error is not None and not isinstance(error, RankLostError):
            return error
    for rank, code in enumerate(exit_codes):
        if rank not in ended and code:
            how = (
                f"was ended by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with exit code {code}"
            )
            hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
            return TrainingError(f"rank {rank} of {len(exit_codes)} {how}{hint}")
    return next(
        (error for error in errors if error is not None),
        TrainingError("a process ended without a word"),
    )


@contextmanager
def _passing_on_sigterm(processes: list[Any]) -> Iterator[None]:
    """SIGTERM of this process goes to the ranks, which write their checkpoint and end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.is_alive():
                process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank_main(
    rank: int,
    world: int,
    owner: Owner,
    meeting: str,
    stage: Stage[C],
    config: C,
    shown: tuple[bool, bool],
    device: str,
    outcomes: Any,
) -> None:
    """One process. Errors go through `outcomes` and not to the terminal."""
    end_with(owner)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }
    try:
        with (
            join_ranks(device, meeting) as ranks,
            Console(json=shown[0], quiet=shown[1] or rank > 0) as console,
        ):
            end = _Outcome(rank, result=stage(config, console, ranks))
    except DistInitError as error:
        end = _Outcome(rank, error=_told(error, rank))
    except KeyboardInterrupt:
        return
    except Exception as error:
        end = _Outcome(rank, error=_told(TrainingError(in_one_line(error)), rank, error))
    outcomes.put(pickle.dumps(end))  # whole: tensors would otherwise stay behind in shared memory
    outcomes.close()
    outcomes.join_thread()


def _told(error: DistInitError, rank: int, source: BaseException | None = None) -> DistInitError:
    """The error with the rank where it is of one process only, and its traceback as a note for
    --debug."""
    import traceback

    told = (
        error
        if error.shared or isinstance(error, RankLostError)
        else type(error)(f"rank {rank}: {error}")
    )
    told.shared = error.shared
    told.add_note("".join(traceback.format_exception(source or error)))
    return told.with_traceback(None)
