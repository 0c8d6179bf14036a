"""What static rendezvous lacks: one store is used by one start of each node, and all nodes leave it together.

A node that restarts while the others still wait in the old attempt would join the old store and receive old addresses;
both sides would then wait for the process-group time-out. So each node of a fixed group counts its visits in the store.
A node that finds an earlier visit sets `AGAIN` and waits for a new store; every agent watches `AGAIN` and ends then.
Elastic groups meet in `elastic/rollcall.py` and `elastic/waiting_room.py`, and share `AGAIN`, `JOB` and `watch`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from k8scifar.errors import FAILED, PeersDiffer
from k8scifar.launch.reports import AgentReport, Writer
from k8scifar.ranks.store import connect

if TYPE_CHECKING:
    from torch.distributed import TCPStore

AGAIN = "k8scifar/again"  # why all nodes have to leave this store
JOB = "k8scifar/job"  # the options that must be the same on all nodes
GRACE = 5.0  # seconds between losing the store and giving up: at the end of training the store closes first


def visit(address: str, port: int, rank: int, job: str, seconds: float) -> TCPStore:
    """Connect to a store that this node has not visited before.

    Resolves the name and connects again each time, since node 0 may come back under another address. Raises
    TimeoutError, and PeersDiffer where node 0 was started with another `job`.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            store = connect(address, port)
            if store.add(f"k8scifar/node/{rank}", 1) == 1:
                check_job(store, rank, job)
                return store
            store.set(AGAIN, f"node {rank} has restarted")
            while time.monotonic() < end:  # until the old store is gone
                store.check([AGAIN])
                time.sleep(0.2)
        time.sleep(0.2)
    raise TimeoutError(f"node 0 did not answer at {address}:{port} within {seconds:.0f} s")


def check_job(store: TCPStore, rank: int, job: str) -> None:
    """Raise PeersDiffer unless node 0 has the same `job`; a node 0 that reports none within GRACE passes."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        if store.check([JOB]):
            first = store.get(JOB).decode()
            if first != job:
                text = f"node 0 was started with {first}, node {rank} with {job}; give all nodes the same"
                store.set(AGAIN, text)
                raise PeersDiffer(text)
            return
        time.sleep(0.1)


def watch(
    address: str,
    port: int,
    job: str,
    report: Writer[AgentReport],
    store: TCPStore | None = None,
    each_time: Callable[[TCPStore], None] = lambda store: None,
) -> None:
    """In a thread, end this process when a node has restarted or node 0's store is lost.

    Args:
        store: None on node 0, which connects to its own store and writes its `job` there.
        each_time: called with the store twice a second.
    """

    def run() -> None:
        client = store
        while client is None:
            client = _own_store(address, port, job)
        try:
            while not client.check([AGAIN]):
                each_time(client)
                time.sleep(0.5)
            reason = client.get(AGAIN).decode()
        except RuntimeError:
            time.sleep(GRACE)
            reason = "node 0 was lost"
        end_agent(report, reason)

    threading.Thread(target=run, daemon=True).start()


def _own_store(address: str, port: int, job: str) -> TCPStore | None:
    """Node 0: write the job into its store; None while torchrun has not opened the store."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        store = connect(address, port)
        store.set(JOB, job)
        return store
    time.sleep(0.2)
    return None


def end_agent(report: Writer[AgentReport], reason: str) -> NoReturn:
    """End this process at once; the kernel ends its ranks with it."""
    report.explain(reason)
    sys.stderr.flush()
    os._exit(FAILED)
