"""dask clusters: nobody else of the machine gets into one that is made here, and one with TLS can
be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import LocalCluster
from distributed.security import Security

from distinit.pipeline.common import dask_workers as workers
from distinit.pipeline.common.dask_workers import cluster
from distinit.pipeline.common.errors import DistInitError

pytestmark = pytest.mark.cluster

# In a process that shares no key with the cluster: what it is told by each address, in clear text
# and with a key of its own.
INTRUDER = """
import asyncio, sys
from distributed.core import connect
from distributed.security import Security

async def told(address, **options):
    try:
        comm = await connect(address, timeout=3, **options)
        await comm.write({"op": "identity", "reply": True})
        return await asyncio.wait_for(comm.read(), 3)
    except Exception:
        return None

async def main():
    own = Security.temporary().get_connection_args("client")
    for address in sys.argv[1:]:
        for answer in (await told("tcp://" + address), await told("tls://" + address, **own)):
            print("refused" if answer is None else "let in")

asyncio.run(main())
"""


def listening(root: int) -> set[tuple[str, int]]:
    """(address, port) of all listening sockets of a process and its descendants."""
    family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    net_connections = [
        getattr(process, "net_connections", None) or process.connections for process in family
    ]  # of psutil 5
    sockets = [each for connections in net_connections for each in connections("inet")]
    return {
        (each.laddr.ip, each.laddr.port) for each in sockets if each.status == psutil.CONN_LISTEN
    }


def let_in(addresses: list[str]) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-c", INTRUDER, *addresses], capture_output=True, text=True, check=True
    )
    return process.stdout.splitlines()


def test_nobody_else_gets_into_a_local_cluster() -> None:
    before = listening(psutil.Process().pid)
    with cluster(2, None) as client:
        assert client.submit(sum, [1, 2]).result() == 3
        sockets = listening(psutil.Process().pid) - before
        assert len(sockets) >= 5  # of the scheduler, workers and nannies
        assert {address for address, _ in sockets} == {"127.0.0.1"}
        cluster_workers = client.scheduler_info()["workers"]
        addresses = [
            client.scheduler.address,
            *cluster_workers,
            *(worker["nanny"] for worker in cluster_workers.values()),
        ]
        assert all(address.startswith("tls://") for address in addresses)
        assert set(let_in([address.removeprefix("tls://") for address in addresses])) == {"refused"}


def test_the_intruder_would_be_let_in_by_a_cluster_without_keys() -> None:
    options: dict[str, Any] = {
        "n_workers": 1,
        "processes": False,
        "dashboard_address": "127.0.0.1:0",
    }
    with LocalCluster(host="127.0.0.1", protocol="tcp://", **options) as open_:
        assert let_in([open_.scheduler_address.removeprefix("tcp://")]) == ["let in", "refused"]


def test_a_cluster_with_tls_is_used_with_the_keys_of_dasks_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CONNECT_TIMEOUT", "3s")
    keys = Security.temporary()
    (tmp_path / "ca.pem").write_text(keys.tls_ca_file)
    (tmp_path / "key.pem").write_text(keys.tls_client_key)
    configured = {
        "distributed.comm.tls.ca-file": str(tmp_path / "ca.pem"),
        "distributed.comm.tls.client.cert": str(tmp_path / "ca.pem"),
        "distributed.comm.tls.client.key": str(tmp_path / "key.pem"),
    }
    options: dict[str, Any] = {
        "n_workers": 1,
        "processes": False,
        "dashboard_address": "127.0.0.1:0",
    }
    with LocalCluster(host="127.0.0.1", security=keys, **options) as theirs:
        address = theirs.scheduler_address
        with dask.config.set(configured), cluster(None, address) as client:
            assert client.submit(sum, [1, 2]).result() == 3
        for wrong in (address, address.replace("tls://", "tcp://"), "gopher://127.0.0.1:1"):
            with pytest.raises(DistInitError) as refused, cluster(None, wrong):
                pass
            assert wrong in str(refused.value)
