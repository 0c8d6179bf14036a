"""Who took part in a run: from which step on, which nodes and how many ranks.

The list is part of every checkpoint. `members.json` in the run folder holds it for who does not read those, with the
largest number of nodes that ever met: a group that has met in full may go on without one of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from k8scifar import files

NODES = "K8SCIFAR_NODES"  # environment variable: the nodes of this attempt, where not all take part
ATTEMPT = "K8SCIFAR_ATTEMPT"  # environment variable: the attempt to which the ranks of an elastic group belong
FILE = "members.json"

Members = dict[str, Any]  # from: the first step; nodes; world_size


def present(step: int, world_size: int) -> Members:
    """Who takes part from this step on: this attempt."""
    if some := os.environ.get(NODES):
        nodes = [int(node) for node in some.split(",")]
    else:
        nodes = list(range(int(os.environ.get("GROUP_WORLD_SIZE", "1"))))
    return {"from": step, "nodes": nodes, "world_size": world_size}


def joined(before: list[Members], now: Members) -> list[Members]:
    """The list with those who take part now; it is the same where nothing changes."""
    kept = [each for each in before if each["from"] < now["from"]]
    same = kept and all(kept[-1].get(key, now[key]) == now[key] for key in ("nodes", "world_size"))
    return kept if same else [*kept, now]


def within(members: list[Members], begin: int, end: int) -> list[Members]:
    """Those who took part in the steps from `begin` to `end`, each with its own part of them as `from` and `to`."""
    ends = [each["from"] for each in members[1:]] + [end]
    return [
        each | {"from": max(begin, each["from"]), "to": min(end, until)}
        for each, until in zip(members, ends, strict=True)
        if each["from"] < end and until > begin
    ]


def told(members: list[Members]) -> list[str]:
    """A clause for each of `within`."""
    return [f"steps {each['from']} to {each['to']} by {who(each)}" for each in members]


def who(each: Members) -> str:
    """The nodes and ranks in words."""
    ranks, nodes = f"{each['world_size']} rank(s)", each.get("nodes")  # a former release did not write the nodes
    return ranks if nodes is None else f"{ranks} on {named(nodes)}"


def named(nodes: list[int]) -> str:
    """`node 0`, `nodes 0 and 2`, `nodes 0, 1 and 3`."""
    if len(nodes) == 1:
        return f"node {nodes[0]}"
    return f"nodes {', '.join(map(str, nodes[:-1]))} and {nodes[-1]}"


def content(run_dir: Path, members: list[Members]) -> str:
    """What `members.json` is to hold. Raises OSError."""
    there = max(len(each.get("nodes", [])) for each in members)
    return json.dumps({"members": members, "most": max(most(run_dir), there)})


def read(run_dir: Path) -> dict[str, Any]:
    """What `members.json` holds; empty where there is none that can be read."""
    try:
        values = json.loads(files.read(run_dir / FILE))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def most(run_dir: Path) -> int:
    """The largest number of nodes that ever met for this run."""
    count = read(run_dir).get("most", 0)
    return count if isinstance(count, int) else 0
