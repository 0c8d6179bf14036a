"""How the nodes' agents meet: each knocks at node 0's store, and all leave together when one had to come again.

Static rendezvous alone leaves a gap. A node that starts anew while the others still wait in the old attempt joins
the old store and is handed old addresses; both sides then wait for the process-group time-out. So an agent that
finds its own earlier visit in the store says so there and waits for a new store, and every agent watches for that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from k8scifar.errors import FAILED, PeersDiffer
from k8scifar.ranks.store import connect

AGAIN = "k8scifar/again"  # why all nodes should leave this store, in words
MIN_NODES = "K8SCIFAR_MIN_NODES"  # environment variable of an elastic group: how few nodes go on
JOB = "k8scifar/job"  # what all nodes must have been started with
GRACE = 5.0  # seconds between losing the store and giving up: at the end of training it just closes first


def knock(address: str, port: int, rank: int, job: str, seconds: float):
    """Connect to a store that this node has not visited before; returns it.

    Asks for the name and connects anew each time, since node 0 may come back under another address. Raises
    TimeoutError, and PeersDiffer where node 0 was started with another `job` than this node.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            store = connect(address, port)
            if store.add(f"k8scifar/node/{rank}", 1) == 1:
                compare(store, rank, job)
                return store
            store.set(AGAIN, f"node {rank} has started anew")
            while time.monotonic() < end:  # until the old store is gone
                store.check([AGAIN])
                time.sleep(0.2)
        time.sleep(0.2)
    raise TimeoutError(f"node 0 did not answer at {address}:{port} within {seconds:.0f} s")


def compare(store, rank: int, job: str) -> None:
    """Raise PeersDiffer unless node 0 says the same `job`; one that says nothing within GRACE is taken as it is."""
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


def watch(address: str, port: int, job: str, store=None, look: Callable[[Any], None] = lambda store: None) -> None:
    """From now on end this process when a node had to start anew, or when node 0's store is lost.

    Without a `store`, this is node 0: it waits for its own and says there what `job` it was started with. `look` is
    called with the store at each look.
    """
    threading.Thread(target=_watch, args=(address, port, job, store, look), daemon=True).start()


def _watch(address: str, port: int, job: str, store, look: Callable[[Any], None]) -> None:
    while store is None:
        try:
            store = connect(address, port)
            store.set(JOB, job)
        except (OSError, RuntimeError, ValueError):
            store = None
            time.sleep(0.2)
    try:
        while not store.check([AGAIN]):
            look(store)
            time.sleep(0.5)
        leave(store.get(AGAIN).decode())
    except RuntimeError:
        time.sleep(GRACE)
        leave("node 0 was lost")


def leave(reason: str) -> None:
    """End at once; the kernel ends this process's ranks with it."""
    leave_reason(reason)
    sys.stderr.flush()
    os._exit(FAILED)


def leave_reason(reason: str) -> None:
    """Leave word for the supervisor why this agent ends."""
    if folder := os.environ.get("K8SCIFAR_SCRATCH"):
        with contextlib.suppress(OSError), open(os.path.join(folder, "reason.agent"), "w") as file:
            file.write(reason)
