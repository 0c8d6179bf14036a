"""Connect to node 0's store, in which torch's rendezvous and the heartbeats write."""

from __future__ import annotations

import datetime
import os
import socket

# Longer than the ranks' own time-out, because a rank can identify the silent peer and the store cannot.
MARGIN = 30.0  # seconds


def connect(address: str, port: int, reach: float = 2.0, answer: float | None = None):
    """Return a client of node 0's store that is not counted as a node. Raises OSError or RuntimeError.

    Args:
        reach: time-out of the connection, seconds.
        answer: time-out of each answer, seconds; None: MARGIN beyond the process group's time-out.
    """
    from torch.distributed import TCPStore

    if answer is None:
        answer = float(os.environ.get("K8SCIFAR_PEER_TIMEOUT", "60")) + MARGIN
    socket.create_connection((address, port), timeout=reach).close()  # torch's own retries are seconds apart
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=datetime.timedelta(seconds=answer))
