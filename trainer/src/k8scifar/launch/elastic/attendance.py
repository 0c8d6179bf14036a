"""Who takes part in the next attempt of an elastic group: what node 0 knows of each node, and what it decides.

A group that has met in full goes on without nodes that are gone for long, and takes them back: at most one re-meeting
in `elastic_grow` seconds, and later each time that a node has left again, so that one that flaps costs little.
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
from k8scifar.launch.scratch import Scratch
from k8scifar.results import participants
from k8scifar.results.summary import finished_summary

LONGEST = 16  # times `grow`: the longest pause before a node that keeps leaving is taken back
ORDERS = "orders.json"  # in the scratch folder: what node 0's agent is told of its supervisor


@dataclass(frozen=True)
class Orders:
    """What node 0's agent needs to decide who takes part in one attempt."""

    allowed: list[int]
    """Numbers of nodes that can share a global batch, and are neither too few nor too many."""
    expected: list[int]
    """Nodes that are waited for."""
    pauses: list[float]
    """Seconds that each node which is not expected has to wait, without a break, before it is taken back."""
    missed: float
    """time.monotonic() since when the expected ones that are not there are missed."""
    wait: float
    """Seconds that they are waited for."""
    met: bool
    """Whether this group has met in full before: until then everyone is waited for."""

    @classmethod
    def read(cls, folder: Path) -> Orders:
        """What the supervisor left for its agent."""
        return cls(**json.loads((folder / ORDERS).read_text()))

    def decide(self, present: Iterable[int], now: float) -> list[int] | None:
        """The nodes that take part, of those `present`; None while there is somebody to wait for."""
        here = set(present) & set(self.expected)
        if here != set(self.expected) and not (self.met and now - self.missed >= self.wait):
            return None
        return self.most(here)

    def most(self, nodes: Iterable[int]) -> list[int] | None:
        """As many of these nodes as can train together, the first ones; None where they are too few."""
        nodes = sorted(nodes)
        count = max((count for count in self.allowed if count <= len(nodes)), default=0)
        return nodes[:count] or None

    def grown(self, taking_part: list[int], waited: dict[int, float]) -> list[int]:
        """The nodes to be taken back now: those that have waited long enough, if the group grows by them.

        `waited`: seconds without a break of each node that waits outside.
        """
        ready = [node for node, seconds in waited.items() if seconds >= self.pauses[node]]
        bigger = self.most({*taking_part, *ready}) or []
        return sorted(set(ready) & set(bigger)) if len(bigger) > len(taking_part) else []


class Attendance:
    """What node 0's supervisor remembers from attempt to attempt; a new one expects everybody."""

    def __init__(self, spec: NodeSpec) -> None:
        self._spec = spec
        self._expected = set(range(spec.nnodes))
        self._missed = time.monotonic()
        self._left: Counter[int] = Counter()  # how often each node was gone for long

    def order(self, folder: Path) -> None:
        """Leave the orders of the next attempt in its scratch folder."""
        spec = self._spec
        if finished_summary(spec.config):  # its ranks meet once more only for a node that lacks the result
            self._expected, self._missed = set(range(spec.nnodes)), time.monotonic()
        orders = Orders(
            allowed=allowed(spec),
            expected=sorted(self._expected),
            pauses=[self.pause(node) for node in range(spec.nnodes)],
            missed=self._missed,
            wait=spec.elastic_wait,
            met=participants.most(spec.config.run_dir) >= spec.nnodes,
        )
        (folder / ORDERS).write_text(json.dumps(asdict(orders)))

    def pause(self, node: int) -> float:
        """Seconds that a node has to wait before it is taken back."""
        return self._spec.elastic_grow * min(2 ** max(0, self._left[node] - 1), LONGEST)

    def learn(self, scratch: Scratch) -> None:
        """What an attempt that has ended tells; nothing where nobody had been called together."""
        if not (called := scratch.called):
            return
        now = time.monotonic()
        if now - called["at"] >= LONGEST * self._spec.elastic_grow:
            self._left -= Counter({node: self._left[node] for node in called["members"]})  # it has stayed
        self._left.update(called["gone"])
        self._expected = (self._expected - set(called["gone"])) | set(scratch.welcome)
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
