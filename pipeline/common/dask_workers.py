"""Dask workers on this machine or on an existing cluster."""

from __future__ import annotations

import gc
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

CONNECT_TIMEOUT = "20s"
LOOPBACK = "127.0.0.1"
# Open files of the process that starts workers. Counted while they ran: 21, and 9 per worker.
CLIENT_FILES, FILES_PER_WORKER = 64, 16
MAX_STARTS = 3
# Intervals of dask's own monitoring. Two idle workers and their scheduler took a fifth of a core
# with dask's defaults and take a fiftieth with these. There are few workers, and a task lasts
# minutes.
MONITORING = {
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

    # A client of an earlier call that failed to connect closes itself when it is collected. During
    # the start of another client that would be a deadlock, so it is collected now.
    gc.collect()
    # If workers die three times on one shard, the shard is at fault.
    dask.config.set(
        {"distributed.scheduler.allowed-failures": 3, "distributed.admin.low-level-log-length": 100}
    )
    if scheduler is not None:
        try:
            connected = Client(scheduler, timeout=CONNECT_TIMEOUT)
        # An address in an unknown form, or tls:// without keys.
        except (ValueError, TypeError) as error:
            raise DistInitError(
                f"--scheduler {scheduler}: expected tcp://HOST:PORT, or tls://HOST:PORT and keys in dask's "
                f"configuration ({in_one_line(error)})"
            ) from None
        except OSError as error:
            raise DistInitError(
                f"--scheduler {scheduler}: no dask scheduler answers at this address ({error})"
            ) from None
        with connected as client:
            log.info("dask dashboard: %s", client.dashboard_link)
            yield client
        return
    with dask.config.set(MONITORING), _local_cluster(workers) as local, Client(local) as client:
        log.info("dask dashboard: %s", client.dashboard_link)
        yield client


def _local_cluster(workers: int | None) -> LocalCluster:
    """Start worker processes on this machine.

    Ctrl-C does not reach them: it interrupts the client, which ends them.

    Whoever can connect to a scheduler or a worker can run code as this user. So they listen on the
    loopback interface only, with TLS and a key that this process makes and passes to its workers.
    Other accounts of the machine do not have it. The dashboard shows progress and accepts no
    commands.

    A process inherits the blocked signals of its parent. Dask starts (and restarts) workers from
    the thread of its event loop, which is started here and inherits the signals blocked here.
    """
    from multiprocessing import resource_tracker

    from distributed import LocalCluster
    from distributed.security import Security

    count = workers or cores()
    require_descriptors(CLIENT_FILES + FILES_PER_WORKER * count, f"--workers {count}")
    # Started later, it would make Python unblock the signal.
    resource_tracker.ensure_running()
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
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
                    # Older versions listen on all interfaces by default.
                    worker_dashboard_address=f"{LOOPBACK}:0",
                    security=Security.temporary(),
                    # Restarts, and heartbeats that the end interrupts, are harmless.
                    silence_logs=logging.CRITICAL,
                )
            # A worker died before it was ready.
            except RuntimeError as error:
                if starts == MAX_STARTS:
                    raise DistInitError(
                        f"--workers {workers}: the workers do not start ({error})"
                    ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def gpu_of_worker() -> int | None:
    """Return the GPU of this dask worker, from the number in its name; None with fewer than two."""
    import torch
    from distributed import get_worker

    count = torch.cuda.device_count()
    if count < 2:
        return None
    digits = "".join(c for c in str(get_worker().name) if c.isdigit())
    return int(digits or 0) % count
