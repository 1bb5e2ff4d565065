"""Run the steps of an ablation in parallel: dask schedules them, each is a separate command.

A process per step releases its memory, that of a GPU in particular, sees one GPU, and a crash fails
only that step. It ends with its worker.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..common.dask_workers import cluster, gpu_of_worker
from ..common.errors import DistInitError
from ..common.processes import end_with_parent
from ..common.progress_bar import progress_bar
from .progress import Progress
from .steps import Step, prepared_config

log = logging.getLogger(__name__)

LOGS = "logs"


def run_on_workers(
    workers: int | None,
    scheduler: str | None,
    steps: list[Step],
    progress: Progress,
) -> None:
    """Run steps on a dask cluster, each after the student it needs, and record their progress."""
    from distributed import as_completed

    if not steps:
        return
    with cluster(workers, scheduler) as client:
        futures: dict[str, Any] = {}
        # Students are listed before the steps that need them.
        for step in steps:
            futures[step.key] = client.submit(
                run_as_command,
                step,
                str(progress.out),
                futures.get(step.needs or ""),
                key=step.key,
                retries=1,
            )
        by_key = {step.key: step for step in steps}
        with progress_bar("runs", len(steps), "run") as bar:
            for future in as_completed(list(futures.values())):
                step = by_key[future.key]
                if future.status == "finished":
                    progress.add_seconds(step, future.result())
                else:
                    progress.failed[step.key] = " ".join(str(future.exception()).split())[:300]
                    log.warning("%s failed: %s", step.folder, progress.failed[step.key])
                progress.write()
                bar.advance(1)


def run_as_command(step: Step, out: str, after: float | None) -> float:
    """Run one step as a command, in a worker.

    Args:
        step: The step.
        out: The folder of the ablation.
        after: Result of the student that the step needs, for which dask waits.

    Returns:
        The duration in seconds.

    Raises:
        DistInitError: The command failed; the message is the last line of its output.
    """
    folder = Path(out)
    if step.result(folder) is not None:
        return 0.0
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    log = folder / LOGS / f"{step.key}.log"
    started = time.monotonic()
    # Through a pipe: the URL of the store may have a password, which is never written to a file.
    config = yaml.safe_dump({step.kind: prepared_config(step, folder)}).encode()
    command = [sys.executable, "-m", "distinit", step.kind, "--config", "/dev/stdin"]
    with open(log, "ab") as output:
        code = subprocess.run(
            command,
            stdout=output,
            stderr=output,
            input=config,
            env=_environment(),
            # On SIGTERM the command writes a checkpoint, from which the next run continues.
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        ).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise DistInitError(f"{lines[-1] if lines else 'no output'} (status {code}; {log})")
    return time.monotonic() - started


def _environment() -> dict[str, str]:
    """Return the environment with a GPU per worker of this machine, by the number in its name."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or (gpu := gpu_of_worker()) is None:
        return dict(os.environ)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
