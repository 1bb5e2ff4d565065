"""Run a stage in one process, in those of torchrun, or in several started here (`--gpus N`).

`--gpus N` calls the launcher of torchrun as a function (`elastic_launch`). This module adds what
the launcher does not guarantee: one line names the error instead of a table of processes, no
process outlives this one, and after SIGTERM a step and its checkpoint have unlimited time (torchrun
kills after 30 seconds). The launcher runs in a thread, where it cannot install signal handlers.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..common.console import Console
from ..common.distributed import SINGLE_PROCESS, Ranks, join_ranks, launched
from ..common.errors import DistInitError, RankLostError, TrainingError, UsageError, in_one_line
from ..common.files import write_whole
from ..common.processes import Owner, end_with
from ..common.settings import Options
from ..common.streams import counted
from .interrupts import on_sigterm
from .loop_options import LoopOptions

C = TypeVar("C", bound=Options)
Stage = Callable[[C, Console, Ranks], dict[str, Any]]

# A process that has lost another one waits this long, so that the other's end is reported first.
GRACE_PERIOD_S = 15.0


def run_distributed(
    stage: Stage[C], config: C, console: Console, loop: LoopOptions
) -> dict[str, Any]:
    """Return what `stage` returns on rank 0.

    Under torchrun this process is one rank. Otherwise, with `loop.gpus` above 1, that many
    processes are started on this machine. SIGTERM is forwarded to them, and the first error ends
    all.

    Args:
        stage: A module-level function, which the processes import by name.
        config: The options of the stage.
        console: The console of rank 0; other ranks are quiet.
        loop: Options with the number of processes and their device.

    Raises:
        DistInitError: The error of the first process that failed.
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
        console.warn(f"no GPU on this machine: {loop.gpus} processes on the CPU")
    return _launch(stage, config, console, loop)


def _enough_gpus(loop: LoopOptions) -> bool:
    """Return whether the processes run on the requested device.

    Raises:
        UsageError: The machine has fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    on_gpus = loop.device.startswith("cuda") or (loop.device == "auto" and count > 0)
    if on_gpus and loop.gpus > count:
        raise UsageError(f"loop.gpus={loop.gpus}: this machine has {counted(count, 'GPU')}")
    return on_gpus or loop.device != "auto"


@dataclass(frozen=True)
class _Outcome:
    """The result or error of one process, if it could still report it."""

    result: dict[str, Any] | None = None
    error: DistInitError | None = None


def _launch(stage: Stage[C], config: C, console: Console, loop: LoopOptions) -> dict[str, Any]:
    _silence_agent()
    exit_codes: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="distinit-ranks-") as name:
        folder = Path(name).resolve()
        # The processes meet in a file instead of at a port, so that nobody on the network can join.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        launcher = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=loop.gpus,
                run_id="distinit",
                rdzv_backend="c10d",
                rdzv_endpoint=str(folder / "rendezvous"),
                rdzv_configs={"store_type": "file"},
                max_restarts=0,
                monitor_interval=0.1,
                start_method="spawn",
                logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
            ),
            _run_rank,
        )
        owner = Owner(os.getpid(), in_main_thread=False)
        output_modes = (console.json, console.quiet)
        earlier_children = set(multiprocessing.active_children())
        forward = partial(_forward_sigterm, loop.gpus, earlier_children)
        with ThreadPoolExecutor(1) as thread, on_sigterm(forward):
            run = thread.submit(launcher, owner, folder, stage, config, output_modes, loop.device)
            try:
                _wait(run)
            except ChildFailedError as error:
                exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            finally:
                if not run.done():
                    for process in _started_children(earlier_children):
                        process.kill()
        outcomes = {rank: _read_outcome(folder, rank) for rank in range(loop.gpus)}
    results = [each.result for each in outcomes.values() if each is not None and each.error is None]
    if len(results) == loop.gpus and results[0] is not None:
        return results[0]
    raise _first_cause(outcomes, exit_codes)


def _wait(run: Future[Any]) -> None:
    """Wait for the run in short steps, between which Python runs signal handlers."""
    while not run.done():
        time.sleep(0.05)
    run.result()


def _silence_agent() -> None:
    """Keep the table of processes and the tracebacks of torchrun out of standard error."""
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        agent = logging.getLogger(name)
        agent.addHandler(logging.NullHandler())
        agent.propagate = False


def _started_children(earlier_children: set[BaseProcess]) -> set[BaseProcess]:
    return set(multiprocessing.active_children()) - earlier_children


def _read_outcome(folder: Path, rank: int) -> _Outcome | None:
    path = folder / f"{rank}.outcome"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _first_cause(outcomes: dict[int, _Outcome | None], exit_codes: dict[int, int]) -> DistInitError:
    """Return the error to report: the cause, rather than errors of ranks that lost another one."""
    errors = [
        each.error for each in outcomes.values() if each is not None and each.error is not None
    ]
    for error in errors:
        if not isinstance(error, RankLostError):
            return error
    for rank, code in exit_codes.items():
        if code and outcomes[rank] is None:
            ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else ""
            ending = ending or f"ended with exit code {code}"
            hint = "; the machine may have run out of memory" if code == -signal.SIGKILL else ""
            return TrainingError(f"rank {rank} of {len(outcomes)} {ending}{hint}")
    return errors[0] if errors else TrainingError("a process ended and left no error")


def _forward_sigterm(world: int, earlier_children: set[BaseProcess]) -> None:
    """Forward SIGTERM to the ranks, which write their checkpoint and end."""
    ranks = _started_children(earlier_children)
    # Ranks that are still being started end with this process.
    if len(ranks) < world:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    for process in ranks:
        process.terminate()


def _run_rank(
    owner: Owner,
    folder: Path,
    stage: Stage[C],
    config: C,
    output_modes: tuple[bool, bool],
    device: str,
) -> None:
    """Run one rank, and write its outcome to a file in `folder` instead of the terminal."""
    end_with(owner)
    json_output, quiet = output_modes
    rank = int(os.environ["RANK"])
    try:
        with (
            join_ranks(device, f"file://{folder}/ranks") as ranks,
            Console(json=json_output, quiet=quiet or rank > 0) as console,
        ):
            outcome = _Outcome(result=stage(config, console, ranks))
    except DistInitError as error:
        outcome = _Outcome(error=_annotate(error, rank))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        outcome = _Outcome(error=_annotate(TrainingError(in_one_line(error)), rank, error))
    write_whole(folder / f"{rank}.outcome", pickle.dumps(outcome))
    if isinstance(outcome.error, RankLostError):
        time.sleep(GRACE_PERIOD_S)
    # A nonzero exit code makes the launcher end the other processes. If all processes raise the
    # same error, each ends by itself.
    if outcome.error is not None and not outcome.error.shared:
        sys.exit(1)


def _annotate(
    error: DistInitError, rank: int, source: BaseException | None = None
) -> DistInitError:
    """Return the error with its traceback as a note, and its rank if only that one raised it."""
    named = error
    if not error.shared and not isinstance(error, RankLostError):
        named = type(error)(f"rank {rank}: {error}")
        named.__dict__.update(error.__dict__)
    named.add_note("".join(traceback.format_exception(source or error)))
    return named.with_traceback(None)
