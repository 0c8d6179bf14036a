"""The rules of an elastic group: how long node 0 waits for a node, trains without it, and when it takes it back.

A group that has met in full trains without nodes that are away for long, and takes them back. A node that leaves again
has to wait twice as long each time, so that a flapping node costs little.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from k8scifar.config.schema import check_world_size
from k8scifar.launch.node import NodeSpec
from k8scifar.launch.reports import AgentReport
from k8scifar.results import participants
from k8scifar.results.summary import finished_summary

LONGEST = 16  # times `elastic_grow`: the longest wait of a node that keeps leaving
FILE = "policy.json"


@dataclass(frozen=True)
class Policy:
    """What node 0's agent needs to decide who takes part in one attempt."""

    allowed: list[int]
    """Numbers of nodes that can share a global batch, within the limits that the user set."""
    expected: list[int]
    """Nodes that node 0 waits for."""
    pauses: list[float]
    """Seconds that each unexpected node has to wait, without a break, before it is taken back."""
    missed: float
    """time.monotonic() since when node 0 waits for the expected nodes."""
    wait: float
    """Seconds that node 0 waits for them."""
    met: bool
    """Whether this group has met in full before; until then node 0 waits for all."""

    @classmethod
    def read(cls, folder: Path) -> Policy:
        """Read what the supervisor wrote for this attempt."""
        return cls(**json.loads((folder / FILE).read_text()))

    def decide(self, present: Iterable[int], now: float) -> list[int] | None:
        """Return the nodes that take part, out of those `present`; None to wait on."""
        here = set(present) & set(self.expected)
        if here != set(self.expected) and not (self.met and now - self.missed >= self.wait):
            return None
        return self.most(here)

    def most(self, nodes: Iterable[int]) -> list[int] | None:
        """Return as many of these nodes as can train together, lowest first; None where they are too few."""
        nodes = sorted(nodes)
        count = max((count for count in self.allowed if count <= len(nodes)), default=0)
        return nodes[:count] or None

    def returning(self, members: list[int], waited: dict[int, float]) -> list[int]:
        """Return the nodes to take back now: those that have waited long enough, if the group grows by them.

        Args:
            waited: seconds that each waiting node has waited without a break.
        """
        ready = [node for node, seconds in waited.items() if seconds >= self.pauses[node]]
        bigger = self.most({*members, *ready}) or []
        return sorted(set(ready) & set(bigger)) if len(bigger) > len(members) else []


class Membership:
    """What node 0's supervisor remembers from attempt to attempt; at first it expects every node."""

    def __init__(self, spec: NodeSpec) -> None:
        self._spec = spec
        self._expected = set(range(spec.nnodes))
        self._missed = time.monotonic()
        self._left: Counter[int] = Counter()  # how often each node was away for long

    def write_policy(self, folder: Path) -> None:
        """Write the policy of the next attempt into its folder."""
        spec = self._spec
        if finished_summary(spec.config):  # the ranks start once more only for a node that lacks the result
            self._expected, self._missed = set(range(spec.nnodes)), time.monotonic()
        policy = Policy(
            allowed=allowed(spec),
            expected=sorted(self._expected),
            pauses=[self._pause(node) for node in range(spec.nnodes)],
            missed=self._missed,
            wait=spec.elastic_wait,
            met=participants.most(spec.config.run_dir) >= spec.nnodes,
        )
        (folder / FILE).write_text(json.dumps(asdict(policy)))

    def _pause(self, node: int) -> float:
        """Seconds that a node has to wait before it is taken back."""
        return self._spec.elastic_grow * min(2 ** max(0, self._left[node] - 1), LONGEST)

    def learn(self, agent: AgentReport) -> None:
        """Take over what happened in an attempt that has ended; nothing where no members were decided."""
        if not agent.members:
            return
        now = time.monotonic()
        if now - agent.decided_at >= LONGEST * self._spec.elastic_grow:  # its members have stayed
            self._left -= Counter({node: self._left[node] for node in agent.members})
        self._left.update(agent.away)
        self._expected = (self._expected - set(agent.away)) | set(agent.returning)
        self._missed = now


def allowed(spec: NodeSpec) -> list[int]:
    """Numbers of nodes, from the fewest to all, whose ranks can share a global batch."""
    found = []
    for count in range(spec.min_nodes, spec.nnodes + 1):
        try:
            check_world_size(spec.config, count * spec.nproc_per_node)
        except ValueError:
            continue
        found.append(count)
    return found
