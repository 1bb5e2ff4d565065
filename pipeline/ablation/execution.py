"""Steps of an ablation side by side: dask hands them out, each runs as a command of its own.

A process a step gives its memory back (a GPU's above all), sees one GPU, and what crashes in it
fails it alone. It ends with its worker.
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
    """Do steps on a dask cluster, each after the student it needs. Failures are entered in
    `progress`."""
    from distributed import as_completed

    if not steps:
        return
    with cluster(workers, scheduler) as client:
        futures: dict[str, Any] = {}
        for step in steps:  # students stand before what needs them
            futures[step.key] = client.submit(
                run_as_command,
                step,
                str(progress.out),
                futures.get(step.needs or ""),
                key=step.key,
                retries=1,
            )
        of = {step.key: step for step in steps}
        with progress_bar("runs", len(steps), "run") as bar:
            for future in as_completed(list(futures.values())):
                step = of[future.key]
                if future.status == "finished":
                    progress.took(step, future.result())
                else:
                    progress.failed[step.key] = " ".join(str(future.exception()).split())[:300]
                    log.warning("%s failed: %s", step.folder, progress.failed[step.key])
                progress.write()
                bar.advance(1)


def run_as_command(step: Step, out: str, after: float | None) -> float:
    """Run in a worker: one step, by the command line; its seconds. `after` makes dask wait for the
    student.

    Raises DistInitError with the command's own last words.
    """
    folder = Path(out)
    if step.result(folder) is not None:
        return 0.0
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    log = folder / LOGS / f"{step.key}.log"
    began = time.monotonic()
    # Through a pipe: the store's URL may hold a password, which no file gets.
    config = yaml.safe_dump({step.kind: prepared_config(step, folder)}).encode()
    words = [sys.executable, "-m", "distinit", step.kind, "--config", "/dev/stdin"]
    with open(log, "ab") as said:
        code = subprocess.run(
            words,
            stdout=said,
            stderr=said,
            input=config,
            env=_environment(),
            # SIGTERM: it writes a checkpoint, from which the next run continues.
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        ).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise DistInitError(f"{lines[-1] if lines else 'no word'} (status {code}; {log})")
    return time.monotonic() - began


def _environment() -> dict[str, str]:
    """Each worker of this machine its own GPU, by the number in its name."""
    if "CUDA_VISIBLE_DEVICES" in os.environ or (gpu := gpu_of_worker()) is None:
        return dict(os.environ)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
