"""Where a node of an elastic group waits until node 0 calls it: at a start, and when it comes back during training.

Runs in the agent of every node but 0, before torchrun, at the rendezvous port. A waiting node shows signs of life in
node 0's store under `WAITING`, with a token that is new in each attempt. `rollcall.py` on node 0 sees them and answers
under `CALLED` with the tokens of the nodes that take part. These show signs of life under `MEMBER` from then on. A node
that is not called waits until node 0's store closes, and its supervisor then starts the next attempt.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k8scifar.console import say
from k8scifar.launch import rendezvous
from k8scifar.launch.reports import AgentReport, Writer
from k8scifar.ranks.store import connect
from k8scifar.results.participants import named

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CALLED = "k8scifar/called"  # who takes part: attempt, tokens (by node), pauses (by node)
WAITING, MEMBER = "k8scifar/seeker/", "k8scifar/member/"  # prefixes; a node's number follows
INTERVAL = 0.3  # seconds between two signs of life
STORE_TIMEOUT = 20.0  # seconds that the store has for each answer


@dataclass
class Group:
    """The nodes that take part in this attempt."""

    attempt: str
    nodes: list[int]
    store: TCPStore
    """Node 0: the store itself; others: a client of it."""
    each_time: Callable[[TCPStore], None]
    """To be called again and again with a client of the store while the attempt lasts."""


def join(address: str, port: int, node: int, job: str, report: Writer[AgentReport], seconds: float) -> Group:
    """Wait until node 0 calls this node.

    Raises TimeoutError where node 0 does not answer, PeersDiffer, and RuntimeError where node 0's store closes.
    """
    store = _connect(address, port, report, seconds)
    rendezvous.check_job(store, node, job)
    report.update(waits_for="all nodes to meet")
    token, signs = uuid.uuid4().hex[:8], 0
    while True:
        signs += 1
        store.set(f"{WAITING}{node}", f"{token} {signs}")
        if store.check([rendezvous.AGAIN]):
            rendezvous.end_agent(report, store.get(rendezvous.AGAIN).decode())
        if store.check([CALLED]):
            called = json.loads(store.get(CALLED))
            tokens = {int(key): value for key, value in called["tokens"].items()}
            if tokens.get(node) == token:
                return Group(called["attempt"], sorted(tokens), store, lambda client: _show_life(client, node))
            _report_wait(report, node, tokens, called["pauses"][node])
        time.sleep(INTERVAL)


def _connect(address: str, port: int, report: Writer[AgentReport], seconds: float) -> TCPStore:
    report.update(waits_for=f"node 0 at {address}:{port}; no other node trains without it")
    end = time.monotonic() + seconds
    while time.monotonic() <= end:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            return connect(address, port, answer=STORE_TIMEOUT)
        time.sleep(INTERVAL)
    raise TimeoutError(f"node 0 did not answer at {address}:{port} within {seconds:.0f} s")


def _report_wait(report: Writer[AgentReport], node: int, tokens: dict[int, str], pause: float) -> None:
    """Log and report, once, why this node is not among those called."""
    if node in tokens:
        reason = f"the end of another process that takes part as node {node}"
    else:
        reason = f"{named(sorted(tokens))} to take this node back, after it has waited for {pause:.0f} s"
    if reason != report.report.waits_for:
        say(f"k8scifar: waiting for {reason}")
        report.update(waits_for=reason)


def _show_life(store: TCPStore, node: int) -> None:
    """Show a member's sign of life."""
    store.add(f"{MEMBER}{node}", 1)
