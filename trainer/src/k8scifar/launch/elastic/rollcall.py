"""How an elastic group meets: node 0 calls the roll in its store, and torchrun then starts with those who answered.

Runs in the agents, before and beside torchrun, at the one port there is. A node that looks for the group shows itself
under `seeker`, with a token that is new in each of its attempts; node 0 answers with the tokens of those who take part.
These show themselves under `member` from then on. Who is left out stays a seeker until node 0's store closes.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from k8scifar.console import say
from k8scifar.launch.elastic import meeting
from k8scifar.launch.elastic.attendance import Orders
from k8scifar.launch.scratch import Scratch
from k8scifar.ranks.store import connect
from k8scifar.results.participants import named

CALLED = "k8scifar/called"  # who takes part: attempt, tokens (by node), pauses (by node)
SEEKER, MEMBER = "k8scifar/seeker/", "k8scifar/member/"
EVERY = 0.3  # seconds between two signs of a node
SILENT = 4.0  # seconds without one after which a node is not there
ANSWER = 20.0  # seconds that the store gets to answer


@dataclass
class Party:
    """Who takes part in this attempt."""

    attempt: str
    nodes: list[int]
    store: Any  # node 0: the store itself; others: a client of it
    look: Callable[[Any], None]  # to be called again and again with a client of the store, as long as the attempt lasts


class Sight:
    """What node 0 sees of another node: since when it has shown itself without a break."""

    def __init__(self) -> None:
        self.token, self.beat, self.seen, self.since = "", "", 0.0, 0.0

    def look(self, store: Any, key: str, now: float) -> bool:
        """Whether the node is there now."""
        if store.check([key]):
            token, beat = store.get(key).decode().split()
            if (token, beat) != (self.token, self.beat):
                if token != self.token or now - self.seen > SILENT:
                    self.since = now
                self.token, self.beat, self.seen = token, beat, now
        return bool(self.token) and now - self.seen <= SILENT


def call(address: str, port: int, job: str, orders: Orders, scratch: Scratch, seconds: float) -> Party:
    """Node 0: open the store, and wait until it is decided who takes part. Raises TimeoutError, RuntimeError."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=seconds)
    store = TCPStore(address, port, None, True, timeout, wait_for_workers=False)
    store.set(meeting.JOB, job)
    token, others = uuid.uuid4().hex[:8], {node: Sight() for node in range(1, len(orders.pauses))}
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        there = [node for node, sight in others.items() if sight.look(store, f"{SEEKER}{node}", now)]
        if nodes := orders.decide([0, *there], now):
            break
        missing = named(sorted(set(orders.expected) - {0, *there}) or [0])
        left = f"gone for {now - orders.missed:.0f} s of {orders.wait:.0f} s, after which training goes on without"
        scratch.wait_for(f"{missing}, {left if orders.met else 'for at first all nodes must meet'}")
        time.sleep(EVERY)
    else:
        raise TimeoutError(f"{missing} did not come within {seconds:.0f} s")
    attempt = uuid.uuid4().hex[:8]
    gone = sorted(set(orders.expected) - {0, *there})
    scratch.call(nodes, gone)
    if gone:
        say(
            f"k8scifar: gone for {now - orders.missed:.0f} s: {named(gone)}; "
            f"training goes on from the newest checkpoint with {named(nodes)}, and takes back who returns"
        )
    tokens = {node: others[node].token if node else token for node in nodes}
    store.set(CALLED, json.dumps({"attempt": attempt, "tokens": tokens, "pauses": orders.pauses}))
    return Party(attempt, nodes, store, Door(orders, scratch, nodes).look)


def answer(address: str, port: int, node: int, job: str, scratch: Scratch, seconds: float) -> Party:
    """Another node: show itself until it is called. Raises TimeoutError where node 0 does not answer, PeersDiffer.

    One that is not called waits as long as the attempt of the others lasts; then RuntimeError is raised.
    """
    token, end, store = uuid.uuid4().hex[:8], time.monotonic() + seconds, None
    while store is None:
        if time.monotonic() > end:
            raise TimeoutError(f"node 0 did not answer at {address}:{port} within {seconds:.0f} s")
        scratch.wait_for(f"node 0 at {address}:{port}, without which no other node goes on")
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            store = connect(address, port, answer=ANSWER)
            continue
        time.sleep(EVERY)
    meeting.compare(store, node, job)
    beat = 0
    scratch.wait_for("all nodes to meet")
    while True:
        beat += 1
        store.set(f"{SEEKER}{node}", f"{token} {beat}")
        if store.check([meeting.AGAIN]):
            meeting.leave(store.get(meeting.AGAIN).decode())
        if store.check([CALLED]):
            called = json.loads(store.get(CALLED))
            tokens = {int(key): value for key, value in called["tokens"].items()}
            if tokens.get(node) == token:
                return Party(called["attempt"], sorted(tokens), store, lambda client: _show(client, node))
            if node in tokens:
                reason = f"the end of another process that takes part as node {node}"
            else:
                others, pause = named(sorted(tokens)), called["pauses"][node]
                reason = f"its turn: training went on with {others}, which takes back who has waited for {pause:.0f} s"
            if reason != scratch.waits_for:
                say(f"k8scifar: waiting for {reason}")
                scratch.wait_for(reason)
        time.sleep(EVERY)


def _show(store: Any, node: int) -> None:
    """A member's sign of life."""
    store.add(f"{MEMBER}{node}", 1)


class Door:
    """Node 0 while an attempt lasts: who takes part and came anew, who fell silent before the start, who is back."""

    def __init__(self, orders: Orders, scratch: Scratch, nodes: list[int]) -> None:
        self._orders, self._scratch, self._nodes = orders, scratch, nodes
        self._seekers = {node: Sight() for node in range(1, len(orders.pauses))}
        self._members = {node: (0, time.monotonic()) for node in nodes if node}  # number of signs, when the last came
        self._called: dict[int, str] | None = None
        self._patience = float(os.environ.get("K8SCIFAR_PEER_TIMEOUT", "60"))  # seconds

    def look(self, store: Any) -> None:
        """One look, by a client of the store."""
        now = time.monotonic()
        if self._called is None:
            self._called = {int(node): token for node, token in json.loads(store.get(CALLED))["tokens"].items()}
        for node, (count, seen) in self._members.items():
            if (signs := store.add(f"{MEMBER}{node}", 0)) != count:
                self._members[node] = (signs, now)
            elif now - seen > SILENT and self._came_anew(store, node, now):
                store.set(meeting.AGAIN, f"node {node} has started anew")
            elif now - seen > self._patience and not self._scratch.joined:  # later its ranks' silence is noticed
                store.set(meeting.AGAIN, f"node {node} fell silent before the ranks met")
        outside = {node: sight for node, sight in self._seekers.items() if node not in self._nodes}
        waited = {
            node: now - sight.since for node, sight in outside.items() if sight.look(store, f"{SEEKER}{node}", now)
        }
        if not self._scratch.welcome and (back := self._orders.grown(self._nodes, waited)):
            self._scratch.welcome_back(back)

    def _came_anew(self, store: Any, node: int, now: float) -> bool:
        """Whether another process now looks for the group as this node, which takes part."""
        sight = self._seekers[node]
        return sight.look(store, f"{SEEKER}{node}", now) and sight.token != self._called[node]
