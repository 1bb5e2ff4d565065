"""Worker processes by dask, on this machine or on an existing cluster."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import DistInitError, in_one_line
from .processes import cores, require_descriptors

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

ANSWER_WITHIN = "20s"  # of a scheduler
LOOPBACK = "127.0.0.1"
# Open files of the process that starts workers: 21 and 9 per worker were counted once they run.
OWN_FILES, FILES_PER_WORKER = 64, 16
STARTS = 3  # of a local cluster, before the run is given up
# What dask does next to the work, often enough that two idle workers and their scheduler were
# measured at a fifth of a core, and seldom enough at a fiftieth. Workers here are few and a task
# lasts minutes.
QUIET = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.worker.memory.monitor-interval": "1s",
}


@contextmanager
def cluster(workers: int | None, scheduler: str | None) -> Iterator[Client]:
    """Yield a client of the cluster at `scheduler`, or of a local one with `workers` processes."""
    import dask
    from distributed import Client

    # A worker that dies three times on one shard has met something that kills workers.
    dask.config.set(
        {"distributed.scheduler.allowed-failures": 3, "distributed.admin.low-level-log-length": 100}
    )
    if scheduler is not None:
        try:
            connected = Client(scheduler, timeout=ANSWER_WITHIN)
        except (ValueError, TypeError) as error:  # an address of no known form; tls:// without keys
            raise DistInitError(
                f"--scheduler {scheduler}: expected tcp://HOST:PORT, or tls://HOST:PORT and keys in dask's "
                f"configuration ({in_one_line(error)})"
            ) from None
        except OSError as error:
            raise DistInitError(
                f"--scheduler {scheduler}: no dask scheduler answers there ({error})"
            ) from None
        with connected as client:
            log.info("dask dashboard: %s", client.dashboard_link)
            yield client
        return
    with dask.config.set(QUIET), _local_cluster(workers) as local, Client(local) as client:
        log.info("dask dashboard: %s", client.dashboard_link)
        yield client


def _local_cluster(workers: int | None) -> LocalCluster:
    """Start worker processes on this machine.

    Ctrl-C does not reach them: it is for the client, which ends them.

    Whoever can speak to a scheduler or a worker runs code as this user. So they listen on the
    loopback interface only, and speak TLS with a key that this process makes and hands to its
    workers: other accounts of the machine have none. The dashboard shows what is done and takes no
    orders.

    A process inherits the signals that its parent blocks, and dask starts (and restarts) workers
    from the thread of its event loop, which is started here and keeps what is blocked here.
    """
    from multiprocessing import resource_tracker

    from distributed import LocalCluster
    from distributed.security import Security

    count = workers or cores()
    require_descriptors(OWN_FILES + FILES_PER_WORKER * count, f"--workers {count}")
    resource_tracker.ensure_running()  # where it has to be started later, Python unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        starts = 0
        while True:
            starts += 1
            try:
                return LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=True,
                    host=LOOPBACK,
                    dashboard_address=f"{LOOPBACK}:0",
                    worker_dashboard_address=f"{LOOPBACK}:0",  # else everywhere, in older versions
                    security=Security.temporary(),
                    silence_logs=logging.CRITICAL,  # a restart or a heartbeat cut off by the end costs nothing
                )
            except RuntimeError as error:  # a worker died before it was up
                if starts == STARTS:
                    raise DistInitError(
                        f"--workers {workers}: the workers do not start ({error})"
                    ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def gpu_of_worker() -> int | None:
    """Return the GPU of this dask worker, by the number in its name; None with fewer than two."""
    import torch
    from distributed import get_worker

    count = torch.cuda.device_count()
    if count < 2:
        return None
    digits = "".join(c for c in str(get_worker().name) if c.isdigit())
    return int(digits or 0) % count
