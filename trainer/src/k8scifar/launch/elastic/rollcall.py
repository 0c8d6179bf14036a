"""Node 0's side of an elastic group's meeting: see who waits, call who takes part, and watch both during the attempt.

Runs in node 0's agent, before and beside torchrun. `waiting_room.py` is the other nodes' side and explains the keys.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from k8scifar.console import say
from k8scifar.launch import rendezvous
from k8scifar.launch.elastic.membership import Policy
from k8scifar.launch.elastic.waiting_room import CALLED, INTERVAL, MEMBER, WAITING, Group
from k8scifar.launch.reports import AgentReport, Writer
from k8scifar.results.participants import named

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SILENT = 4.0  # seconds without a sign of life after which a node is away


class WaitingNode:
    """What node 0 has seen of a node in the waiting room: its token, and since when it has waited without a break."""

    def __init__(self) -> None:
        self.token, self.since = "", 0.0
        self._sign, self._seen_at = "", 0.0

    def is_there(self, store: TCPStore, node: int, now: float) -> bool:
        """Look for a new sign of life, and return whether the node waits now."""
        if store.check([f"{WAITING}{node}"]):
            token, sign = store.get(f"{WAITING}{node}").decode().split()
            if (token, sign) != (self.token, self._sign):
                if token != self.token or now - self._seen_at > SILENT:
                    self.since = now
                self.token, self._sign, self._seen_at = token, sign, now
        return bool(self.token) and now - self._seen_at <= SILENT


def call(
    address: str,
    port: int,
    job: str,
    policy: Policy,
    report: Writer[AgentReport],
    ranks_started: Callable[[], bool],
    seconds: float,
) -> Group:
    """Open the store, wait until the policy decides who takes part, and call them. Raises TimeoutError, RuntimeError.

    Args:
        ranks_started: whether the ranks of this node have started.
    """
    from torch.distributed import TCPStore

    store = TCPStore(address, port, None, True, timedelta(seconds=seconds), wait_for_workers=False)
    store.set(rendezvous.JOB, job)
    waiting = {node: WaitingNode() for node in range(1, len(policy.pauses))}
    end = time.monotonic() + seconds
    while True:
        now = time.monotonic()
        there = [0, *(node for node, seen in waiting.items() if seen.is_there(store, node, now))]
        missing, away = sorted(set(policy.expected) - set(there)), now - policy.missed
        if nodes := policy.decide(there, now):
            break
        if now >= end:
            raise TimeoutError(f"{named(missing or [0])} did not come within {seconds:.0f} s")
        rule = "at first all nodes must meet"
        if policy.met:
            rule = f"away for {away:.0f} s; the others resume after {policy.wait:.0f} s"
        report.update(waits_for=f"{named(missing or [0])}, {rule}")
        time.sleep(INTERVAL)
    report.update(members=nodes, away=missing, decided_at=now)
    if missing:
        have, alone = "has" if len(missing) == 1 else "have", " alone" * (len(nodes) == 1)
        say(
            f"k8scifar: {named(missing)} {have} been away for {away:.0f} s; resuming on {named(nodes)}{alone} from the "
            f"last checkpoint; {named(missing)} can rejoin at any time"
        )
    tokens = {node: waiting[node].token if node else "node 0" for node in nodes}
    attempt = uuid.uuid4().hex[:8]
    store.set(CALLED, json.dumps({"attempt": attempt, "tokens": tokens, "pauses": policy.pauses}))
    members = {node: token for node, token in tokens.items() if node}
    return Group(attempt, nodes, store, Watch(policy, report, members, ranks_started).look)


class Watch:
    """During an attempt, find members that restarted or went silent before the ranks met, and nodes to take back."""

    def __init__(
        self, policy: Policy, report: Writer[AgentReport], members: dict[int, str], ranks_started: Callable[[], bool]
    ) -> None:
        """`members`: the other nodes that take part, with their tokens."""
        self._policy, self._report, self._tokens, self._ranks_started = policy, report, members, ranks_started
        self._waiting = {node: WaitingNode() for node in range(1, len(policy.pauses))}
        self._signs = {node: (0, time.monotonic()) for node in members}  # how many were seen, and when the last
        self._timeout = float(os.environ.get("K8SCIFAR_PEER_TIMEOUT", "60"))  # seconds

    def look(self, store: TCPStore) -> None:
        """Look once, by a client of the store."""
        now = time.monotonic()
        for node, (count, seen_at) in self._signs.items():
            if (signs := store.add(f"{MEMBER}{node}", 0)) != count:
                self._signs[node] = (signs, now)
            elif now - seen_at > SILENT and self._has_restarted(store, node, now):
                store.set(rendezvous.AGAIN, f"node {node} has restarted")
            elif now - seen_at > self._timeout and not self._ranks_started():  # later the ranks detect it
                store.set(rendezvous.AGAIN, f"node {node} went silent before the ranks met")
        waited = {
            node: now - seen.since
            for node, seen in self._waiting.items()
            if node not in self._tokens and seen.is_there(store, node, now)
        }
        if not self._report.report.returning and (nodes := self._policy.returning([0, *self._tokens], waited)):
            self._report.update(returning=nodes)

    def _has_restarted(self, store: TCPStore, node: int, now: float) -> bool:
        """Whether another process now waits under the number of a member."""
        seen = self._waiting[node]
        return seen.is_there(store, node, now) and seen.token != self._tokens[node]
