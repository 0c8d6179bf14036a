"""What a node needs before an attempt: node 0's name, a free port, the data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k8scifar.launch import sockets
from k8scifar.launch.node import NodeSpec


@dataclass(frozen=True)
class Prerequisite:
    """One prerequisite, which may still be met."""

    is_met: Callable[[], bool]
    otherwise: str  # the log line while it is not met
    seconds: float  # how long to wait before it is an error


def prerequisites(spec: NodeSpec) -> list[Prerequisite]:
    """Return the prerequisites in the order to check. Without restarts, a port in use is an error at once."""
    found = []
    if spec.nnodes > 1:
        name = spec.master_addr
        text = f"the name {name} does not resolve; {sockets.name_advice(name)}"
        found.append(Prerequisite(lambda: bool(sockets.resolve(name)), text, spec.wait))
    if spec.node_rank == 0 and spec.master_port is not None:
        port = spec.master_port
        text = f"port {port} of this machine is in use; end the process that holds it, or choose another --master-port"
        found.append(Prerequisite(lambda: sockets.port_is_free(port), text, spec.wait if spec.restart else 0.0))
    if spec.waits_for_data:
        manifest = Path(spec.config.data.dir) / "manifest.json"
        text = (
            f"there is no data set in {manifest.parent} yet: node 0 prepares it (in a cluster, kubectl logs of pod 0, "
            "container prepare); if it has, this node has another dataset volume, because a hostPath is not shared"
        )
        found.append(Prerequisite(manifest.exists, text, spec.data_wait))
    return found
