"""What a node needs from others before an attempt: node 0's name, a free port, the data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k8scifar.launch import sockets
from k8scifar.launch.node import NodeSpec


@dataclass(frozen=True)
class Need:
    """Something that may still come."""

    is_met: Callable[[], bool]
    otherwise: str  # what to say while it is not there
    seconds: float  # how long to wait before it is called an error


def needs(spec: NodeSpec) -> list[Need]:
    """What has to be there, in this order. A node that nobody starts again gets its port at once, or an error."""
    found = []
    if spec.nnodes > 1:
        name = spec.master_addr
        text = f"the name {name} does not resolve; {sockets.name_advice(name)}"
        found.append(Need(lambda: bool(sockets.resolve(name)), text, spec.wait))
    if spec.node_rank == 0 and spec.master_port is not None:
        port = spec.master_port
        text = f"port {port} of this machine is in use; end what holds it or choose another --master-port"
        found.append(Need(lambda: sockets.port_is_free(port), text, spec.wait if spec.restart else 0.0))
    if spec.waits_for_data:
        manifest = Path(spec.config.data.dir) / "manifest.json"
        text = (
            f"there is no data set in {manifest.parent} yet: node 0 prepares it (in a cluster, kubectl logs of pod 0, "
            "container prepare); if it has done so, this node's dataset volume is another one: a hostPath is not shared"
        )
        found.append(Need(manifest.exists, text, spec.data_wait))
    return found
